"""Benchmark of this engine against TRL's DPOTrainer, with the same pairs, model and updates.

    python -m analysis.benchmark --profile ultrafeedback
    python -m analysis.benchmark --device cuda --parts trl_tuned,engine,1b --packs 8192,16384 --compile off,on

Prints a table and writes benchmark.json, also after every part. Every part runs in its own process with its own time
limit; one that fails or is cut off is named in the table, and what it had measured is kept. The time of the reference
pass and of the updates counts; loading, tokenising and saving count only in `steps`. Every side makes two passes: the
first includes what a process does only once, and the second is the steady state.
"""

import argparse
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from analysis.benchmark import parts, table
from analysis.benchmark import work as workload
from analysis.benchmark.work import PROFILES, SHAPES, Work
from sdpo.config import TRAINED, Launch
from sdpo.run.folder import write_json

# What is measured if nothing is said, and the settings that differ: on a CPU packs are small, so that activations stay
# in the cache, and a GPU takes all pairs as one update.
DEFAULTS = {
    "cpu": {
        "parts": "trl_default,trl_tuned,engine,agreement,steps",
        "shape": "toy",
        "precision": "fp32",
        "pairs": 32,
        "pairs_per_update": 8,
        "trl_batches": "1,2,8",
        "packs": "1536",
        "repeats": 2,
        "limit": 3600.0,
    },
    "cuda": {
        "parts": "engine,trl_tuned,trl_default,agreement,1b",
        "shape": "1b",
        "precision": "bf16",
        "pairs": 64,
        "pairs_per_update": 64,
        "trl_batches": "8,16,32",
        "packs": str(TRAINED["cuda"]),
        "repeats": 1,
        "limit": 100.0,
    },
}
LORA_BATCHES = [4, 8]  # of TRL on a GPU, at 7 billion weights
STEPS_PAIRS = 64


def main(arguments: list[str] | None = None) -> dict:
    """Measure the parts that were asked for. Returns the content of benchmark.json."""
    args = _parse(arguments)
    runs: dict[str, list[dict]] = {}
    failures: dict[str, str] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(_in_turn(args.parts, args.repeats)):
            print(f"{part} ...", file=sys.stderr, flush=True)
            outcome = parts.measure(part, _prepare(args, part, Path(folder) / str(number)), args.limit)
            if outcome.result:
                runs.setdefault(part, []).append(outcome.result)
            if outcome.failure:
                failures[part] = outcome.failure
                print(f"{part} failed: {outcome.failure}", file=sys.stderr, flush=True)
            result = table.summarise(runs, failures, args.pairs, "wall" if args.device == "cuda" else "cpu")
            result |= {"settings": vars(args) | {"out": str(args.out)}, "machine": _machine(args.device)}
            write_json(args.out / "benchmark.json", result)
    print(table.render(result))
    return result


def _in_turn(asked: list[str], repeats: int) -> list[str]:
    """The parts in the order in which they are measured. Repeated sides alternate, so that load affects all alike."""
    sides = [part for part in asked if part in parts.SIDES]
    return sides * repeats + [part for part in asked if part not in sides]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--parts", type=_words, help=f"what is measured: {', '.join(parts.PARTS)}")
    option("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    option("--profile", choices=PROFILES, default="ultrafeedback", help="data set with such lengths")
    option("--pairs-file", type=Path, help="a JSONL file to take the lengths from instead")
    option("--shape", choices=SHAPES, help="shape of the model of trl_default, trl_tuned, engine and steps")
    option("--lora-shape", choices=SHAPES, help="shape of the model of trl_lora and engine_lora")
    option("--pairs", type=int, help="pairs in each run")
    option("--pairs-per-update", type=int, help="pairs in each update")
    option("--trl-batches", type=_numbers, help="pairs in a micro-batch of tuned TRL; the fastest one that fits counts")
    option("--packs", type=_numbers, help="tokens in a micro-batch of ours: 1b, 3b, 7b measure all, a side the first")
    option("--compile", type=_switches, default=[Launch().compile], help="off, on or off,on; as --packs")
    option("--precision", choices=("fp32", "bf16"))
    option("--repeats", type=int, help="runs of each side; the result is the median")
    option("--limit", type=float, help="seconds after which a part is cut off")
    option("--out", type=Path, default=Path("out/benchmark"), help="folder for benchmark.json")
    device = parser.parse_known_args(arguments)[0].device
    parser.set_defaults(**DEFAULTS[device], lora_shape={"cpu": "toy", "cuda": "7b"}[device])
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in parts.PARTS]:
        parser.error(f"--parts: {unknown[0]} is none of {', '.join(parts.PARTS)}")
    if device == "cpu" and (needs := [part for part in args.parts if part in parts.ON_GPU]):
        parser.error(f"--parts: {needs[0]} needs a GPU")
    if not find_spec("trl") and (needs := [part for part in args.parts if part in parts.WITH_TRL]):
        parser.error(f"--parts: {needs[0]} needs TRL: pip install -r requirements-dev.txt, as `make test` does")
    if args.pairs % args.pairs_per_update or any(args.pairs_per_update % size for size in args.trl_batches):
        parser.error("--pairs must be a multiple of --pairs-per-update, and this one of each of --trl-batches")
    return args


def _words(value: str) -> list[str]:
    return value.split(",")


def _numbers(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def _switches(value: str) -> list[bool]:
    return [{"off": False, "on": True}[part] for part in value.split(",")]


def _prepare(args: argparse.Namespace, part: str, folder: Path) -> Work:
    """Write the workload of a part into a folder."""
    lora = part.endswith("_lora")
    shape = {"1b": "1b", "3b": "3b", "7b": "7b", "small": "135m", "agreement": "toy"}.get(part, args.shape)
    work = Work(
        folder=str(folder),
        shape=args.lora_shape if lora else shape,
        pairs_per_update=args.pairs_per_update,
        precision=args.precision,
        device=args.device,
        trl_batches=LORA_BATCHES if lora and args.device == "cuda" else args.trl_batches,
        packs=args.packs,
        compiled=args.compile,
        lora=lora or part == "7b",  # masters and moments of all weights would leave no room for activations
    )
    num_pairs = STEPS_PAIRS if part == "steps" else args.pairs
    if args.pairs_file:
        workload.prepare(work, workload.from_file(args.pairs_file, num_pairs))
    else:
        workload.prepare(work, workload.from_profile(args.profile, num_pairs))
    return work


def _machine(device: str) -> dict:
    names = [name for name in ("torch", "transformers", "trl") if find_spec(name)]
    card = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else None
    versions = {name: version(name) for name in names}
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "gpu": card} | versions


if __name__ == "__main__":
    main()
