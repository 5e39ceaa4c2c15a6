"""This engine beside TRL's DPOTrainer: the same pairs, model and updates, interleaved, each run in its own process.

    python -m analysis.benchmark --profile ultrafeedback --pairs-per-microbatch 8

Prints a table and writes benchmark.json. Both sides have one thread. What is counted is the reference pass and the
updates; loading, tokenising and saving are not, except in the cost of many steps.
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

import torch

from analysis.benchmark import cuda
from analysis.benchmark import work as workload
from analysis.benchmark.work import PROFILES, SHAPES, Work

SIDES = ("trl_default", "trl_tuned", "engine")
NOTHING = {"cpu": 0.0, "wall": 0.0}  # of a phase that a side does not have
PAPER_PAIRS = 12_859  # orca_dpo_pairs, the smaller of the two data sets of arXiv 2403.19270
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def main(arguments: list[str] | None = None) -> dict:
    """Run everything that this machine can; returns what benchmark.json holds."""
    args = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = _prepare(args, Path(folder) / "work", args.pairs)
        runs = {side: [] for side in SIDES}
        for repeat in range(args.repeats):
            for side in SIDES:  # interleaved, so that a busy machine is busy for all
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
    parser.add_argument("--profile", choices=PROFILES, default="ultrafeedback", help="lengths of which data set")
    parser.add_argument("--pairs-file", type=Path, help="take lengths from a JSONL file instead")
    parser.add_argument("--shape", choices=SHAPES, help="the model; toy on a CPU, 1b on a GPU")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of each run")
    parser.add_argument("--pairs-per-microbatch", type=int, default=8, help="TRL's micro-batch, and our most")
    parser.add_argument("--pairs-per-update", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side; the median counts")
    parser.add_argument("--steps-pairs", type=int, default=64, help="pairs for the cost of 8 steps; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"))
    args = parser.parse_args(arguments)
    args.shape = args.shape or {"cpu": "toy", "cuda": "1b"}[args.device]
    if args.pairs_per_update % args.pairs_per_microbatch or args.pairs % args.pairs_per_update:
        parser.error("pairs must be a multiple of pairs-per-update, and that of pairs-per-microbatch")
    return args


def _prepare(args: argparse.Namespace, folder: Path, num_pairs: int) -> Work:
    if args.pairs_file:
        lengths = workload.from_file(args.pairs_file, num_pairs)
    else:
        lengths = workload.from_profile(args.profile, num_pairs)
    sizes = (args.pairs_per_update, args.pairs_per_microbatch)
    work = Work(str(folder), args.shape, *sizes, args.precision, args.device)
    workload.prepare(work, lengths)
    return work


def _child(side: str, work: Work) -> dict:
    """One measurement in a process of its own, whose errors are shown."""
    work_file, result_file = (Path(work.folder) / name for name in ("work.json", "result.json"))
    work_file.write_text(json.dumps(work._asdict()))
    command = [sys.executable, "-m", "analysis.benchmark.sides", side, str(work_file), str(result_file)]
    env = os.environ | QUIET | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(result_file.read_text())


def _compare(runs: dict[str, list[dict]], num_pairs: int, clock: str) -> dict:
    """Medians per side, and how many times less this engine needs, by CPU time or, on a GPU, by the wall clock."""

    def median(read: Callable[[dict], float]) -> dict[str, float]:
        return {side: statistics.median(map(read, runs[side])) for side in runs}

    def per_pair(clock: str, *phases: str) -> dict[str, float]:
        return median(lambda run: sum(run["phases"].get(name, NOTHING)[clock] for name in phases) / num_pairs)

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
    """The same pairs in 1 step and in 8: the work that grows with pairs, and what any step costs besides."""
    passes, fixed = {}, {}
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
    lines = [f"{'':14}{'CPU s/pair':>12}{'wall s/pair':>12}{'peak MiB':>10}{'padding':>9}{'first loss':>12}"]
    for side in SIDES:
        lines.append(
            f"{side:14}{result['cpu_seconds_per_pair'][side]:12.3f}{result['wall'][side]:12.3f}"
            f"{result['peak_rss'][side] / 2**20:10.0f}{result['padding_share'][side]:9.1%}"
            f"{result['first_loss'][side]:12.6f}"
        )
    first = result["first_step"]
    lines += [
        "",
        f"{result['ratio_default']:.2f}x TRL's defaults, {result['ratio_tuned']:.2f}x its tuned settings, "
        f"{result['memory_ratio_tuned']:.2f}x their memory",
        f"first step against TRL, relative: loss {first['loss_difference']:.1e}, "
        f"gradient {first['gradient_difference']:.1e}",
    ]
    if "cost_8_steps_over_1" in result:
        lines.append(
            f"8 steps against 1: {result['passes_8_steps_over_1']:.3f}x the passes, and "
            f"{result['fixed_seconds_per_step']:.1f} s a step besides: {result['cost_8_steps_over_1']:.3f}x the cost "
            f"of {PAPER_PAIRS:,} pairs"
        )
    return "\n".join([*lines, cuda.table(result["cuda"])])


if __name__ == "__main__":
    main()
