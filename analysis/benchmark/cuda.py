"""The part of the benchmark that needs a GPU: speed, utilisation and memory at real sizes; attention; the head."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import LlamaForCausalLM

from analysis.benchmark.work import SHAPES, from_profile, shape
from sdpo.config import Deepspeed, Optim
from sdpo.console import number
from sdpo.model.attention.interface import BACKENDS, Rule
from sdpo.model.engine import Engine, open_engine
from sdpo.model.logprobs import Head, Scorer, score
from sdpo.model.packing import Pack, micro_batches, pack, tokens_of
from sdpo.train import throughput
from sdpo.types import ChosenRejected, TokenPair
from sdpo.variants import loss as losses

SIZES = ("1b", "3b", "7b")
ADAPTED = ("7b",)  # trained with LoRA: masters and moments of all weights would leave no room for activations
TOKENS_PER_PACK, NUM_PAIRS = 8192, 64


def measure(device: str) -> dict:
    """All measurements, on a GPU; without one only the names of what was not measured."""
    if device != "cuda":
        parts = [f"{size}: tokens/s, utilisation, peak memory" for size in SIZES]
        return {"not_measured": [*parts, "attention alone", "head alone"]}
    name = torch.cuda.get_device_name()
    peak = throughput.peak(torch.device(device))
    rows = _rows()
    result: dict[str, Any] = {"device": name, "peak_flops": peak}
    result |= {size: _train(size, rows, peak) for size in SIZES}
    return result | {"attention": _attention(rows, peak), "head": _head(rows)}


def lines(result: dict) -> list[str]:
    """The result as text, one line per measurement."""
    if "not_measured" in result:
        return [f"not measured, because there is no GPU: {'; '.join(result['not_measured'])}"]
    measured = {name: values for name, values in result.items() if isinstance(values, dict)}
    return [
        f"{result['device']}, {name}: " + ", ".join(f"{key} {number(value)}" for key, value in values.items())
        for name, values in measured.items()
    ]


def _rows() -> list[TokenPair]:
    rng = torch.Generator().manual_seed(0)
    lengths = from_profile("ultrafeedback", NUM_PAIRS).tolist()
    return [
        TokenPair(f"{i:05d}", *(torch.randint(3, 8192, (n,), generator=rng).int().numpy() for n in three))
        for i, three in enumerate(lengths)
    ]


def _seconds(function: Callable[[], object]) -> float:
    """Median wall seconds of a call, after calls that compile and allocate."""
    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=5.0).median


def _train(size: str, rows: list[TokenPair], peak: float | None) -> dict:
    """The reference pass and one update of all rows, with random weights."""
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape(size)).bfloat16()
    num_weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    if size in ADAPTED:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=16, target_modules="all-linear"), model)
    torch.cuda.reset_peak_memory_stats()
    engine = open_engine(Scorer(model), Optim(), "bf16", Deepspeed(), torch.device("cuda"))
    reference_N2 = torch.zeros(len(rows), 2, device="cuda")
    reference_seconds = _seconds(lambda: score(engine.scorer, rows, TOKENS_PER_PACK))
    update_seconds = _seconds(lambda: _update(engine, rows, reference_N2))
    tokens = sum(map(tokens_of, rows))
    per_weight = 6 if size in ADAPTED else 8  # 2 forward passes: 4; backward: 2 if frozen, else 4
    flops = per_weight * num_weights * tokens
    result = {
        "tokens_per_second": tokens / (reference_seconds + update_seconds),
        "utilisation": flops / (reference_seconds + update_seconds) / peak if peak else None,
        "reference_seconds": reference_seconds,
        "update_seconds": update_seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    engine.close()
    return result


def _update(engine: Engine, rows: list[TokenPair], reference_N2: torch.Tensor) -> None:
    """One update of all rows."""
    plan = micro_batches(rows, TOKENS_PER_PACK)[0]
    for position, members in enumerate(plan):
        policy = engine.forward(pack([rows[i] for i in members]).to("cuda"))
        loss_B = losses.dpo(policy, ChosenRejected(*reference_N2[members].unbind(1)), beta=0.1)
        engine.backward(loss_B.sum() / len(rows), last=position == len(plan) - 1)
    engine.update(5e-7)


def _attention(rows: list[TokenPair], peak: float | None) -> dict:
    """Seconds and share of the peak of attention in one layer of the 7B shape, forward and backward, by backend."""
    members = micro_batches(rows, TOKENS_PER_PACK)[0][0]
    packed = pack([rows[i] for i in members]).to("cuda")
    _, hidden, _, _, heads, kv_heads = SHAPES["7b"]
    dim = hidden // heads
    inputs = [
        torch.randn(len(packed.tokens_T), h, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    visible = sum(own * (2 * length - own + 1) / 2 for own, length in zip(packed.own_S, packed.lengths_S, strict=True))
    flops = 3.5 * 4 * heads * dim * visible  # backward counts as 2.5 forwards
    result: dict[str, float | None] = {}
    for name, backend in BACKENDS.items():
        seconds = _seconds_of_backend(backend, packed, inputs)
        result |= {f"{name}_seconds": seconds, f"{name}_share_of_peak": flops / seconds / peak if peak else None}
    return result


def _seconds_of_backend(backend: Callable, packed: Pack, inputs: list[torch.Tensor]) -> float:
    attend, rule = backend(packed), Rule(None, None, None, None, 0.0)
    return _seconds(lambda: attend(*inputs, rule).sum().backward())


def _head(rows: list[TokenPair]) -> dict:
    """Seconds of the head of the 3B shape, forward and backward, and the share that its three matrix products need."""
    config = shape("3b")
    config.num_hidden_layers = 1
    with torch.device("cuda"):
        head = Head(LlamaForCausalLM(config).bfloat16())
    num_rows = len(pack(rows[: NUM_PAIRS // 4]).rows_R)
    hidden_RH = torch.randn(num_rows, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets_R = torch.randint(3, config.vocab_size, (num_rows,), device="cuda")

    def products() -> None:
        slope_RV = hidden_RH.detach() @ head.weight.detach().T
        slope_RV @ head.weight.detach()
        slope_RV.T @ hidden_RH.detach()

    whole = _seconds(lambda: head(hidden_RH, targets_R).sum().backward())
    return {"seconds": whole, "share_of_products": _seconds(products) / whole}
