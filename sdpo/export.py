"""Export a step of a run: its model as a Hugging Face folder with a model card, or its pairs as data for TRL.

python -m sdpo.export RUN --step 2                        write M_2 into RUN/export/M_2
python -m sdpo.export RUN --step 2 --push NAME            and upload it to the Hub, where it is private at first
python -m sdpo.export RUN --step 2 --pairs FILE.parquet   write the pairs of step 2 with the reference's log-probs
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from sdpo import config as configuration
from sdpo.errors import UserError, disk_as_user_error, one_line
from sdpo.run import model_card
from sdpo.store.artifacts import Artifact, Store, check

# Files that the store keeps beside a model.
BOOKKEEPING = ("manifest.json", "train.json", "reference.parquet", "probes.parquet", "moments-*")


def export(run: Path, t: int, out: Path, merge: bool = False) -> Path:
    """Write M_t, its tokenizer and its card into `out`, and return `out`; `merge` leaves out the adapter of LoRA.

    Raises UserError if the step does not exist, if its files have changed, and if `out` is not empty.
    """
    files, model = model_card.read(run), _step(run, t)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; remove it or name another folder with --out")
    left_out = shutil.ignore_patterns(*BOOKKEEPING, *(["adapter"] if merge else []))
    shutil.copytree(model.folder, out, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    base = _name_base(out / "adapter" / "adapter_config.json", files)
    (out / "README.md").write_text(model_card.render(files, t, base), encoding="utf-8")
    return out


def _name_base(settings: Path, files: model_card.RunFiles) -> str:
    """Write the name of an adapter's base into peft's settings instead of its key, and return it; "" without adapter.

    It is S's repository on the Hub, else "S", or the "M_t" that the adapter goes on top of.
    """
    if not settings.is_file():
        return ""
    content, manifest = json.loads(settings.read_text()), files.manifest
    names = {manifest["model_key"]: model_card.repository(files) or "S"}
    names |= {step["key"]: f"M_{step['t']}" for step in manifest["steps"]}
    content["base_model_name_or_path"] = names.get(content["base_model_name_or_path"], "S, rounded to 4 bits")
    settings.write_text(json.dumps(content, indent=2))
    return content["base_model_name_or_path"]


def export_pairs(run: Path, t: int, file: Path) -> Path:
    """Write the chunk of step t as a parquet file with the columns that TRL's DPOTrainer reads, and return `file`.

    The columns are `prompt`, `chosen`, `rejected` (text without the stop token), `prompt_ids`, `chosen_ids`,
    `rejected_ids` (the tokens that the step trained on) and `ref_chosen_logps`, `ref_rejected_logps` (the sums in nats
    that its loss read). A DPOTrainer with this data set uses the log-probs after `trainer.precompute_ref_logps = True`
    (TRL 1.16). Raises UserError if the step had more or fewer references than one, if its loss weighs tokens, and if
    the run's pairs have changed.
    """
    from sdpo.binding import variants
    from sdpo.data.prompt_and_answer import ChatFormat
    from sdpo.data.tokenize import content_hash
    from sdpo.train.setup import prepare
    from sdpo.variants import token_weights

    model = _step(run, t)
    manifest = json.loads((model.folder / "manifest.json").read_text())
    if manifest["loss"]["name"] in variants(token_weights):
        raise UserError(f"the loss of step {t} weighs tokens; TRL's columns hold sums over all tokens alike")
    if len(manifest["windows"]) != 1:
        raise UserError(f"step {t} read {len(manifest['windows'])} references; TRL's columns hold exactly one")
    config = configuration.load(run / "config.yaml")
    if config.rounds.name != "given":
        made_from = run / "rounds" / f"{t}.json"
        raise UserError(f"step {t} trained on answers of M_{t - 1}; they are in {made_from}, with tokens and rewards")
    inputs = prepare(config, Store(model.folder.parents[1]))
    reference = pd.read_parquet(model.folder / "reference.parquet")
    known = set(inputs.train.ids)
    chunk = inputs.train.take(inputs.train.indices(id for id in reference["id"] if id in known))
    if content_hash(chunk.rows) != manifest["rows"]:
        raise UserError(
            f"the pairs of {run} have changed since step {t} was trained; restore the files that its config.yaml names"
        )
    chat = ChatFormat(inputs.runner.tokenizer, config.data.template, config.data.template_date)
    texts = pd.DataFrame(map(chat.texts, chunk.pairs))[["prompt", "chosen", "rejected"]]
    ids = pd.DataFrame(chunk.rows)[["prompt", "chosen", "rejected"]].add_suffix("_ids")
    logps = reference[["chosen", "rejected"]].add_prefix("ref_").add_suffix("_logps")
    pd.concat([reference["id"], texts, ids, logps], axis=1).to_parquet(file, index=False)
    return file


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name` of the Hub and return its address; a new repository is private.

    Raises UserError if the Hub refuses it.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repository.repo_id)
    except OSError as error:  # what the Hub's client raises for a refusal
        raise UserError(
            f"{name}: the Hub refused the upload ({one_line(error)}); mend that, then run "
            f"`hf upload --private {name} {folder}`"
        ) from error
    return repository.url


def _step(run: Path, t: int) -> Artifact:
    """M_t of a finished run. Raises UserError if it does not exist or its files have changed."""
    steps = model_card.read(run).manifest["steps"]
    if not 1 <= t <= len(steps):
        raise UserError(f"{run} has steps 1 to {len(steps)}, and no step {t}")
    model = Artifact(steps[t - 1]["key"], (run / "steps" / str(t)).resolve(), reused=True)
    check(model)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Export what the command line names, and print where it is."""
    parser = argparse.ArgumentParser("python -m sdpo.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--step", type=int, metavar="t", help="number of the step, from 1; default: the last one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: RUN/export/M_t")
    parser.add_argument("--merge", action="store_true", help="LoRA: only the merged weights, without the adapter")
    parser.add_argument("--push", metavar="NAME", help="then upload the folder to this repository of the Hub")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="instead write the step's pairs as a parquet file")
    options = parser.parse_args(arguments)
    t = len(model_card.read(options.run).manifest["steps"]) if options.step is None else options.step
    if options.pairs:
        print(export_pairs(options.run, t, options.pairs))
        return
    folder = options.out or options.run / "export" / f"M_{t}"
    print(export(options.run, t, folder, options.merge))
    if options.push:
        print(push(folder, options.push))


if __name__ == "__main__":
    try:
        with disk_as_user_error():
            main()
    except UserError as error:
        sys.exit(f"error: {error}")
