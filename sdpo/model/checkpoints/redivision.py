"""Reads masters and moments that another number of ranks saved.

Under ZeRO 1 and 2 all trained weights form one flat vector; under ZeRO 3 each parameter is a flat vector. Each vector
is padded with zeros and cut into equal shares, one per rank. A rank's stream is the concatenation of its shares; the
tensors in its file are consecutive pieces of that stream.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import pad

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model.zero import Zero

Piece = tuple[Any, str]  # an open file, and the name of a tensor in it


def read(files: list[Path], engine: Zero) -> dict[str, torch.Tensor]:
    """This rank's tensors, named INDEX or INDEX/KIND by the index of their master in `engine.parts`.

    `files` are those of all ranks that wrote, in their order. Raises UserError for 8-bit moments, whose scales belong
    to blocks of numbers, and for settings with which DeepSpeed has the numbers in an order that depends on the ranks.
    """
    if engine.states == "8bit" or getattr(engine.zero, "round_robin_gradients", False):
        raise UserError(
            f"{files[0].parent} was saved by {len(files)} ranks; 8-bit moments, and numbers that round_robin_gradients "
            "has rearranged, cannot be divided anew: go on with as many ranks"
        )
    opened = [safe_open(path, "pt") for path in files]
    lengths = [part.numel() for part in engine.parts]
    found: dict[str, torch.Tensor] = {}
    for kind in sorted({name.partition("/")[2] for name in opened[0].keys()}):
        streams = [_stream(file, kind) for file in opened]
        first, name = streams[0][0]
        if not first.get_slice(name).get_shape():  # one number, such as the count of updates
            whole = [first.get_tensor(name)] * len(lengths)
        else:
            whole = list(_own_stream(streams, engine.numels, sum(lengths)).split(lengths))
        found |= {f"{index}/{kind}".removesuffix("/"): tensor for index, tensor in enumerate(whole)}
    return found


def _stream(file: Any, kind: str) -> list[Piece]:
    indices = sorted(int(name.partition("/")[0]) for name in file.keys() if name.partition("/")[2] == kind)
    return [(file, f"{index}/{kind}".removesuffix("/")) for index in indices]


def _own_stream(streams: list[list[Piece]], numels: list[int], length: int) -> torch.Tensor:
    """This rank's stream, of `length` numbers, from the streams of those that wrote. Only what it needs is read."""
    rank, at, shares = distributed.rank(), 0, []
    theirs = _sizes(numels, len(streams), sum(_length(piece) for piece in streams[0]))
    ours = _sizes(numels, distributed.world_size(), length)
    for numel, old, new in zip(numels, theirs, ours, strict=True):
        begin, end = min(rank * new, numel), min((rank + 1) * new, numel)
        cuts = range(begin // old, -(-end // old)) if begin < end else ()  # the writers that have some of it
        found = [_read(streams[r], at + max(begin - r * old, 0), at + min(end - r * old, old)) for r in cuts]
        shares.append(pad(torch.cat(found or [torch.empty(0)]), (0, new - (end - begin))))
        at += old
    return torch.cat(shares)


def _sizes(numels: list[int], ranks: int, length: int) -> list[int]:
    """The sizes of a rank's shares. DeepSpeed rounds up that of a single row, so only the stream's length tells it."""
    return [length] if len(numels) == 1 else [-(-numel // ranks) for numel in numels]


def _length(piece: Piece) -> int:
    file, name = piece
    return file.get_slice(name).get_shape()[0]


def _read(stream: list[Piece], begin: int, end: int) -> torch.Tensor:
    """The numbers from `begin` to before `end` of a stream."""
    found = []
    for piece in stream:
        length = _length(piece)
        if begin < length and end > 0:
            file, name = piece
            found.append(file.get_slice(name)[max(begin, 0) : min(end, length)])
        begin, end = begin - length, end - length
    return torch.cat(found)
