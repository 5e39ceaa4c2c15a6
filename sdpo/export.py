"""A step of a run as a standard Hugging Face folder with a model card.

python -m sdpo.export RUN --step 2                       into RUN/export/M_2
python -m sdpo.export RUN --step 2 --push NAME           and up to the hub, where it is private at first
"""

import argparse
import shutil
import sys
from pathlib import Path

from sdpo import card
from sdpo.store import Artifact, check

BOOKKEEPING = ("manifest.json", "train.json")  # of the store, not of the model


def export(run: Path, t: int, out: Path) -> Path:
    """Write M_t, its tokenizer and its card into `out`; ValueError where there is no such step or `out` is in use."""
    files = card.read(run)
    steps = files.manifest["steps"]
    if not 1 <= t <= len(steps):
        raise ValueError(f"{run} has steps 1 to {len(steps)}, and no step {t}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; remove it or name another folder with --out")
    model = Artifact(steps[t - 1]["key"], (run / "steps" / str(t)).resolve(), reused=True)
    check(model)
    files_of_store = shutil.ignore_patterns(*BOOKKEEPING)
    shutil.copytree(model.folder, out, ignore=files_of_store, copy_function=shutil.copyfile, dirs_exist_ok=True)
    (out / "README.md").write_text(card.write(files, t), encoding="utf-8")
    return out


def push(folder: Path, name: str) -> str:
    """Upload a folder to the hub repository NAME, made (private) where it is missing; returns its address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    repository = hub.create_repo(name, private=True, exist_ok=True)
    hub.upload_folder(folder_path=folder, repo_id=repository.repo_id)
    return repository.url


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m sdpo.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--step", type=int, required=True, metavar="t", help="which M_t")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to; default: RUN/export/M_t")
    parser.add_argument("--push", metavar="NAME", help="then upload it to this repository of the hub")
    options = parser.parse_args(arguments)
    folder = export(options.run, options.step, options.out or options.run / "export" / f"M_{options.step}")
    print(folder)
    if options.push:
        print(push(folder, options.push))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
