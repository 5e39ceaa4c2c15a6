"""Pairs -> token ids: where a prompt ends, where a response stops, and what is too long."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdpo.data.preferences import Pair
from sdpo.data.schemas import Turns
from sdpo.data.templates import ChatFormat
from sdpo.errors import UserError
from sdpo.types import TokenPair

Ids = list[int]

ON_LONG = ("error", "drop", "truncate_prompt", "truncate_response")
BATCH = 1000  # pairs tokenised at a time, because Python's lists of ids are large
COUNTS = (
    *("pairs", "kept", "long", "truncated", "dropped_long", "dropped_empty", "dropped_identical"),
    *("boundary_mismatches", "specials_removed", "prompts_with_bos", "responses_with_stop"),
)
LENGTHS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")


def encode(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    max_tokens: int,
    on_long: str,
) -> tuple[dict[str, TokenPair], dict[str, Any]]:
    """Token ids by pair id, in the order of `pairs` less the dropped ones, and a report of counts per source.

    Prompt ids are the prompt tokenised alone, the same for both responses. Response ids are what follows them in
    the joint tokenisation; where that does not begin with the prompt's ids (a boundary mismatch, which is counted)
    they are the response tokenised alone. `max_tokens` bounds prompt + chosen and prompt + rejected. Truncation
    keeps the end of a prompt behind its BOS, or the beginning of a response, which then has no stop token: its
    text goes on. A pair with nothing left of a prompt or response, or with equal responses, is dropped and counted.

    Raises UserError for a template that is missing or fails, and for a pair over the limit if `on_long="error"`.
    """
    if on_long not in ON_LONG:
        raise UserError(f"data.on_long={on_long} is none of {', '.join(ON_LONG)}")
    chat = ChatFormat(tokenizer, template)
    rows: dict[str, TokenPair] = {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        for pair, row in zip(batch, _tokenise(batch, chat, counts), strict=True):
            tally = counts[pair.source]
            if _num_tokens(row) > max_tokens:
                tally["long"] += 1
                row = _shorten(row, max_tokens, on_long, num_bos=int(chat.bos in row.prompt[:1]))
                tally["truncated" if row else "dropped_long"] += 1
            if row and (flaw := _flaw(row, demonstration=not pair.rejected)):
                tally[flaw] += 1
            elif row:
                rows[pair.id] = row
                _receipt(row, chat, tally)
    if pairs and not rows:
        raise UserError(f"no pair is left after tokenisation; raise data.max_tokens={max_tokens}")
    report = {
        "template": template or "tokenizer",
        "bos": tokenizer.bos_token,
        "stop": tokenizer.convert_ids_to_tokens(chat.stop),
        "max_tokens": max_tokens,
        "on_long": on_long,
        "sources": {source: _summary(tally) for source, tally in counts.items()},
    }
    return rows, report


def prompt_ids(chat: ChatFormat, conversations: list[Turns]) -> list[Ids]:
    """The ids of conversations in which the assistant is to speak next, as `encode` has a pair's prompt."""
    texts = [chat.prompt(turns) for turns in conversations]
    return [_with_bos(ids, chat, Counter()) for ids in _ids(chat, texts)]


def response_lengths(rows: Iterable[TokenPair]) -> np.ndarray:
    """Tokens of the chosen and the rejected response: [N, 2]."""
    return np.array([(len(row.chosen), len(row.rejected)) for row in rows]).reshape(-1, 2)


def content_hash(rows: Iterable[TokenPair]) -> str:
    """SHA-256 (hex) of ids and token ids; the order of the rows matters."""
    digest = hashlib.sha256()
    for row in rows:
        for part in (row.id.encode(), *(ids.astype("<i4").tobytes() for ids in row[1:])):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _tokenise(pairs: list[Pair], chat: ChatFormat, counts: dict[str, Counter[str]]) -> Iterator[TokenPair]:
    texts = [chat.texts(pair) for pair in pairs]
    prompts = _ids(chat, [text.prompt for text in texts])
    chosen = _responses(chat, prompts, [(text.prompt, text.chosen) for text in texts])
    rejected = _responses(chat, prompts, [(text.prompt, text.rejected) for text in texts])
    for pair, prompt, *responses in zip(pairs, prompts, chosen, rejected, strict=True):
        tally = counts[pair.source]
        tally["pairs"] += 1
        tally["boundary_mismatches"] += sum(mismatch for _, mismatch in responses)
        row = _with_bos(prompt, chat, tally), *(_with_stop(ids, chat, tally) for ids, _ in responses)
        yield TokenPair(pair.id, *(np.array(ids, dtype=np.int32) for ids in row))


def _ids(chat: ChatFormat, texts: list[str]) -> list[Ids]:
    if not texts:
        return []
    return chat.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def _responses(chat: ChatFormat, prompts: list[Ids], texts: list[tuple[str, str]]) -> list[tuple[Ids, bool]]:
    """Each response's ids, and whether prompt and response tokenise differently together."""
    joint = _ids(chat, [prompt + response for prompt, response in texts])
    mismatch = [ids[: len(prompt)] != prompt for prompt, ids in zip(prompts, joint, strict=True)]
    alone = iter(_ids(chat, [texts[i][1] for i, differs in enumerate(mismatch) if differs]))
    return [
        (next(alone), True) if differs else (ids[len(prompt) :], False)
        for prompt, ids, differs in zip(prompts, joint, mismatch, strict=True)
    ]


def _with_bos(prompt: Ids, chat: ChatFormat, tally: Counter[str]) -> Ids:
    """The prompt with BOS first, where there is one, and nowhere else (unless BOS also ends turns, as GPT-2's)."""
    if chat.adds_bos and prompt[:1] != [chat.bos]:
        prompt = [chat.bos, *prompt]
    strays = {chat.bos} - {chat.stop, chat.tokenizer.eos_token_id}
    return prompt[:1] + _without(prompt[1:], strays, tally)


def _with_stop(response: Ids, chat: ChatFormat, tally: Counter[str]) -> Ids:
    """The response with one stop token, at its end; one that says nothing stays, or becomes, empty."""
    response = _without(response, {chat.bos, chat.stop, chat.tokenizer.eos_token_id}, tally)
    return response and [*response, chat.stop]


def _without(ids: Ids, strays: set[int | None], tally: Counter[str]) -> Ids:
    if strays.isdisjoint(ids):
        return ids
    kept = [id for id in ids if id not in strays]
    tally["specials_removed"] += len(ids) - len(kept)
    return kept


def _num_tokens(row: TokenPair) -> int:
    return len(row.prompt) + max(len(row.chosen), len(row.rejected))


def _shorten(row: TokenPair, max_tokens: int, on_long: str, *, num_bos: int) -> TokenPair | None:
    """The row within the limit; None where it is to be dropped, or nothing of a prompt or response would be left."""
    if on_long == "error":
        raise UserError(
            f"pair {row.id} has {_num_tokens(row)} tokens, more than data.max_tokens={max_tokens}; "
            f"raise it or set data.on_long to one of {', '.join(ON_LONG[1:])}"
        )
    room = max_tokens - max(len(row.chosen), len(row.rejected)) - num_bos
    if on_long == "truncate_prompt" and room > 0:
        return row._replace(prompt=np.concatenate([row.prompt[:num_bos], row.prompt[-room:]]))
    room = max_tokens - len(row.prompt)
    if on_long == "truncate_response" and room > 0:
        return row._replace(chosen=row.chosen[:room], rejected=row.rejected[:room])
    return None


def _flaw(row: TokenPair, demonstration: bool) -> str | None:
    """Why the ids make no pair, which only tokens can show: special tokens were all there was, or a cut made it so."""
    parts = (row.prompt, row.chosen) if demonstration else row[1:]
    if not all(map(len, parts)):
        return "dropped_empty"
    return "dropped_identical" if np.array_equal(row.chosen, row.rejected) else None


def _receipt(row: TokenPair, chat: ChatFormat, tally: Counter[str]) -> None:
    tally["kept"] += 1
    tally["prompts_with_bos"] += bool(chat.bos in row.prompt[:1])
    tally["responses_with_stop"] += sum(int(ids[-1]) == chat.stop for ids in (row.chosen, row.rejected) if len(ids))
    tally.update({name: len(ids) for name, ids in zip(LENGTHS, row[1:], strict=True)})


def _summary(tally: Counter[str]) -> dict[str, float]:
    """The counts of a source, and mean lengths in tokens over the pairs that were kept."""
    means = {name: tally[name] / tally["kept"] for name in LENGTHS if tally["kept"]}
    return {name: tally[name] for name in COUNTS} | means
