"""What the parts of the benchmark measured, compared and as text."""

import statistics
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pandas as pd

from analysis import table_format
from analysis.benchmark.parts import ON_GPU, SIDES
from sdpo.console import number

RIVALS = {"trl_default": "engine", "trl_tuned": "engine", "trl_lora": "engine_lora"}  # side -> ours beside it
CLOCKS = {"cpu": 0, "wall": 1}  # positions in a pass
PAPER_PAIRS = 12_859  # orca_dpo_pairs, the smaller of the two data sets of arXiv 2403.19270


def summarise(runs: dict[str, list[dict]], failures: dict[str, str], num_pairs: int, clock: str) -> dict:
    """The content of benchmark.json: medians of each side, the ratios of TRL to this engine, and all other parts."""
    sides = {side: _side(runs[side], num_pairs) for side in SIDES if side in runs}
    sides = {side: values for side, values in sides.items() if values}
    ratios = {
        side: _ratios(sides[side], sides[ours], clock) for side, ours in RIVALS.items() if {side, ours} <= sides.keys()
    }
    others = {part: found[-1] for part, found in runs.items() if part not in SIDES}
    if set(others.get("steps", {})) >= {"1", "8"}:
        others["steps"] |= _of_steps(others["steps"], CLOCKS[clock])
    return {"clock": clock, "sides": sides, "ratios": ratios, **others, "failures": failures}


def _side(runs: list[dict], num_pairs: int) -> dict:
    """Medians over the runs that have results; seconds are per pair, of both phases together."""
    whole = [run for run in runs if "phases" in run]
    if not whole:
        return {}

    def median(read: Callable[[dict], float]) -> float:
        return statistics.median(map(read, whole))

    def seconds(which: int, clock: int) -> float:
        return median(lambda run: sum(passes[which][clock] for passes in run["phases"].values()) / num_pairs)

    first, steady = ({name: seconds(which, clock) for name, clock in CLOCKS.items()} for which in (0, -1))
    result: dict[str, Any] = {"first": first, "steady": steady}
    result |= {name: median(itemgetter(name)) for name in ("peak_bytes", "padding_share", "first_loss")}
    if "tokens" in whole[0]:
        result["unique_tokens_per_second"] = {
            name: whole[0]["tokens"] / num_pairs / spent for name, spent in steady.items()
        }
    kept = ("settings", "phases", "tried")
    return result | {name: whole[-1][name] for name in kept if name in whole[-1]}


def _ratios(theirs: dict, ours: dict, clock: str) -> dict[str, float]:
    """How many times as long TRL takes, and our share of its memory."""
    speed = {when: theirs[when][clock] / ours[when][clock] for when in ("first", "steady")}
    return speed | {"memory": ours["peak_bytes"] / theirs["peak_bytes"]}


def _of_steps(spent: dict, clock: int) -> dict[str, float]:
    """8 steps over 1 with the same pairs: passes, which grow with the pairs, and a fixed cost per step."""
    passes, fixed = dict[int, float](), dict[int, float]()
    for num_steps in (1, 8):
        phases = {name: seconds[clock] for name, seconds in spent[str(num_steps)].items()}
        passes[num_steps] = (phases["reference"] + phases["updates"]) / spent["pairs"]
        fixed[num_steps] = (phases["everything"] - phases["reference"] - phases["updates"]) / num_steps
    one, eight = (PAPER_PAIRS * passes[n] + n * fixed[n] for n in (1, 8))
    return {
        "passes_8_steps_over_1": passes[8] / passes[1],
        "fixed_seconds_per_step": fixed[8],
        "cost_8_steps_over_1": eight / one,
    }


def render(result: dict) -> str:
    """The result as text."""
    sides, clock = result["sides"], result["clock"]
    name = {"cpu": "CPU", "wall": "wall"}[clock]
    columns = {
        "side": list(sides),
        f"first {name} s/pair": [f"{side['first'][clock]:.4f}" for side in sides.values()],
        f"steady {name} s/pair": [f"{side['steady'][clock]:.4f}" for side in sides.values()],
        "peak MiB": [f"{side['peak_bytes'] / 2**20:.0f}" for side in sides.values()],
        "padding": [f"{side['padding_share']:.1%}" for side in sides.values()],
        "first loss": [f"{side['first_loss']:.6f}" for side in sides.values()],
    }
    return table_format.render(pd.DataFrame(columns), "DPO on the same pairs", _notes(result), "text")


def _notes(result: dict) -> list[str]:
    notes = [
        f"{RIVALS[side]} is {ratio['steady']:.2f}x as fast as {side} in steady state and {ratio['first']:.2f}x in the "
        f"first pass, with {ratio['memory']:.2f}x its memory"
        for side, ratio in result["ratios"].items()
    ]
    notes += [f"{name}: {_listed(side['settings'])}" for name, side in result["sides"].items()]
    if "loss_difference" in (first := result.get("agreement", {})):
        notes.append(
            f"relative differences from TRL in the first update, in fp32: loss {first['loss_difference']:.1e}, "
            f"gradient {first['gradient_difference']:.1e}"
        )
    if "cost_8_steps_over_1" in (steps := result.get("steps", {})):
        notes.append(
            f"8 steps cost {steps['cost_8_steps_over_1']:.3f}x as much as 1 for {PAPER_PAIRS:,} pairs: "
            f"{steps['passes_8_steps_over_1']:.3f}x for passes, and {steps['fixed_seconds_per_step']:.1f} s per step"
        )
    for part in ON_GPU:
        notes += [f"{result['machine']['gpu']}, {part}: {_listed(row)}" for row in result.get(part, {}).get("rows", [])]
    return notes + [f"{part} FAILED: {why}" for part, why in result["failures"].items()]


def _listed(values: dict) -> str:
    shown = {key: number(value) if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
