"""Real chat templates: prompt and response are what transformers' own apply_chat_template makes of the conversation."""

import re
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from sdpo.config import Data
from sdpo.data.preferences import Pair
from sdpo.data.tokenize import encode
from sdpo.errors import UserError

ZOO = Path(find_spec("trl").origin).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in ZOO.glob("*.jinja") if "training" not in path.stem)
MARK = re.compile(r"<\|[^|<>]+\|?>|<[^|<>]+\|>|<｜[^｜<>]+｜>|</?[a-z_]+>|\[/?[A-Za-z]+\]")

ASK, SAID = {"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}
AGAIN, RULES = {"role": "user", "content": "How many?"}, {"role": "system", "content": "Be brief."}
PROMPTS = {"one turn": (ASK,), "system": (RULES, ASK), "three turns": (ASK, SAID, AGAIN)}
END = "forty-two."
ANSWERS = {
    "plain": f"It is {END}",
    "space": f" \nIt is {END}\n ",
    "think": f"<think>\nSix by seven.\n</think>\n\nIt is {END}",
}


class Frozen(datetime):
    @classmethod
    def now(cls):
        return cls.fromisoformat(Data.template_date)


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """The clock that transformers gives to templates stands still, for what is expected here."""
    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)


@cache
def tokenizer_of(name, bos):
    """The bytes, and the marks of a template as special tokens; BOS is one of its own or opens turns as well."""
    tokenizer = byte_tokenizer()
    source = (ZOO / f"{name}.jinja").read_text()
    tokenizer.add_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in dict.fromkeys(MARK.findall(source))]
    )
    tokenizer.chat_template = source
    if bos == "turn mark":
        text = tokenizer.apply_chat_template([ASK], tokenize=False)
        opening = [
            mark
            for mark in MARK.findall(text[: text.rindex(ASK["content"]) if ASK["content"] in text else None])
            if mark != "<s>"
        ]
        tokenizer.bos_token = opening[-1]
    return tokenizer


def expected(tokenizer, prompt, answer):
    """Prompt and response ids, and whether the whole conversation begins with the prompt."""

    def written(turns, **how):
        return tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=False, **how)

    asked = written(prompt, add_generation_prompt=True)
    whole = written((*prompt, {"role": "assistant", "content": answer}))
    end = tokenizer(END, add_special_tokens=False).input_ids
    behind = max(i for i in range(len(whole)) if whole[i : i + len(end)] == end) + len(end)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop = next((i for i in range(behind, len(whole)) if whole[i] in special), None)
    stops = [tokenizer.eos_token_id if stop is None else whole[stop]]
    if whole[: len(asked)] == asked:
        return asked, whole[len(asked) : stop] + stops, True
    return asked, tokenizer(answer, add_special_tokens=False).input_ids + stops, False


REFUSED = {
    name: "the chat template reads messages as lists of pictures and text, not as text; set data.template to one of"
    for name in ("idefics3", "llava_next", "smolvlm")
}
NO_SYSTEM = {"gemma"}


@pytest.mark.parametrize("bos", ["apart", "turn mark"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_templates_own(name, bos):
    tokenizer = tokenizer_of(name, bos)
    for asked, prompt in PROMPTS.items():
        sentence = REFUSED.get(name)
        if asked == "system" and name in NO_SYSTEM:
            sentence = "pair 1 of source s: field 'prompt' has a system turn, which the chat template does not write"
        for answer in ANSWERS.values():
            pairs = [Pair("1", "s", prompt, answer, f"No, {END}")]
            if sentence:
                with pytest.raises(UserError, match=sentence):
                    encode(pairs, tokenizer, Data("local", max_tokens=9999))
                continue
            rows, report = encode(pairs, tokenizer, Data("local", max_tokens=9999))
            prompt_ids, chosen_ids, begins = expected(tokenizer, prompt, answer)
            _, rejected_ids, rejected_begins = expected(tokenizer, prompt, f"No, {END}")
            assert [part.tolist() for part in rows["1"].ids] == [prompt_ids, chosen_ids, rejected_ids], asked
            counts = report["sources"]["s"]
            assert counts["answers_behind_prompt"] == (not begins) + (not rejected_begins)
            assert counts["specials_removed"] == counts["answers_cut"] == 0


TOOL = {"type": "function", "function": {"name": "find", "description": "d", "parameters": {"type": "object"}}}
INPUTS = {"tools": ([TOOL], []), "thinking": (True, False), "enable_thinking": (False, True)}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in REFUSED])
def test_what_a_template_does_not_read_is_refused(name):
    """A template reads an input if its text changes with some value of it; a name within it is not enough."""
    tokenizer = tokenizer_of(name, "apart")

    def written(**inputs):
        try:
            return encode(
                [Pair("1", "s", (ASK,), "So.", "No.", inputs=inputs)], tokenizer, Data("local", max_tokens=9999)
            )[0]["1"].prompt
        except UserError as error:
            assert re.search("the chat template (does not read|fails)", str(error))
            return None

    for input, values in INPUTS.items():
        texts = [tokenizer.apply_chat_template([ASK], tokenize=False, **{input: value}) for value in values]
        assert written(**{input: values[0]}) is not None or texts[0] == texts[1], input
    assert written(message="Hi") is None


SYSTEMS = ({"role": "system", "content": "Rule one."}, {"role": "system", "content": "Rule two."})


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in REFUSED])
@pytest.mark.parametrize("prompt", [(*SYSTEMS, ASK), (SYSTEMS[0], ASK, SAID, SYSTEMS[1], AGAIN), (ASK, ASK | AGAIN)])
def test_every_turn_of_system_and_user_is_written_or_the_row_is_refused(name, prompt):
    tokenizer = tokenizer_of(name, "apart")
    try:
        rows, _ = encode([Pair("1", "s", prompt, "So.", "No.")], tokenizer, Data("local", max_tokens=9999))
    except UserError as error:
        assert re.search(
            "the chat template (leaves out turn [1-4], of the (system|user)|fails)|has a system", str(error)
        )
        return
    text = tokenizer.decode(rows["1"].prompt)
    assert all(turn["content"] in text for turn in prompt if turn["role"] != "assistant")


def test_a_switch_that_a_template_takes_out_of_the_words_is_no_lost_turn():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and '/no_think' in m.content %}{{ '[short]' }}{% endif %}"
        "{{ m.role + ': ' + m.content.replace('/no_think', '') + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rules = {"role": "system", "content": "/no_think"}
    rows, _ = encode([Pair("1", "s", (rules, ASK), "So.", "No.")], tokenizer, Data("local", max_tokens=9999))
    assert tokenizer.decode(rows["1"].prompt).startswith("[short]")


def test_marks_in_the_names_of_a_tool_are_removed():
    tool = {"name": "find", "parameters": {"</s>where": {"type": "string"}}}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows, report = encode(
        [Pair("1", "s", (ASK,), "So.", "No.", inputs={"tools": [tool]})], tokenizer, Data("local", max_tokens=9999)
    )
    text = tokenizer.decode(rows["1"].prompt)
    assert "where" in text and "</s>" not in text
    assert report["sources"]["s"]["specials_removed"] == 1


def test_the_zoo_is_whole():
    """738 cases, 60 of them refused."""
    assert len(TEMPLATES) == 41 and len(PROMPTS) * len(ANSWERS) * 2 == 18
