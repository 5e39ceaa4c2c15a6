"""The model card of an exported M_t, in Markdown: its lineage, data, scores and settings."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf

from sdpo.console import number
from sdpo.errors import UserError

CITATION = """```bibtex
@inproceedings{kim-etal-2025-sdpo,
  title     = {{sDPO}: Don't Use Your Data All at Once},
  author    = {Kim, Dahyun and Kim, Yungi and Song, Wonho and Kim, Hyeonwoo and Kim, Yunsu and Kim, Sanghoon and
               Park, Chanjun},
  booktitle = {Proceedings of the 31st International Conference on Computational Linguistics: Industry Track},
  pages     = {366--373},
  year      = {2025}
}
@inproceedings{rafailov-etal-2023-dpo,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D.
               and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}
```"""


class RunFiles(NamedTuple):
    """The files of a finished run that a card is written from."""

    manifest: dict[str, Any]
    summary: dict[str, Any]
    config: dict[str, Any]
    report: dict[str, Any]


def read(run: Path) -> RunFiles:
    """The files of a run folder. Raises UserError if the folder holds no finished run."""
    if not (run / "summary.json").is_file():
        raise UserError(f"{run} holds no summary.json; name the folder of a finished run")
    manifest, summary, report = (
        json.loads((run / f"{name}.json").read_text()) for name in ("manifest", "summary", "data_report")
    )
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    return RunFiles(manifest, summary, config, report)


def render(files: RunFiles, t: int) -> str:
    """The README.md of M_t. It names files without their folders, so it reveals nothing about the machine."""
    manifest, config = files.manifest, files.config
    base = config["model"]["path"] if config["model"]["name"] == "hub" else None
    datasets = sorted({name.split(":")[0] for name in config["data"]["train"] if config["data"]["name"] == "hub"})
    header = {"library_name": "transformers", "tags": ["dpo", "sdpo", "preference-optimization"]}
    header |= {"base_model": base} if base else {}
    header |= {"datasets": datasets} if datasets else {}
    parts = [
        f"---\n{OmegaConf.to_yaml(header)}---",
        f"# {manifest['run']}, M_{t}",
        f"The model after step {t} of {len(manifest['steps'])} of preference optimisation with the "
        f"`{config['loss']['name']}` loss. In stepwise DPO each step trains on its own chunk of the data; with the "
        "reference `previous`, the reference model of a step is the model that the step before produced.",
        f"## Use\n\n```python\n{_usage()}\n```",
        f"## Lineage\n\n{_lineage(files, t)}",
        f"## Data\n\n{_data(files)}",
        f"## Scores\n\n{_scores(files, t)}",
        f"## Settings\n\n{_settings(files)}",
        "## Licence\n\nThe weights derive from the base model and the preference data above, and the licences of both "
        "apply to them; check these licences before you share the weights.",
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def _usage() -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
    )


def _lineage(files: RunFiles, t: int) -> str:
    """A table with one row per step up to M_t: its start, its reference, its pairs, and its loss."""
    steps = files.manifest["steps"][:t]
    names = {files.manifest["model_key"]: "S"} | {step["key"]: f"M_{step['t']}" for step in steps}
    names |= {handle: handle for handle in ("policy", "reference")}  # these two as they were when a later window began

    def name(key: str) -> str:
        return names.get(key, f"external {key[:8]}")

    def mixture(weights: dict[str, float]) -> str:
        return " + ".join(name(key) if share == 1 else f"{share:g} {name(key)}" for key, share in weights.items())

    rows = []
    for step, result in zip(steps, files.summary["steps"], strict=False):
        reference = "; ".join(dict.fromkeys(mixture(window["weights"]) for window in step["windows"])) or "none"
        sources = ", ".join(f"{source} ({count})" for source, count in step["sources"].items())
        loss = f"{number(result['first_loss'])} → {number(result['last_loss'])}"
        rows.append((f"M_{step['t']}", name(step["start"]), reference, sources, number(step["gamma_ref_mean"]), loss))
    return _table(("model", "starts from", "reference", "chunk (pairs)", "mean gamma of reference", "loss"), rows)


def _data(files: RunFiles) -> str:
    data = files.config["data"]
    names = [name if data["name"] == "hub" else Path(name).name for name in data["train"]]
    revisions = [f"{name} at {revision}" for name, revision in data["revisions"].items()]
    lines = [
        f"- sources: {', '.join(names) if names else 'the built-in laboratory'}",
        f"- chat template: {data['template'] or 'from the tokenizer'}",
        f"- longest pair: {data['max_tokens']} tokens; longer pairs: {data['on_long']}",
    ]
    lines += [f"- revisions: {', '.join(revisions)}"] if revisions else []
    dropped = files.report.get("dropped")
    lines += [f"- dropped rows, by reason: {json.dumps(dropped)}"] if dropped else []
    return "\n".join(lines)


def _scores(files: RunFiles, t: int) -> str:
    """A table of every measure of S and of M_t on held-out data, with intervals."""
    before, after = files.summary["initial"]["eval"], files.summary["steps"][t - 1]["eval"]
    rows = [(name, _score(before.get(name)), _score(measure)) for name, measure in after.items()]
    return _table(("measure", "S", f"M_{t}"), rows) + "\n\nMeasured on held-out data. Brackets hold 95 % intervals."


def _score(measure: dict | None) -> str:
    if not measure or measure["value"] is None:
        return "-"
    return f"{number(measure['value'], measure['low'], measure['high'])} (n = {measure['n']})"


def _settings(files: RunFiles) -> str:
    config = files.config
    chosen = {name: config[name] for name in ("split", "reference", "start", "loss", "tune", "optim", "steps")}
    chosen |= {name: config[name] for name in ("precision", "save_dtype", "seed")}
    versions = ", ".join(f"{name} {found}" for name, found in files.manifest["versions"].items() if found)
    commit = files.manifest["git"]["commit"] or "unknown"
    return f"```yaml\n{OmegaConf.to_yaml(_bare(chosen))}```\n\nMade with {versions}; the code was at commit {commit}."


def _bare(value: Any) -> Any:
    """The settings with every absolute path reduced to its last component."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
