"""Receipts of tokenisation: one BOS, one stop token, one prompt, and a limit that never empties a response."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import byte_tokenizer
from transformers import AddedToken, AutoTokenizer

from sdpo.config import Data
from sdpo.data.preferences import Pair
from sdpo.data.prompt_and_answer import ChatFormat
from sdpo.data.templates import TEMPLATES
from sdpo.data.tokenize import content_hash, encode
from sdpo.errors import UserError

BOS, EOS = 1, 2


def pair(id="1", prompt="Why?", chosen="So.", rejected="No!", source="s", turns=()):
    return Pair(id, source, (*turns, {"role": "user", "content": prompt}), chosen, rejected)


def tokens(pairs, tokenizer, template="plain", max_tokens=512, on_long="error", side="training", **more):
    return encode(
        pairs, tokenizer, Data("local", template=template, max_tokens=max_tokens, on_long=on_long, **more), side
    )


def one(tokenizer, template="plain", max_tokens=512, on_long="error", **fields):
    """The single row's parts as lists of ids."""
    rows, _ = tokens([pair(**fields)], tokenizer, template, max_tokens, on_long)
    return [ids.tolist() for ids in rows["1"].ids]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_plain_ids(tokenizer, bos_tokenizer):
    expected = [ids(tokenizer, "Why?"), [*ids(tokenizer, "So."), EOS], [*ids(tokenizer, "No!"), EOS]]
    assert one(tokenizer) == expected
    assert one(bos_tokenizer) == [[BOS, *expected[0]], *expected[1:]]
    rows, _ = tokens([pair()], tokenizer)
    assert all(part.dtype == np.int32 for part in rows["1"].ids)


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
    assert [part.tolist() for part in rows["1"].ids] == one(bos_tokenizer)
    assert report["sources"]["s"]["specials_removed"] == 5
    assert one(bos_tokenizer, chosen="S</<s>s>o.") == one(bos_tokenizer)  # removing one makes another
    with pytest.raises(UserError, match=r"pair 1 of source s: field 'chosen' is left with nothing .*on_bad_row=skip"):
        tokens([pair(chosen="</s>")], bos_tokenizer)
    with pytest.raises(UserError, match="pair 1 of source s: field 'prompt' has a turn of nothing but special tokens"):
        tokens([pair(turns=TURNS[:1], prompt="<s>")], bos_tokenizer)
    with pytest.raises(
        UserError, match=r"no held-out pair of 1 is left .* \(1 empty\); repair the rows, or set data.templ"
    ):
        tokens([pair(chosen="</s>")], bos_tokenizer, on_bad_row="skip", side="held-out")
    rows, report = tokens([pair(chosen="</s>"), pair("2")], bos_tokenizer, on_bad_row="skip")
    assert list(rows) == ["2"] and report["sources"]["s"]["dropped_empty"] == 1


CHATML = TEMPLATES["chatml"]


@pytest.mark.parametrize("special", [True, False])
def test_marks_of_turns_may_be_ordinary_added_tokens_and_bos_may_be_one(special):
    """SmolLM2 and TRL's chat set-up: BOS opens every turn, and no part of what the template writes is removed."""
    tokenizer = byte_tokenizer()
    marks = [AddedToken(mark, special=special, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(marks)
    tokenizer.chat_template = CHATML
    if special:
        tokenizer.bos_token = "<|im_start|>"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    pairs = [pair(turns=TURNS, prompt="W<|im_end|>hy?", chosen="So<|im_start|>.", rejected="N</s>o!")]
    rows, report = tokens(pairs, tokenizer, None)
    prompt, chosen, rejected = (part.tolist() for part in rows["1"].ids)
    asked = [*TURNS, {"role": "user", "content": "Why?"}]
    assert prompt == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert prompt.count(start) == 5 and chosen == [*ids(tokenizer, "So."), end] and rejected[-1] == end
    counts = report["sources"]["s"]
    assert (counts["specials_removed"], counts["responses_with_stop"], report["stop"]) == (3, 2, "<|im_end|>")


def test_the_ending_may_hold_any_word(tokenizer):
    own = byte_tokenizer()
    own.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s> end of answer{% endif %}"
        "{% endfor %}"
    )
    assert one(own, None, chosen="My answer", rejected="First this.") == one(
        tokenizer, chosen="My answer", rejected="First this."
    )


SPLITS_THOUGHTS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'].split('</think>')[-1] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def test_what_a_template_leaves_out_of_an_answer_is_counted(tokenizer):
    own = byte_tokenizer()
    own.chat_template = SPLITS_THOUGHTS
    thoughtful = pair(chosen="<think>Why not</think>So.", rejected=" No! ")
    rows, report = tokens([thoughtful], own, None)
    assert own.decode(rows["1"].chosen) == "So.</s>" and own.decode(rows["1"].rejected) == " No! </s>"
    assert report["sources"]["s"]["answers_cut"] == 1
    silent = pair("2", rejected="<think>Why</think>")
    with pytest.raises(UserError, match="pair 2 of source s: field 'rejected' is left with nothing by the chat"):
        tokens([thoughtful, silent], own, None)
    rows, report = tokens([thoughtful, silent], own, None, on_bad_row="skip")
    assert list(rows) == ["1"] and report["sources"]["s"]["dropped_empty"] == 1


def test_a_prompt_that_is_not_how_the_conversation_begins(tokenizer):
    """The invitation opens a chain of thought, which the written conversation does not have: the answer follows it."""
    own = byte_tokenizer()
    own.chat_template = SPLITS_THOUGHTS.replace("'[assistant]' }}", "'[assistant]<think>' }}")
    rows, report = tokens([pair(chosen="<think>Because</think>So.")], own, None)
    assert own.decode(rows["1"].prompt) == "[user]Why?</s>[assistant]<think>"
    assert (
        own.decode(rows["1"].chosen) == "<think>Because</think>So.</s>" and own.decode(rows["1"].rejected) == "No!</s>"
    )
    counts = report["sources"]["s"]
    assert (counts["answers_behind_prompt"], counts["answers_cut"]) == (2, 0)
    (note,) = report["notes"]
    assert note.startswith("2 answers follow their prompt directly, because the template begins")


def test_pairs_that_are_left_out_or_cut_are_told(tokenizer):
    pairs = [pair(id=str(n), prompt="Why?" * n) for n in (1, 2, 50, 60)]
    for on_long, note in (("drop", "2 pairs were left out"), ("truncate_prompt", "2 pairs were shortened")):
        _, report = tokens(pairs, tokenizer, max_tokens=60, on_long=on_long)
        assert [said.startswith(note) for said in report["notes"]] == [True]


def test_a_template_that_reads_the_clock_reads_the_date_that_is_set():
    own = byte_tokenizer()
    own.chat_template = "{{ strftime_now('%d %b %Y') }}: " + CHATML
    rows, report = tokens([pair()], own, None, template_date="2025-01-02")
    assert own.decode(rows["1"].prompt).startswith("02 Jan 2025: <|im_start|>user")
    assert report["template_date"] == "2025-01-02"
    assert own.decode(one(own, None)[0]).startswith("26 Jul 2024: ")
    own.chat_template = "{% set how = '%Y' %}{{ strftime_now(how) }}" + CHATML
    with pytest.raises(UserError, match="reads the clock in a way that data.template_date cannot set"):
        tokens([pair()], own, None)
    with pytest.raises(UserError, match="data.template_date=tomorrow is not a date; write it as 2024-07-26"):
        tokens([pair()], own, None, template_date="tomorrow")


def test_tools_and_settings_are_handed_to_the_template(tokenizer):
    own = byte_tokenizer()
    own.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ 'loud: ' if loud }}" + TEMPLATES["plain"]
    tooled = replace(pair(), inputs={"tools": [{"name": "f</s>ind"}], "loud": True})
    rows, report = tokens([tooled], own, None)
    assert own.decode(rows["1"].prompt) == '[{"name": "find"}]loud: Why?' and own.decode(rows["1"].chosen) == "So.</s>"
    assert report["sources"]["s"]["specials_removed"] == 1
    with pytest.raises(UserError, match="pair 1 of source s: the chat template does not read tools, which the row has"):
        tokens([tooled], own, "plain")


def test_a_real_chat_model(real_model):
    """SmolLM2: its prompts are those of its template."""
    own = AutoTokenizer.from_pretrained(real_model)
    prompt, chosen, _ = one(own, None, turns=TURNS)
    asked = [*TURNS, {"role": "user", "content": "Why?"}]
    assert prompt == own.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert prompt.count(own.bos_token_id) == 5 and own.decode(chosen) == "So.<|im_end|>"


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
    assert [part.tolist() for part in rows["1"].ids] == [[3, 1], [2, 2, 0], [3, 4, 0]]
    assert report["sources"]["s"]["boundary_mismatches"] == 1


# "Why?" is 4 tokens (5 with BOS), "So." and EOS are 4, "Not at all" and EOS are 11.
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
    own = byte_tokenizer()
    own.chat_template = (
        TEMPLATES["plain"] + "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"pair 1 of source s: the chat template fails \(one turn\); repair it or set"):
        tokens([pair(turns=TURNS[1:])], own, None)
    rows, report = tokens([pair(turns=TURNS[1:]), pair("2")], own, None, on_bad_row="skip")
    assert list(rows) == ["2"] and report["sources"]["s"]["dropped_template"] == 1
    own.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="has a system turn, which the chat template does not write"):
        tokens([pair(turns=TURNS)], own, None)
    for template in ("{{ messages[0]['content'] }}", "{{ messages[-1]['content'] }}"):
        own.chat_template = template
        with pytest.raises(UserError, match="leaves out what the user or the assistant says; set data.template to one"):
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
