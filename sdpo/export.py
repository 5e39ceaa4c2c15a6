"""A step of a run for use elsewhere: as a standard Hugging Face folder with a model card, or as data for TRL.

python -m sdpo.export RUN --step 2                        M_2 into RUN/export/M_2
python -m sdpo.export RUN --step 2 --push NAME            and up to the hub, where it is private at first
python -m sdpo.export RUN --step 2 --pairs FILE.parquet   what M_2 was trained on, with its reference's log-probs
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from sdpo import config
from sdpo.errors import UserError
from sdpo.run import model_card
from sdpo.store import Artifact, Store, check

# Of the store, not of the model.
BOOKKEEPING = ("manifest.json", "train.json", "reference.parquet", "probes.parquet", "moments-*")


def export(run: Path, t: int, out: Path, merge: bool = False) -> Path:
    """Write M_t, its tokenizer and its card into `out`; with `merge` without the adapter beside the merged weights.

    UserError where there is no such step, where its files have changed, and where `out` is in use.
    """
    files, model = model_card.read(run), _step(run, t)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; remove it or name another folder with --out")
    left_out = shutil.ignore_patterns(*BOOKKEEPING, *(["adapter"] if merge else []))
    shutil.copytree(model.folder, out, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    (out / "README.md").write_text(model_card.write(files, t), encoding="utf-8")
    return out


def export_pairs(run: Path, t: int, file: Path) -> Path:
    """Write the chunk of step t as a parquet file with the columns that TRL's DPOTrainer reads.

    They are `prompt`, `chosen`, `rejected` (text without the stop token), `prompt_ids`, `chosen_ids`, `rejected_ids`
    (what the step was trained on) and `ref_chosen_logps`, `ref_rejected_logps` (summed, in nats, what its loss read).
    A DPOTrainer made with this data set uses them once `trainer.precompute_ref_logps = True` is set (TRL 1.16).
    UserError where the step had no one reference, and where the pairs are no longer those of the run.
    """
    from sdpo.data.templates import ChatFormat
    from sdpo.data.tokenize import content_hash
    from sdpo.train.setup import prepare

    model = _step(run, t)
    made_of = json.loads((model.folder / "manifest.json").read_text())
    if len(made_of["windows"]) != 1:
        raise UserError(f"step {t} read {len(made_of['windows'])} references; TRL's columns hold exactly one")
    settings = config.load(run / "config.yaml")
    inputs = prepare(settings, Store(model.folder.parents[1]))
    reference = pd.read_parquet(model.folder / "reference.parquet")
    known = set(inputs.train.ids)
    chunk = inputs.train.take(inputs.train.indices(id for id in reference["id"] if id in known))
    if content_hash(chunk.rows) != made_of["rows"]:
        raise UserError(f"the pairs of {run} have changed since step {t} was trained; restore the files it names")
    chat = ChatFormat(inputs.runner.tokenizer, settings.data.template)
    texts = pd.DataFrame(map(chat.texts, chunk.pairs))
    ids = pd.DataFrame(chunk.rows)[["prompt", "chosen", "rejected"]].add_suffix("_ids")
    logps = reference[["chosen", "rejected"]].add_prefix("ref_").add_suffix("_logps")
    pd.concat([reference["id"], texts, ids, logps], axis=1).to_parquet(file, index=False)
    return file


def push(folder: Path, name: str) -> str:
    """Upload a folder to the hub repository NAME, made (private) where it is missing; returns its address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    repository = hub.create_repo(name, private=True, exist_ok=True)
    hub.upload_folder(folder_path=folder, repo_id=repository.repo_id)
    return repository.url


def _step(run: Path, t: int) -> Artifact:
    """M_t of a finished run, its files verified."""
    steps = model_card.read(run).manifest["steps"]
    if not 1 <= t <= len(steps):
        raise UserError(f"{run} has steps 1 to {len(steps)}, and no step {t}")
    model = Artifact(steps[t - 1]["key"], (run / "steps" / str(t)).resolve(), reused=True)
    check(model)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sdpo.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--step", type=int, required=True, metavar="t", help="which M_t")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to; default: RUN/export/M_t")
    parser.add_argument("--merge", action="store_true", help="LoRA: the merged weights alone, without the adapter")
    parser.add_argument("--push", metavar="NAME", help="then upload it to this repository of the hub")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="instead write the step's pairs as a parquet file")
    options = parser.parse_args(arguments)
    if options.pairs:
        print(export_pairs(options.run, options.step, options.pairs))
        return
    folder = options.out or options.run / "export" / f"M_{options.step}"
    print(export(options.run, options.step, folder, options.merge))
    if options.push:
        print(push(folder, options.push))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
