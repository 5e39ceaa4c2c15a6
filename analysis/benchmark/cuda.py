"""What only a GPU shows: speed, utilisation and memory at real sizes; attention alone; the head alone."""

import gc
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

from analysis.benchmark.ours import configure, open_side, take_update
from analysis.benchmark.work import SHAPES, Work, shape
from sdpo.model.attention.interface import BACKENDS, Rule
from sdpo.model.engine import Engine
from sdpo.model.head import Head
from sdpo.model.logprobs import score
from sdpo.model.memory import ran_out
from sdpo.model.packing import Pack, micro_batches, pack, tokens_of
from sdpo.train import throughput

SECONDS = 2.0  # for which a call is repeated


def sweep(work: Work, report: Callable[[dict], None]) -> None:
    """The reference pass and one update of all pairs, with every size of packs, compiled and not."""
    measured = []
    for compiled in work.compiled:
        engine = open_side(work, configure(work._replace(compiled=[compiled])))
        for tokens_per_pack in work.packs:
            row = {"tokens_per_pack": tokens_per_pack, "compile": compiled}
            measured.append(row | _train_if_it_fits(engine, work, tokens_per_pack))
            report({"rows": measured})
            if "failed" in measured[-1]:  # larger packs will not fit, and the engine holds parts of an update
                break
        engine.close()
        del engine
        gc.collect()  # before the next engine takes its place


def attention(work: Work, report: Callable[[dict], None]) -> None:
    """Seconds and share of the peak of attention in one layer of the 7B shape, forward and backward, by backend."""
    rows, peak = work.rows(), throughput.peak(torch.device(work.device))
    members = micro_batches(rows, work.packs[0])[0][0]
    packed = pack([rows[i] for i in members]).to("cuda")
    _, hidden, _, _, heads, kv_heads = SHAPES["7b"]
    dim = hidden // heads
    inputs = [
        torch.randn(len(packed.tokens_T), h, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    visible = sum(own * (2 * length - own + 1) / 2 for own, length in zip(packed.own_S, packed.lengths_S, strict=True))
    flops = 3.5 * 4 * heads * dim * visible  # backward counts as 2.5 forwards
    measured = []
    for name, backend in BACKENDS.items():
        seconds = _seconds_of_backend(backend, packed, inputs)
        share = flops / seconds / peak if peak else None
        measured.append({"backend": name, "seconds": seconds, "share_of_peak": share})
        report({"rows": measured})


def head(work: Work, report: Callable[[dict], None]) -> None:
    """Seconds of the head of the 3B shape, forward and backward, and the share that its three matrix products need."""
    config = shape("3b")
    config.num_hidden_layers = 1
    with torch.device("cuda"):
        module = Head(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    rows = work.rows()
    num_rows = len(pack(rows[: len(rows) // 4]).rows_R)
    hidden_RH = torch.randn(num_rows, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets_R = torch.randint(3, config.vocab_size, (num_rows,), device="cuda")

    def products() -> None:
        slope_RV = hidden_RH.detach() @ module.weight.detach().T
        slope_RV @ module.weight.detach()
        slope_RV.T @ hidden_RH.detach()

    whole = _seconds(lambda: module(hidden_RH, targets_R).sum().backward())
    report({"rows": [{"seconds": whole, "share_of_products": _seconds(products) / whole}]})


def _train_if_it_fits(engine: Engine, work: Work, tokens_per_pack: int) -> dict:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return _train(engine, work, tokens_per_pack)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return {"failed": "out of memory"}


def _train(engine: Engine, work: Work, tokens_per_pack: int) -> dict:
    rows = work.rows()
    model = engine.scorer.model
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    num_weights -= cast(nn.Embedding, model.get_input_embeddings()).weight.numel()
    began = time.monotonic()
    score(engine.scorer, rows, tokens_per_pack)
    take_update(engine, rows, tokens_per_pack)
    torch.cuda.synchronize()
    first_seconds = time.monotonic() - began
    reference_seconds = _seconds(lambda: score(engine.scorer, rows, tokens_per_pack))
    update_seconds = _seconds(lambda: take_update(engine, rows, tokens_per_pack))
    tokens, seconds = sum(map(tokens_of, rows)), reference_seconds + update_seconds
    per_weight = 6 if work.lora else 8  # 2 forward passes: 4; backward: 2 if frozen, else 4
    peak = throughput.peak(torch.device(work.device))
    return {
        "first_seconds": first_seconds,
        "reference_seconds": reference_seconds,
        "update_seconds": update_seconds,
        "tokens_per_second": tokens / seconds,
        "utilisation": per_weight * num_weights * tokens / seconds / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _seconds(function: Callable[[], object]) -> float:
    """Median wall seconds of a call, after calls that compile and allocate."""
    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=SECONDS).median


def _seconds_of_backend(backend: Callable, packed: Pack, inputs: list[torch.Tensor]) -> float:
    attend, rule = backend(packed), Rule(None, None, None, None, 0.0)
    return _seconds(lambda: attend(*inputs, rule).sum().backward())
