"""Pairs -> token ids: where a prompt ends, where a response stops, and what is too long."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdpo.config import Data
from sdpo.data.cells import BadRow
from sdpo.data.preferences import Pair
from sdpo.data.prompt_and_answer import ChatFormat, Texts
from sdpo.data.schemas import Turns
from sdpo.errors import UserError
from sdpo.types import TokenPair

Ids = list[int]

BATCH = 1000  # pairs tokenised at a time, because Python's lists of ids are large
COUNTS = (
    *("pairs", "kept", "long", "truncated", "dropped_long", "dropped_empty", "dropped_identical", "dropped_template"),
    *("boundary_mismatches", "specials_removed", "answers_behind_prompt", "answers_cut"),
    *("prompts_with_bos", "responses_with_stop"),
)
NOTES = {  # of what is worth saying to a person: the count, and what it counts
    "dropped_long": "pairs were left out, because they are longer than data.max_tokens (data.on_long=drop)",
    "dropped_template": "pairs were left out, because the chat template cannot write them (data.on_bad_row=skip)",
    "dropped_empty": "pairs were left out, because they have a part without tokens",
    "dropped_identical": "pairs were left out, because their responses are the same tokens",
    "truncated": "pairs were shortened to data.max_tokens",
    "answers_behind_prompt": (
        "answers follow their prompt directly, because the template begins the whole conversation in another way"
    ),
    "answers_cut": "answers are trained without what the chat template leaves out of them",
    "specials_removed": "special tokens were removed from the words of rows",
}
LENGTHS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")


def encode(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    settings: Data,
    side: str = "training",
    limit: str = "data.max_tokens",
) -> tuple[dict[str, TokenPair], dict[str, Any]]:
    """Token ids by pair id, in the order of `pairs` less the dropped ones, and a report of counts per source.

    Prompt ids are those of the prompt alone, the same for both responses. Response ids are what follows them in the
    tokens of prompt and response together, up to the stop token. If these do not begin with the prompt's ids (a
    boundary mismatch, which is counted), the response is tokenised alone. `max_tokens` bounds prompt + chosen and
    prompt + rejected. Truncation keeps the end of a prompt behind its BOS, or the beginning of a response, which
    then has no stop token: its text goes on. A pair is dropped and counted if a cut leaves nothing of a part, if the
    responses are equal, or with `on_bad_row="skip"` if the template cannot write it. `side` and
    `limit` are what error messages call the pairs and the option behind `max_tokens`.

    Raises UserError for a template that is missing or fails, for a pair that the template cannot write, for a pair over
    the limit if `on_long="error"`, and if nothing is left, also of one source of training pairs.
    """
    chat, max_tokens = ChatFormat(tokenizer, settings.template, settings.template_date), settings.max_tokens
    rows: dict[str, TokenPair] = {}
    long: dict[str, int] = {}  # what a pair over the limit is called -> its tokens
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for start in range(0, len(pairs), BATCH):
        written = list(_write(pairs[start : start + BATCH], chat, settings.on_bad_row, counts))
        for (pair, _), row in zip(written, _tokenise(written, chat, counts), strict=True):
            tally = counts[pair.source]
            kept: TokenPair | None = row
            if row.longest > max_tokens:
                tally["long"] += 1
                long[pair.called] = row.longest
                kept = _shorten(row, max_tokens, settings.on_long, num_bos=int(chat.bos in row.prompt[:1]))
                tally["truncated" if kept else "dropped_long"] += 1
            if kept and (flaw := _flaw(kept, demonstration=not pair.rejected)):
                tally[flaw] += 1
            elif kept:
                rows[pair.id] = kept
                _receipt(kept, chat, tally)
    whole = sum(counts.values(), Counter())
    if long and settings.on_long == "error":
        raise UserError(_explain_long(long, len(pairs), f"{limit}={max_tokens}"))
    if pairs and not rows:
        raise UserError(_explain_none_left(whole, f"{side} pair", f"{limit}={max_tokens}"))
    for source, tally in counts.items():
        if side == "training" and not tally["kept"]:  # a step may be missing without it
            raise UserError(_explain_none_left(tally, f"pair of source {source}", f"{limit}={max_tokens}"))
    report = {
        "template": settings.template or "tokenizer",
        "template_date": settings.template_date,
        "bos": tokenizer.bos_token,
        "stop": tokenizer.convert_ids_to_tokens(chat.stop),
        "max_tokens": max_tokens,
        "on_long": settings.on_long,
        "notes": [f"{whole[name]} {sentence}" for name, sentence in NOTES.items() if whole[name]] + _of_ending(chat),
        "sources": {source: _summary(tally) for source, tally in counts.items()},
    }
    return rows, report


def _of_ending(chat: ChatFormat) -> list[str]:
    if not chat.replaced_ending:
        return []
    stop = chat.tokenizer.convert_ids_to_tokens(chat.stop)
    return [
        f"the template ends answers with {chat.replaced_ending!r}, which is no token here: {stop} ends them instead"
    ]


def prompt_ids(chat: ChatFormat, conversations: list[Turns]) -> list[Ids]:
    """The ids of conversations in which the assistant is to speak next, as `encode` has a pair's prompt."""
    return [_with_bos(ids, chat) for ids in _ids(chat, [chat.prompt(turns) for turns in conversations])]


def response_lengths(rows: Iterable[TokenPair]) -> np.ndarray:
    """Tokens of the chosen and the rejected response: [N, 2]."""
    return np.array([(len(row.chosen), len(row.rejected)) for row in rows]).reshape(-1, 2)


def content_hash(rows: Iterable[TokenPair]) -> str:
    """The SHA-256 (hex) of the rows' ids, token ids and weights of tokens, in the order of the rows."""
    digest = hashlib.sha256()
    for row in rows:
        weights = [weights.astype("<f4").tobytes() for weights in row.weights or ()]
        for part in (row.id.encode(), *(ids.astype("<i4").tobytes() for ids in row.ids), *weights):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _write(
    pairs: list[Pair], chat: ChatFormat, on_bad_row: str, counts: dict[str, Counter[str]]
) -> Iterator[tuple[Pair, Texts]]:
    """The pairs that the template can write, with their texts."""
    for pair in pairs:
        tally = counts[pair.source]
        tally["pairs"] += 1
        try:
            texts = chat.texts(pair)
        except BadRow as bad:
            if on_bad_row == "error":
                raise UserError(f"{pair.called}: {bad}; repair it or set data.on_bad_row=skip") from bad
            tally[f"dropped_{bad.reason}"] += 1
        else:
            tally.update(texts.counts)
            yield pair, texts


def _tokenise(
    written: list[tuple[Pair, Texts]], chat: ChatFormat, counts: dict[str, Counter[str]]
) -> Iterator[TokenPair]:
    texts = [texts for _, texts in written]
    prompts = _ids(chat, [text.prompt for text in texts])
    chosen = _responses(chat, prompts, [(text.prompt, text.chosen) for text in texts])
    rejected = _responses(chat, prompts, [(text.prompt, text.rejected) for text in texts])
    for (pair, _), prompt, *responses in zip(written, prompts, chosen, rejected, strict=True):
        counts[pair.source]["boundary_mismatches"] += sum(mismatch for _, mismatch in responses)
        row = _with_bos(prompt, chat), *(ids for ids, _ in responses)
        yield TokenPair(pair.id, *(np.array(ids, dtype=np.int32) for ids in row))


def _ids(chat: ChatFormat, texts: list[str]) -> list[Ids]:
    if not texts:
        return []
    return chat.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def _responses(chat: ChatFormat, prompts: list[Ids], texts: list[tuple[str, str]]) -> list[tuple[Ids, bool]]:
    """Each response's ids with the stop token, and whether prompt and response tokenise differently together."""
    ended = [(prompt, response and response + chat.stop_text) for prompt, response in texts]
    joint = _ids(chat, [prompt + response for prompt, response in ended])
    mismatch = [ids[: len(prompt)] != prompt for prompt, ids in zip(prompts, joint, strict=True)]
    alone = iter(_ids(chat, [response for (_, response), differs in zip(ended, mismatch, strict=True) if differs]))
    found = [
        next(alone) if differs else ids[len(prompt) :]
        for prompt, ids, differs in zip(prompts, joint, mismatch, strict=True)
    ]
    # If the template does not write the stop token, it stands in no text.
    stop = [] if chat.stop_text else [chat.stop]
    return [(ids and [*ids, *stop], differs) for ids, differs in zip(found, mismatch, strict=True)]


def _with_bos(prompt: Ids, chat: ChatFormat) -> Ids:
    """The prompt, with BOS first if the tokenizer adds it to a named template."""
    return [chat.bos, *prompt] if chat.adds_bos and prompt[:1] != [chat.bos] else prompt


def _explain_none_left(counts: Counter[str], what: str, limit: str) -> str:
    reasons = [f"{n} {name.removeprefix('dropped_')}" for name, n in counts.items() if n and name.startswith("dropped")]
    advice = f"raise {limit}" if counts["dropped_long"] else "repair the rows, or set data.template"
    return f"no {what} of {counts['pairs']} is left after tokenisation ({', '.join(reasons)}); {advice}"


def _explain_long(lengths: dict[str, int], num_pairs: int, limit: str) -> str:
    first, length = next(iter(lengths.items()))
    shorter = " or set data.on_long to one of drop, truncate_prompt, truncate_response"
    return (
        f"{first} has {length} tokens, more than {limit} (too long: {len(lengths)} of {num_pairs} pairs, the "
        f"longest of {max(lengths.values())} tokens); raise it{shorter if limit.startswith('data.') else ''}"
    )


def _shorten(row: TokenPair, max_tokens: int, on_long: str, *, num_bos: int) -> TokenPair | None:
    """The row cut to the limit; None if it is to be dropped, or if nothing of a prompt or response would be left."""
    room = max_tokens - max(len(row.chosen), len(row.rejected)) - num_bos
    if on_long == "truncate_prompt" and room > 0:
        return row._replace(prompt=np.concatenate([row.prompt[:num_bos], row.prompt[-room:]]))
    room = max_tokens - len(row.prompt)
    if on_long == "truncate_response" and room > 0:
        return row._replace(chosen=row.chosen[:room], rejected=row.rejected[:room])
    return None


def _flaw(row: TokenPair, demonstration: bool) -> str | None:
    """Why the ids make no pair, if they do not: a part is empty, or a cut made the responses equal."""
    parts = (row.prompt, row.chosen) if demonstration else row.ids
    if not all(map(len, parts)):
        return "dropped_empty"
    return "dropped_identical" if np.array_equal(row.chosen, row.rejected) else None


def _receipt(row: TokenPair, chat: ChatFormat, tally: Counter[str]) -> None:
    tally["kept"] += 1
    tally["prompts_with_bos"] += bool(chat.bos in row.prompt[:1])
    tally["responses_with_stop"] += sum(int(ids[-1]) == chat.stop for ids in (row.chosen, row.rejected) if len(ids))
    tally.update({name: len(ids) for name, ids in zip(LENGTHS, row.ids, strict=True)})


def _summary(tally: Counter[str]) -> dict[str, float]:
    """The counts of a source, and mean lengths in tokens over the pairs that were kept."""
    means = {name: tally[name] / tally["kept"] for name in LENGTHS if tally["kept"]}
    return {name: tally[name] for name in COUNTS} | means
