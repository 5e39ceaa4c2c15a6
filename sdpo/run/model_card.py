"""The model card of an exported M_t, in Markdown: its lineage, data, scores and settings."""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import Environment, StrictUndefined
from omegaconf import OmegaConf

from sdpo.console import number
from sdpo.errors import UserError

TEMPLATE = Path(__file__).with_suffix(".md.jinja")
SETTINGS = ("split", "reference", "start", "loss", "tune", "optim", "steps", "precision", "save_dtype", "seed")


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
    if "steps" not in manifest:
        raise UserError(f"{run} was started again and has not finished; the same command goes on from there")
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    return RunFiles(manifest, summary, config, report)


def repository(files: RunFiles) -> str | None:
    """The repository of S on the Hub; None for a folder and for the laboratory's model."""
    base = files.config["model"]
    return base["path"] if base["name"] == "hub" and not Path(base["path"]).is_absolute() else None


def render(files: RunFiles, t: int, adapter_base: str = "") -> str:
    """The README.md of M_t. It names files without their folders, so it reveals nothing about the machine.

    `adapter_base` is the model that the adapter beside M_t goes on top of, if there is one.
    """
    manifest, summary, config, report = files
    data, is_hub = config["data"], config["data"]["name"] == "hub"
    header = {"library_name": "transformers", "tags": ["dpo", "sdpo", "preference-optimization"]}
    if base := repository(files):
        header["base_model"] = base
    header |= {"datasets": sorted({name.split(":")[0] for name in data["train"]})} if is_hub and data["train"] else {}
    before, after = summary["initial"]["eval"], summary["steps"][t - 1]["eval"]
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        t=t,
        adapter_base=adapter_base,
        manifest=manifest,
        config=config,
        header=OmegaConf.to_yaml(header),
        lineage=_lineage(files, t),
        sources=[name if is_hub else Path(name).name for name in data["train"]],
        revisions=[f"{name} at {revision}" for name, revision in data["revisions"].items()],
        dropped=json.dumps(report["dropped"]) if report.get("dropped") else "",
        scores=[(name, _score(before.get(name)), _score(measure)) for name, measure in after.items()],
        settings=OmegaConf.to_yaml(_bare({name: config[name] for name in SETTINGS})),
        versions=", ".join(f"{name} {found}" for name, found in manifest["versions"].items() if found),
    )


def _lineage(files: RunFiles, t: int) -> list[tuple[str, ...]]:
    """One row per step up to M_t: its name, start, reference, pairs, mean gamma of its reference, and loss."""
    steps = files.manifest["steps"][:t]
    names = {files.manifest["model_key"]: "S"} | {step["key"]: f"M_{step['t']}" for step in steps}
    names |= {handle: handle for handle in ("policy", "reference")}  # these two as they were when a later window began

    def name(key: str) -> str:
        return names.get(key, f"external {key[:8]}")

    def mixture(weights: dict[str, float]) -> str:
        return " + ".join(name(key) if share == 1 else f"{share:g} {name(key)}" for key, share in weights.items())

    rows: list[tuple[str, ...]] = []
    for step, result in zip(steps, files.summary["steps"], strict=False):
        reference = "; ".join(dict.fromkeys(mixture(window["weights"]) for window in step["windows"])) or "none"
        sources = ", ".join(f"{source} ({count})" for source, count in step["sources"].items())
        loss = f"{number(result['first_loss'])} → {number(result['last_loss'])}"
        rows.append((f"M_{step['t']}", name(step["start"]), reference, sources, number(step["gamma_ref_mean"]), loss))
    return rows


def _score(measure: dict | None) -> str:
    if not measure or measure["value"] is None:
        return "-"
    return f"{number(measure['value'], measure['low'], measure['high'])} (n = {measure['n']})"


def _bare(value: Any) -> Any:
    """The settings with every absolute path reduced to its last component."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
