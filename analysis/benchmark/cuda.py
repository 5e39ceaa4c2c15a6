"""What only a GPU shows: tokens a second, utilisation and memory at real sizes; attention and head alone."""

import time
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from analysis.benchmark.work import from_profile, shape
from sdpo.config import Config
from sdpo.model.attention.interface import BACKENDS, Rule
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Head, Scorer, score
from sdpo.model.packing import micro_batches, pack, tokens_of
from sdpo.train import throughput
from sdpo.types import ChosenRejected, TokenPair
from sdpo.variants import loss as losses

SIZES = ("1b", "3b", "7b")
ADAPTED = ("7b",)  # trained with LoRA: masters and moments of all weights would not leave room for activations
TOKENS_PER_PACK, NUM_PAIRS = 8192, 64


def measure(device: str) -> dict:
    """All of it on a GPU; elsewhere only the names of what was not measured."""
    if device != "cuda":
        parts = [f"{size}: tokens/s, utilisation, peak memory" for size in SIZES]
        return {"not_measured": [*parts, "attention alone", "head alone"]}
    name = torch.cuda.get_device_name()
    peak = throughput.peak(torch.device(device))
    rows = _rows()
    result = {"device": name, "peak_flops": peak}
    result |= {size: _train(size, rows, peak) for size in SIZES}
    return result | {"attention": _attention(rows, peak), "head": _head(rows)}


def table(result: dict) -> str:
    """One line for each thing that was measured or was not."""
    if "not_measured" in result:
        return "no GPU here, so not measured: " + "; ".join(result["not_measured"])
    lines = []
    for name, values in result.items():
        if isinstance(values, dict):
            lines.append(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items() if value))
    return "\n".join([result["device"], *lines])


def _rows() -> list[TokenPair]:
    rng = torch.Generator().manual_seed(0)
    lengths = from_profile("ultrafeedback", NUM_PAIRS).tolist()
    return [
        TokenPair(f"{i:05d}", *(torch.randint(3, 8192, (n,), generator=rng).int().numpy() for n in three))
        for i, three in enumerate(lengths)
    ]


def _seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median wall seconds, after one call that compiles and allocates."""
    spent = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.monotonic()
        function()
        torch.cuda.synchronize()
        spent.append(time.monotonic() - began)
    return sorted(spent[1:])[repeats // 2]


def _train(size: str, rows: list[TokenPair], peak: float | None) -> dict:
    """One update of all rows, reference pass included, with random weights."""
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape(size)).bfloat16()
    num_weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    if size in ADAPTED:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    torch.cuda.reset_peak_memory_stats()
    engine = open_engine(Scorer(model), Config(precision="bf16"), torch.device("cuda"))
    reference_N2 = torch.zeros(len(rows), 2, device="cuda")
    reference_seconds = _seconds(lambda: score(engine.scorer, rows, TOKENS_PER_PACK))
    update_seconds = _seconds(lambda: _update(engine, rows, reference_N2))
    tokens = sum(map(tokens_of, rows))
    per_weight = 6 if size in ADAPTED else 8  # forward twice; backward once for frozen weights, twice for trained
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


def _update(engine, rows: list[TokenPair], reference_N2: torch.Tensor) -> None:
    plan = micro_batches(rows, TOKENS_PER_PACK)[0]
    for position, members in enumerate(plan):
        policy = engine.forward(pack([rows[i] for i in members]).to("cuda"))
        loss_B = losses.dpo(policy, ChosenRejected(*reference_N2[members].unbind(1)), beta=0.1)
        engine.backward(loss_B.sum() / len(rows), last=position == len(plan) - 1)
    engine.update(5e-7)


def _attention(rows: list[TokenPair], peak: float | None) -> dict:
    """Forward and backward of one layer of the 7B shape, as a share of the peak, by backend."""
    members = micro_batches(rows, TOKENS_PER_PACK)[0][0]
    packed = pack([rows[i] for i in members]).to("cuda")
    config = shape("7b")
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inputs = [
        torch.randn(len(packed.tokens_T), h, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    visible = sum(own * (2 * length - own + 1) / 2 for own, length in zip(packed.own_S, packed.lengths_S, strict=True))
    flops = 3.5 * 4 * heads * dim * visible  # backward counts as 2.5 forwards
    result = {}
    for name, backend in BACKENDS.items():
        attend, rule = backend(packed), Rule(None, None, None, None, 0.0)
        seconds = _seconds(lambda attend=attend, rule=rule: attend(*inputs, rule).sum().backward())
        result |= {f"{name}_seconds": seconds, f"{name}_share_of_peak": flops / seconds / peak if peak else None}
    return result


def _head(rows: list[TokenPair]) -> dict:
    """Forward and backward of the head of the 3B shape, against its three bare matrix products."""
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
