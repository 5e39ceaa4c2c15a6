"""Every layout gives the same pair; every flaw is named with its field."""

import json

import pytest

from sdpo.data.cells import BadRow
from sdpo.data.schemas import normalise, rename

ASK = {"role": "user", "content": "Why is the sky blue?"}
RULES = {"role": "system", "content": "Be brief."}
GOOD, BAD = "Air scatters blue light.", "Because of the sea."


def said(text):
    return {"role": "assistant", "content": text}


LAYOUTS = {
    "messages": {"messages": [RULES, ASK], "chosen": GOOD, "rejected": BAD},
    "plain": {"system": "Be brief.", "prompt": ASK["content"], "chosen": GOOD, "rejected": BAD},
    "plain ": {"prompt": [RULES, ASK], "chosen": GOOD, "rejected": BAD},
    "orca": {"system": "Be brief.", "question": ASK["content"], "chosen": GOOD, "rejected": BAD},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": ASK["content"]}],
        "chosen": GOOD,
        "rejected": BAD,
    },
    "conversation": {"chosen": [RULES, ASK, said(GOOD)], "rejected": [RULES, ASK, said(BAD)]},
    "conversation ": {"prompt": [RULES, ASK], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "conversation  ": {  # UltraFeedback repeats the prompt as text, and `messages` is the chosen side
        "prompt": ASK["content"],
        "messages": [RULES, ASK, said(GOOD)],
        "chosen": [RULES, ASK, said(GOOD)],
        "rejected": [RULES, ASK, said(BAD)],
    },
    "conversation   ": {
        "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": ASK["content"]}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "openai": {
        "input": {"messages": [RULES, ASK], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [said(GOOD)],
        "non_preferred_output": [said(BAD)],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout):
    normal = normalise({**LAYOUTS[layout], "an extra column": None})
    assert normal[:-1] == (layout.strip(), (RULES, ASK), GOOD, BAD, None, None, {}, None)


def test_transcripts_part_at_the_last_answer():
    before = "\n\nHuman: Hello\n\nAssistant: Hello!\nHow are you?\n\nHuman: Fine"
    normal = normalise({"chosen": f"{before}\n\nAssistant: Good.", "rejected": f"{before}\n\nAssistant: Oh.\n\nNo."})
    turns = ({"role": "user", "content": "Hello"}, said("Hello!\nHow are you?"), {"role": "user", "content": "Fine"})
    assert normal[:4] == ("transcript", turns, "Good.", "Oh.\n\nNo.")


def test_a_prompt_column_of_a_transcript_is_turns():
    before = "\n\nHuman: Hello\n\nAssistant: Hello!\n\nHuman: Fine?"
    turns = ({"role": "user", "content": "Hello"}, said("Hello!"), {"role": "user", "content": "Fine?"})
    for prompt in (f"{before}\n\nAssistant:", f"{before.strip()}\n\nAssistant: ", before):
        answers = {"chosen": " Good.", "rejected": "Oh.\n\nNo."}
        whole = {side: f"{before}\n\nAssistant: {answer.strip()}" for side, answer in answers.items()}
        for row in (answers, whole, {side: text.strip() for side, text in whole.items()}):
            assert normalise({"prompt": prompt, **row})[:4] == ("transcript", turns, "Good.", "Oh.\n\nNo.")


def test_transcripts_beside_a_prompt_in_words_and_with_other_line_ends():
    asked, good, bad = ({"role": "user", "content": "Fine?"},), "\n\nAssistant: Good.", "\n\nAssistant: Oh.\n\nNo."
    rows = [
        {"prompt": "Fine?", "chosen": f"\n\nHuman: Fine?{good}", "rejected": f"Human: Fine?{bad}"},
        {"prompt": "\n\nHuman: Fine?", "chosen": good, "rejected": bad},
    ]
    rows += [{column: text.replace("\n", "\r\n") for column, text in row.items()} for row in rows]
    for row in rows:
        assert normalise(row)[:4] == ("transcript", asked, "Good.", "Oh.\n\nNo.") and not normalise(row).unread
    lines = {"prompt": "Human: a\r\nb", "chosen": "c\r\nd", "rejected": "e"}  # no transcript: its lines stay
    assert normalise(lines).prompt[0]["content"] == lines["prompt"] and normalise(lines).chosen == lines["chosen"]


def test_keys_of_a_turn_that_nothing_reads_are_named():
    kept = {**said(GOOD), "weight": 1, "model": "", "value": None}
    assert normalise(TALK | {"chosen": [RULES, ASK, kept]}).unread == {"chosen[].weight"}
    asked = {"messages": [RULES, ASK | {"time": 3}]}
    assert normalise({**LAYOUTS["openai"], "input": asked}).unread == {"input[].time"}


def test_null_keys_of_another_layout_are_no_turns():
    turns = [{"from": "human", "value": ASK["content"], "role": None, "content": None}]
    assert normalise({**LAYOUTS["sharegpt"], "system": "", "conversations": turns}).prompt == (ASK,)


def test_answers_that_repeat_the_prompt():
    row = {"prompt": ASK["content"], "chosen": f"{ASK['content']} {GOOD}", "rejected": f"{ASK['content']}\n\n{BAD}"}
    assert normalise(row)[:4] == ("plain, prompt repeated", (ASK,), GOOD, BAD)
    assert normalise(row | {"rejected": BAD}).chosen == row["chosen"]  # not both
    short = {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi"}
    assert normalise(short)[2:4] == ("Hi there!", "Hi")  # by chance


@pytest.mark.parametrize("layout", ["messages", "plain ", "conversation", "conversation ", "sharegpt", "openai"])
@pytest.mark.parametrize("write", [json.dumps, repr])
def test_conversations_written_as_text_are_read(layout, write):
    row = {column: value if isinstance(value, str) else write(value) for column, value in LAYOUTS[layout].items()}
    assert normalise(row) == normalise(LAYOUTS[layout])


def test_conversations_written_as_text_may_begin_with_another_key():
    row = LAYOUTS["conversation "]
    heavy = {column: json.dumps([{"weight": 1, **turn} for turn in turns]) for column, turns in row.items()}
    told = {column: [{"weight": 1, **turn} for turn in turns] for column, turns in row.items()}
    assert normalise(heavy)[1:4] == normalise(told)[1:4] == ((RULES, ASK), GOOD, BAD)
    asked = '{"rows": 3, "from": "a"} What is this?'  # text that begins so, but is no value as a whole
    assert normalise(PLAIN | {"prompt": asked}).prompt[-1]["content"] == asked


def test_an_answer_about_a_conversation_is_text():
    answer = json.dumps([said(GOOD)])
    assert normalise(PLAIN | {"chosen": answer}).chosen == answer


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def test_what_the_template_reads_beside_the_turns():
    settings = {"enable_thinking": False, "python_tools": [], "effort": None}
    for tools, given in (([TOOL], settings), (json.dumps([TOOL]), json.dumps(settings))):
        row = PLAIN | {"tools": tools, "chat_template_kwargs": given}
        assert normalise(row).inputs == {"tools": [TOOL], "enable_thinking": False}
    assert normalise({**LAYOUTS["openai"], "input": {"messages": [ASK], "tools": [TOOL]}}).inputs == {"tools": [TOOL]}


def test_a_system_column_that_says_what_the_conversation_says():
    assert normalise(TALK | {"system": "Be brief.\n"}).prompt == (RULES, ASK)


@pytest.mark.parametrize("columns", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_ratings(columns):
    row = LAYOUTS["plain"] | dict(zip(columns, [4.5, "3"], strict=True))
    assert normalise(row)[4:6] == (4.5, 3.0)


def test_a_pair_score_is_a_number_or_text_of_one():
    assert [normalise(PLAIN | {"pair_score": given}).pair_score for given in (0, "-2.5", "", None)] == [
        0,
        -2.5,
        None,
        None,
    ]


def test_an_empty_system_text_is_no_turn():
    assert normalise(LAYOUTS["orca"] | {"system": ""}).prompt == (ASK,)
    assert normalise({**LAYOUTS["messages"], "messages": [{**RULES, "content": ""}, ASK]}).prompt == (ASK,)


def test_text_is_left_as_it_is():
    assert normalise(LAYOUTS["plain"] | {"chosen": " padded\n"}).chosen == " padded\n"


REASONED, UNREADABLE = "rejected[2].reasoning_content", ("bad_conversation", "messages")
PLAIN, TALK = LAYOUTS["plain"], LAYOUTS["conversation"]
FLAWS = [
    (PLAIN | {"rejected": None}, "missing_column", "rejected"),
    ({"question": "Why?", "chosen": "a"}, "missing_column", "rejected"),
    ({"chosen": "a", "rejected": "b"}, "missing_column", "prompt"),
    ({"chosen": [said("a")], "rejected": [said("b")]}, "missing_column", "prompt"),
    (PLAIN | {"prompt": " \n"}, "empty", "prompt"),
    (PLAIN | {"chosen": ""}, "empty", "chosen"),
    (PLAIN | {"chosen": 5}, "not_text", "chosen"),
    (PLAIN | {"rejected": ["b"]}, "not_text", "rejected"),
    (PLAIN | {"chosen": "\udcff"}, "invalid_utf8", "chosen"),
    (PLAIN | {"rejected": GOOD}, "identical", "rejected"),
    (PLAIN | {"score_chosen": "high"}, "bad_rating", "score_chosen"),
    (PLAIN | {"pair_score": "hard"}, "bad_rating", "pair_score"),
    (PLAIN | {"chosen_rating": float("nan")}, "bad_rating", "chosen_rating"),
    (PLAIN | {"prompt": []}, "empty", "prompt"),
    (PLAIN | {"prompt": [ASK, said("So.")]}, "bad_conversation", "prompt"),
    ({**LAYOUTS["messages"], "messages": [{"role": "user", "content": 3}]}, "not_text", "messages[0].content"),
    ({**LAYOUTS["messages"], "messages": [{"role": "user"}]}, "missing_column", "messages[0].content"),
    ({**LAYOUTS["messages"], "messages": [{"role": "judge", "content": "?"}]}, "bad_conversation", "messages"),
    ({**LAYOUTS["messages"], "messages": ["Why?"]}, "bad_conversation", "messages"),
    (TALK | {"rejected": [ASK, said(BAD)]}, "prompt_mismatch", "rejected"),
    (TALK | {"prompt": [ASK]}, "prompt_mismatch", "chosen"),
    (TALK | {"rejected": BAD}, "bad_conversation", "rejected"),
    ({"chosen": [RULES, ASK], "rejected": [RULES, ASK]}, "bad_conversation", "chosen"),
    ({**LAYOUTS["openai"], "input": {"messages": [ASK], "tools": ["find"]}}, "tools", "tools"),
    (PLAIN | {"tools": "[{"}, "tools", "tools"),
    (PLAIN | {"tools": {"name": "find"}}, "tools", "tools"),
    (PLAIN | {"chat_template_kwargs": [1]}, "chat_template_kwargs", "chat_template_kwargs"),
    (PLAIN | {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "chat_template_kwargs"),
    (PLAIN | {"tools": [{"name": "\ud800"}]}, "invalid_utf8", "tools"),
    (PLAIN | {"images": ["cat.png"]}, "images", "images"),
    (TALK | {"chosen": [RULES | {"functions": "[]"}, ASK, said(GOOD)]}, "functions", "chosen[0].functions"),
    (PLAIN | {"prompt": [ASK | {"name": "Ann"}]}, "name", "prompt[0].name"),
    (TALK | {"chosen": [RULES, ASK, {**said(GOOD), "tool_calls": [{}]}]}, "tool_calls", "chosen[2].tool_calls"),
    (TALK | {"rejected": [RULES, ASK, {**said(BAD), "reasoning_content": "Hm."}]}, "reasoning_content", REASONED),
    (TALK | {"system": "Be long."}, "two_systems", "system"),
    ({"chosen": "[{'role': 'user'", "rejected": '[{"role": "user"'}, "bad_conversation", "chosen"),
    (
        {"messages": "[{'role': 'user', 'content': 'a'}\n {'role': 'user'}]", "chosen": "a", "rejected": "b"},
        *UNREADABLE,
    ),
    ({**LAYOUTS["openai"], "input": "Why?"}, "missing_column", "input"),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "prompt_mismatch",
        "rejected",
    ),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "d"}, "bad_conversation", "chosen"),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "empty", "chosen"),
    ({"chosen": "a\n\nAssistant: b", "rejected": "a\n\nAssistant: c"}, "bad_conversation", "chosen"),
]


@pytest.mark.parametrize(("row", "reason", "field"), FLAWS)
def test_flaws_are_named(row, reason, field):
    with pytest.raises(BadRow) as bad:
        normalise(row)
    assert (bad.value.reason, bad.value.field) == (reason, field)


def test_columns_are_renamed_and_others_are_not_read():
    row = {"ask": "Why?", "good": "a", "bad": "b", "messages": "something else"}
    assert rename(row, {"prompt": "ask", "chosen": "good", "rejected": "bad"}) == {
        "prompt": "Why?",
        "chosen": "a",
        "rejected": "b",
    }
    with pytest.raises(BadRow, match="field 'worse' does not exist; the row has ask, good, bad, messages"):
        rename(row, {"rejected": "worse"})
