"""Prompts: from files, whatever wrote them, and from pairs."""

import json

import pytest

from sdpo.data import prompts
from sdpo.data.preferences import Pair
from sdpo.errors import UserError


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    file = tmp_path / "asked.txt"
    file.write_bytes("\ufeffWhy?\r\n\r\nA page\x0cand\u2028a line.\r\n".encode())
    asked = [(prompt.id, prompt.turns) for prompt in prompts.read(str(file))]
    assert asked == [(1, ["Why?"]), (3, ["A page\x0cand\u2028a line."])]


@pytest.mark.parametrize("field", ["input", "system", "system_prompt", "tools", "chat_template_kwargs"])
def test_a_part_of_a_prompt_that_is_not_read_is_refused(tmp_path, field):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"instruction": "Translate.", field: "Good morning"}))
    with pytest.raises(UserError, match=f"row 1: the field '{field}' is not read"):
        prompts.read(str(file))
    file.write_text(json.dumps({"instruction": "Translate.", field: ""}))
    assert [prompt.turns for prompt in prompts.read(str(file))] == [["Translate."]]


def test_turns_that_are_written_as_text_are_turns(tmp_path):
    file = tmp_path / "asked.jsonl"
    talk = json.dumps([{"role": "user", "content": "Why?"}])
    file.write_text("\n".join(map(json.dumps, [{"turns": '["Why?", "And how?"]'}, {"prompt": talk}])))
    assert [prompt.turns for prompt in prompts.read(str(file))] == [["Why?", "And how?"], ["Why?"]]
    for bad in ({"prompt": talk.replace("user", "system")}, {"prompt": "\ud800"}, {"turns": "[Why?"}):
        file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="row 1: "):
            prompts.read(str(file))


def test_the_first_prompts_of_every_source_are_asked_as_they_were():
    turns = tuple({"role": role, "content": role[0]} for role in ("user", "assistant", "user"))
    last = {"role": "user", "content": "why?"}
    asked = [("a1", "a", (last,)), ("a2", "a", (last,)), ("b1", "b", (*turns[:2], last)), ("b2", "b", turns)]
    pairs = [Pair(id, source, prompt, "yes", "no") for id, source, prompt in asked]
    pairs.insert(0, Pair("a0", "a", (last,), "yes", "no", inputs={"tools": ["clock"]}))
    first = prompts.of_pairs(pairs, per_source=1)
    assert [(prompt.id, prompt.turns, prompt.dataset) for prompt in first] == [
        ("a1", ["why?"], "a"),
        ("b1", ["why?"], "b"),
    ]
    assert [prompt.opening() for prompt in first] == [(last,), (*turns[:2], last)]
    assert [prompt.id for prompt in prompts.of_pairs(pairs, per_source=None)] == ["a1", "a2", "b1", "b2"]
