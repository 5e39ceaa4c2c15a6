"""Receipts of tokenisation: one BOS, one stop token, one prompt, and a limit that never empties a response."""

import json

import numpy as np
import pytest
from conftest import byte_tokenizer
from transformers import AutoTokenizer

from sdpo.data.preferences import Pair
from sdpo.data.templates import TEMPLATES, ChatFormat
from sdpo.data.tokenize import content_hash, encode
from sdpo.errors import UserError

BOS, EOS = 1, 2


def pair(id="1", prompt="Why?", chosen="So.", rejected="No!", source="s", turns=()):
    return Pair(id, source, (*turns, {"role": "user", "content": prompt}), chosen, rejected)


def tokens(pairs, tokenizer, template="plain", max_tokens=512, on_long="error"):
    return encode(pairs, tokenizer, template=template, max_tokens=max_tokens, on_long=on_long)


def one(tokenizer, template="plain", max_tokens=512, on_long="error", **fields):
    """The single row's parts as lists of ids."""
    rows, _ = tokens([pair(**fields)], tokenizer, template, max_tokens, on_long)
    return [ids.tolist() for ids in rows["1"][1:]]


@pytest.fixture
def bos_tokenizer():
    """Adds BOS by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_plain_ids(tokenizer, bos_tokenizer):
    expected = [ids(tokenizer, "Why?"), [*ids(tokenizer, "So."), EOS], [*ids(tokenizer, "No!"), EOS]]
    assert one(tokenizer) == expected
    assert one(bos_tokenizer) == [[BOS, *expected[0]], *expected[1:]]
    rows, _ = tokens([pair()], tokenizer)
    assert all(part.dtype == np.int32 for part in rows["1"][1:])


TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
)
PROMPTS = {
    "plain": "<s>Be brief.HiHelloWhy?",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
    "\n\n### Instruction:\nWhy?\n\n### Response:\n",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    "<|user|>\nWhy?</s>\n<|assistant|>\n",
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_named_templates(bos_tokenizer, template):
    prompt, chosen, _ = one(bos_tokenizer, template, turns=TURNS)
    assert (bos_tokenizer.decode(prompt), bos_tokenizer.decode(chosen)) == (PROMPTS[template], "So.</s>")


def test_alpaca_without_a_system_turn(tokenizer):
    assert tokenizer.decode(one(tokenizer, "alpaca")[0]).startswith("Below is an instruction that describes a task.")


def test_chatml_stops_at_its_own_token_where_the_tokenizer_has_it():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt, chosen, _ = one(tokenizer, "chatml")
    assert chosen == [*ids(tokenizer, "So."), end] and prompt.count(end) == 1


def test_own_template(bos_tokenizer):
    """Its BOS is not doubled, its end of turn is the stop token, and what follows that is no part of a response."""
    bos_tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    prompt, chosen, _ = one(bos_tokenizer, None, chosen=" So. ")
    assert bos_tokenizer.decode(prompt) == "<s>[user]Why?</s>\n[assistant]" and prompt.count(BOS) == 1
    assert bos_tokenizer.decode(chosen) == "So.</s>"
    bos_tokenizer.chat_template = bos_tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert BOS not in one(bos_tokenizer, None)[0]  # the template decides, not the tokenizer


def test_special_tokens_in_the_text_are_removed_and_counted(bos_tokenizer):
    rows, report = tokens([pair(prompt="<s>Why<s>?", chosen="S</s>o.</s>", rejected="<s>No!")], bos_tokenizer)
    assert [part.tolist() for part in rows["1"][1:]] == one(bos_tokenizer)
    assert report["sources"]["s"]["specials_removed"] == 4  # of the prompt's two, the first is the one BOS
    with pytest.raises(UserError, match="no pair is left"):
        tokens([pair(chosen="</s>")], bos_tokenizer)


def test_demonstrations(tokenizer):
    prompt, chosen, rejected = one(tokenizer, rejected="")
    assert rejected == [] and chosen[-1] == EOS


def test_boundary_mismatch():
    """Prompt "a" and response "b" merge to one token in the joint text: the prompt stays, the response is alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows, report = tokens([pair(prompt="ca", chosen="bb", rejected="cab")], tokenizer)
    assert [part.tolist() for part in rows["1"][1:]] == [[3, 1], [2, 2, 0], [3, 4, 0]]
    assert report["sources"]["s"]["boundary_mismatches"] == 1


# "Why?" is 4 tokens (5 with BOS), "So." and EOS are 4, "Not at all" and EOS are 11.
LONG = {"rejected": "Not at all"}


def test_limit_is_inclusive(tokenizer):
    assert len(one(tokenizer, max_tokens=15, **LONG)[2]) == 11
    with pytest.raises(UserError, match="pair 1 has 15 tokens, more than data.max_tokens=14; .*data.on_long"):
        one(tokenizer, max_tokens=14, **LONG)


def test_drop(tokenizer):
    pairs = [pair("1"), pair("2", source="t"), pair("3", source="t", **LONG)]
    rows, report = tokens(pairs, tokenizer, max_tokens=14, on_long="drop")
    assert list(rows) == ["1", "2"]
    counts = report["sources"]["t"]
    assert (counts["pairs"], counts["kept"], counts["long"], counts["dropped_long"]) == (2, 1, 1, 1)


def test_truncate_prompt(tokenizer, bos_tokenizer):
    whole = one(bos_tokenizer, **LONG)
    prompt, chosen, rejected = one(bos_tokenizer, max_tokens=14, on_long="truncate_prompt", **LONG)
    assert bos_tokenizer.decode(prompt) == "<s>y?" and [chosen, rejected] == whole[1:]
    assert tokenizer.decode(one(tokenizer, max_tokens=12, on_long="truncate_prompt", **LONG)[0]) == "?"
    for limit in (11, 12):  # no room for a token of the prompt behind BOS
        rows, report = tokens([pair(), pair("2", **LONG)], bos_tokenizer, "plain", limit, "truncate_prompt")
        assert list(rows) == ["1"] and report["sources"]["s"]["dropped_long"] == 1


def test_truncate_response(tokenizer):
    prompt, chosen, rejected = one(tokenizer, max_tokens=10, on_long="truncate_response", **LONG)
    assert tokenizer.decode(prompt) == "Why?"
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == ("So.</s>", "Not at")
    chosen, rejected = one(tokenizer, max_tokens=5, on_long="truncate_response", **LONG)[1:]
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == ("S", "N")
    pairs = [pair("1", "Y"), pair("2", "Why not?"), pair("3", chosen="Yes.", rejected="Yeah", prompt="W?")]
    rows, report = tokens(pairs, tokenizer, max_tokens=4, on_long="truncate_response")
    counts = report["sources"]["s"]
    assert list(rows) == ["1"] and (counts["dropped_long"], counts["dropped_identical"]) == (1, 1)


def test_content_hash(tokenizer):
    rows = list(tokens([pair("1"), pair("2")], tokenizer)[0].values())
    moved = rows[0]._replace(prompt=rows[0].prompt[:-1], chosen=np.insert(rows[0].chosen, 0, rows[0].prompt[-1]))
    hashes = {
        content_hash(r) for r in (rows, rows[::-1], rows[:1], [moved, rows[1]], [rows[0]._replace(id="3"), rows[1]])
    }
    assert len(hashes) == 5 and content_hash(rows) == content_hash(iter(rows))


def test_templates_that_fail(tokenizer):
    with pytest.raises(UserError, match="no chat template; set data.template to one of alpaca, zephyr, chatml, plain"):
        tokens([pair()], tokenizer, None)
    with pytest.raises(UserError, match="data.template=llama is none of"):
        tokens([pair()], tokenizer, "llama")
    with pytest.raises(UserError, match="data.on_long=cut is none of"):
        tokens([pair()], tokenizer, on_long="cut")
    own = byte_tokenizer()
    own_answer = "{{ messages[-1]['content'] }}"
    own.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + own_answer
    with pytest.raises(UserError, match=r"pair 1 of source s: the chat template fails \(one turn only\)"):
        tokens([pair(turns=TURNS)], own, None)
    own.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="pair 1 of source s: .*the prompt alone is not how the conversation begins"):
        tokens([pair()], own, None)
    own.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="leaves the assistant's answers out"):
        ChatFormat(own, None)
    own.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        ChatFormat(own, "plain")


@pytest.mark.parametrize("template", TEMPLATES)
def test_real_pairs(real_data, template):
    """On real text: the text comes back, one BOS stands first, one stop token last."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / "model" / "stories260K")
    lines = (real_data / "pairs" / "step2_ultrafeedback.eval.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    pairs = [Pair(row["id"], row["source"], tuple(row["messages"]), row["chosen"], row["rejected"]) for row in rows]
    encoded, report = tokens(pairs, tokenizer, template, 10_000)
    chat = ChatFormat(tokenizer, template)
    mismatches = 0
    for pair_, row in zip(pairs, encoded.values(), strict=True):
        prompt = chat.texts(pair_).prompt
        assert row.prompt.tolist() == [tokenizer.bos_token_id, *ids(tokenizer, prompt)]
        for response, text in ((row.chosen, pair_.chosen), (row.rejected, pair_.rejected)):
            assert (response == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(response) - 1]
            joint = ids(tokenizer, prompt + text)
            mismatches += [*row.prompt[1:], *response[:-1]] != joint
            assert tokenizer.decode(response[:-1]).strip() == text.strip()
    counts = report["sources"]
    assert sum(tally["boundary_mismatches"] for tally in counts.values()) == mismatches
    assert sum(tally["prompts_with_bos"] for tally in counts.values()) == len(pairs)
    assert sum(tally["responses_with_stop"] for tally in counts.values()) == 2 * len(pairs)
