"""Benchmark of this engine against TRL's DPOTrainer, with the same pairs, model and updates.

    python -m analysis.benchmark --profile ultrafeedback --pairs-per-microbatch 8

Prints a table and writes benchmark.json. Runs of the two sides alternate, each in its own process with one thread. The
time of the reference pass and of the updates counts; loading, tokenising and saving count only in the cost of 8 steps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from analysis import table_format
from analysis.benchmark import cuda
from analysis.benchmark import work as workload
from analysis.benchmark.work import PROFILES, SHAPES, Work

SIDES = ("trl_default", "trl_tuned", "engine")
NO_TIME = {"cpu": 0.0, "wall": 0.0}  # for a phase that a side does not have
PAPER_PAIRS = 12_859  # orca_dpo_pairs, the smaller of the two data sets of arXiv 2403.19270
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def main(arguments: list[str] | None = None) -> dict:
    """Measure everything that this machine can. Returns the content of benchmark.json."""
    args = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = _prepare(args, Path(folder) / "work", args.pairs)
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        for repeat in range(args.repeats):
            for side in SIDES:  # alternating, so that load on the machine affects all sides
                print(f"{side} ({repeat + 1} of {args.repeats}) ...", file=sys.stderr)
                runs[side].append(_child(side, work))
        clock = "wall" if args.device == "cuda" else "cpu"
        result = _compare(runs, args.pairs, clock)
        result["first_step"] = _child("agreement", work)
        if args.steps_pairs:
            result |= _many_steps(_prepare(args, Path(folder) / "steps", args.steps_pairs), args.steps_pairs, clock)
    result |= {"settings": vars(args) | {"out": str(args.out)}, "machine": _machine()}
    result["cuda"] = cuda.measure(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmark.json").write_text(json.dumps(result, indent=1, default=str))
    print(_table(result))
    return result


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="ultrafeedback", help="data set with such lengths")
    parser.add_argument("--pairs-file", type=Path, help="a JSONL file to take the lengths from instead")
    parser.add_argument("--shape", choices=SHAPES, help="shape of the model; default: toy on a CPU, 1b on a GPU")
    parser.add_argument("--pairs", type=int, default=32, help="pairs in each run")
    parser.add_argument("--pairs-per-microbatch", type=int, default=8, help="of TRL; on average ours hold no more")
    parser.add_argument("--pairs-per-update", type=int, default=8, help="pairs in each update")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side; the result is the median")
    parser.add_argument("--steps-pairs", type=int, default=64, help="pairs to measure the cost of 8 steps; 0: none")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"), help="folder for benchmark.json")
    args = parser.parse_args(arguments)
    args.shape = args.shape or {"cpu": "toy", "cuda": "1b"}[args.device]
    if args.pairs_per_update % args.pairs_per_microbatch or args.pairs % args.pairs_per_update:
        parser.error("--pairs must be a multiple of --pairs-per-update, and this a multiple of --pairs-per-microbatch")
    return args


def _prepare(args: argparse.Namespace, folder: Path, num_pairs: int) -> Work:
    """Write the workload into a folder."""
    if args.pairs_file:
        lengths = workload.from_file(args.pairs_file, num_pairs)
    else:
        lengths = workload.from_profile(args.profile, num_pairs)
    sizes = (args.pairs_per_update, args.pairs_per_microbatch)
    work = Work(str(folder), args.shape, *sizes, args.precision, args.device)
    workload.prepare(work, lengths)
    return work


def _child(side: str, work: Work) -> dict:
    """One measurement in its own process. An error there is raised here with its message."""
    work_file, result_file = (Path(work.folder) / name for name in ("work.json", "result.json"))
    work_file.write_text(json.dumps(work._asdict()))
    command = [sys.executable, "-m", "analysis.benchmark.sides", side, str(work_file), str(result_file)]
    env = os.environ | QUIET | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(result_file.read_text())


def _compare(runs: dict[str, list[dict]], num_pairs: int, clock: str) -> dict:
    """Medians of each side, and the ratios of TRL to this engine, in CPU time or, on a GPU, in wall time."""

    def median(read: Callable[[dict], float]) -> dict[str, float]:
        return {side: statistics.median(map(read, runs[side])) for side in runs}

    def per_pair(clock: str, *phases: str) -> dict[str, float]:
        return median(lambda run: sum(run["phases"].get(name, NO_TIME)[clock] for name in phases) / num_pairs)

    seconds = {name: per_pair(name, "reference", "updates") for name in ("cpu", "wall")}
    counted, peak = seconds[clock], median(lambda run: run["peak_bytes"])
    return {
        "cpu_seconds_per_pair": seconds["cpu"],
        "wall": seconds["wall"],
        "peak_rss": peak,
        "ratio_default": counted["trl_default"] / counted["engine"],
        "ratio_tuned": counted["trl_tuned"] / counted["engine"],
        "memory_ratio_tuned": peak["engine"] / peak["trl_tuned"],
        "reference_seconds_per_pair": per_pair(clock, "reference"),
        "unique_tokens_per_second": runs["engine"][0]["tokens"] / num_pairs / counted["engine"],
        "padding_share": median(lambda run: run["padding_share"]),
        "first_loss": median(lambda run: run["first_loss"]),
    }


def _many_steps(work: Work, num_pairs: int, clock: str) -> dict:
    """The cost of 8 steps over 1 with the same pairs: passes, which grow with the pairs, and a fixed cost per step."""
    passes, fixed = dict[int, float](), dict[int, float]()
    for num_steps, side in ((1, "engine"), (8, "engine_in_8_steps")):
        spent = {name: seconds[clock] for name, seconds in _child(side, work)["phases"].items()}
        passes[num_steps] = (spent["reference"] + spent["updates"]) / num_pairs
        fixed[num_steps] = (spent["everything"] - spent["reference"] - spent["updates"]) / num_steps
    one, eight = (PAPER_PAIRS * passes[n] + n * fixed[n] for n in (1, 8))
    return {
        "passes_8_steps_over_1": passes[8] / passes[1],
        "fixed_seconds_per_step": fixed[8],
        "cost_8_steps_over_1": eight / one,
    }


def _machine() -> dict:
    names = ("torch", "transformers", "trl")
    return {"platform": platform.platform(), "cpus": os.cpu_count()} | {name: version(name) for name in names}


def _table(result: dict) -> str:
    columns = {
        "CPU s/pair": [f"{result['cpu_seconds_per_pair'][side]:.3f}" for side in SIDES],
        "wall s/pair": [f"{result['wall'][side]:.3f}" for side in SIDES],
        "peak MiB": [f"{result['peak_rss'][side] / 2**20:.0f}" for side in SIDES],
        "padding": [f"{result['padding_share'][side]:.1%}" for side in SIDES],
        "first loss": [f"{result['first_loss'][side]:.6f}" for side in SIDES],
    }
    first = result["first_step"]
    notes = [
        f"this engine is {result['ratio_default']:.2f}x as fast as TRL with its defaults and "
        f"{result['ratio_tuned']:.2f}x as fast as TRL tuned, with {result['memory_ratio_tuned']:.2f}x its memory",
        f"relative differences from TRL in the first update: loss {first['loss_difference']:.1e}, "
        f"gradient {first['gradient_difference']:.1e}",
    ]
    if "cost_8_steps_over_1" in result:
        notes.append(
            f"8 steps cost {result['cost_8_steps_over_1']:.3f}x as much as 1 for {PAPER_PAIRS:,} pairs: "
            f"{result['passes_8_steps_over_1']:.3f}x for passes, and {result['fixed_seconds_per_step']:.1f} s per step"
        )
    notes += cuda.lines(result["cuda"])
    return table_format.render(pd.DataFrame({"side": SIDES} | columns), "DPO on the same pairs", notes, "text")


if __name__ == "__main__":
    main()
