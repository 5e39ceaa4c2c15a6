"""The limit of tokens: it never empties a prompt or a response."""

import pytest
from test_tokenize import one, pair, tokens

from sdpo.errors import UserError

LONG = {"rejected": "Not at all"}


def test_limit_is_inclusive(tokenizer):
    assert len(one(tokenizer, max_tokens=15, **LONG)[2]) == 11
    with pytest.raises(
        UserError, match=r"pair 1 of .* has 15 tokens, more .*=14 \(too long: 1 of 1 pairs.*data.on_long"
    ):
        one(tokenizer, max_tokens=14, **LONG)


def test_a_pair_that_is_too_long_is_an_error_even_if_its_responses_are_the_same(tokenizer):
    with pytest.raises(UserError, match=r"pair 1 of source s has 15 tokens, more .*\(too long: 1 of 1 pairs"):
        one(tokenizer, max_tokens=14, chosen="Not at all", **LONG)


def test_drop(tokenizer):
    pairs = [pair("1"), pair("2", source="t"), pair("3", source="t", **LONG)]
    rows, report = tokens(pairs, tokenizer, max_tokens=14, on_long="drop")
    assert list(rows) == ["1", "2"]
    counts = report["sources"]["t"]
    assert (counts["pairs"], counts["kept"], counts["long"], counts["dropped_long"]) == (2, 1, 1, 1)


def test_no_pair_is_short_enough(tokenizer):
    with pytest.raises(UserError, match=r"no held-out pair of 2 is left .* \(2 long\); raise data.max_tokens=3"):
        tokens([pair("1"), pair("2")], tokenizer, max_tokens=3, on_long="drop", side="held-out")


def test_a_source_that_would_vanish_is_named(tokenizer):
    pairs = [pair("1"), pair("2", source="t", **LONG)]
    with pytest.raises(UserError, match=r"no pair of source t of 1 is left .* \(1 long\); raise data.max_tokens=14"):
        tokens(pairs, tokenizer, max_tokens=14, on_long="drop")


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
