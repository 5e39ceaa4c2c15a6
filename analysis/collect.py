"""From run and sweep folders to tidy pandas tables.

Each function takes any mix of run and sweep folders and returns one table. `runs` lists every run, the other tables
only runs that finished. Every table begins with `run` (folder name), `arm` (label without seed) and `seed`, then has

    runs        one row per run: sweep, done, error, headline_name, headline, seconds, trained_steps, reused_steps,
                model_key, folder, and one column `choices.<group>` per axis
    settings    one row per run: one column `settings.<name>` per setting in config.yaml; values are text
    steps       run x t (1..T): num_pairs, sources, first_loss, last_loss, gamma_ref_mean,
                gamma_ref_negative_share, lambda_mean, lambda_std, reference_leverage, reused, seconds, key,
                start, and reference (as "M_1" or "0.4 M_0 + 0.6 M_1")
    measures    run x t (0 is S) x measure: measure (as recorded), source ("" for all), name (without source),
                value (nan if undefined), low, high (95 % interval over prompts or pairs), n
    train       run x t x update: loss, margin, lambda_mean, ..., and overall_update (counted over all steps of the run)
    answers     run x t x prompt x turn: id, turn (from 1), prompt, answer
    references  run x t x pair: the columns of trajectory, for the first reference of the step and the step's own pairs
    trajectory  run x pair x model: id, source, held_out, chunk, model, t, update (-1: the step's end), role (policy or
                reference), chosen_logp, rejected_logp, seen, and gamma = chosen_logp - rejected_logp
    pairs       run x pair: id, source, held_out, chunk (0: held out), score, token counts, ratings

Log-probabilities are summed over a response; they and gamma are in nats. Seconds are wall-clock seconds. Shares lie
between 0 and 1. For runs that are only in W&B, analysis.from_wandb first writes run folders.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd
import yaml

from analysis import significance
from sdpo.errors import UserError
from sdpo.metrics import OUTCOME

# Columns of `steps` that are null without a reference or without a known GPU.
MAYBE_NULL = (
    "gamma_ref_mean",
    "gamma_ref_negative_share",
    "lambda_mean",
    "lambda_std",
    "reference_leverage",
    "runs_on_gpu",
    "utilisation",
)
Paths = tuple[Path | str, ...]


def folders(*paths: Path | str) -> list[Path]:
    """The run folders among and inside `paths`, each once. Raises UserError if a path is no run folder and holds none.

    Of a sweep folder only the runs that sweep.json names count: other runs in the folder come from other settings.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        sweep = path / "sweep.json"
        held = [path / name for name in _read(sweep)["runs"]] if sweep.is_file() else sorted(path.glob("*/"))
        inside = [folder for folder in ([path] if _is_run(path) else held) if _is_run(folder)]
        if not inside:
            raise UserError(f"{path} is no run folder and holds none; a run folder has a manifest.json")
        found |= {folder.resolve(): folder for folder in inside}
    return list(found.values())


def declared(*paths: Path | str) -> dict:
    """What the sweeps among `paths` declare: `runs` (names) and `contrasts` (what is tested -> the two arms)."""
    sweeps = [_read(file) for path in paths if (file := Path(path) / "sweep.json").is_file()]
    pairs = {name: tuple(pair) for sweep in sweeps for name, pair in sweep.get("contrasts", {}).items()}
    names = [name for sweep in sweeps for name in sweep["runs"]]
    return {"runs": names, "contrasts": pairs}


def runs(*paths: Path | str) -> pd.DataFrame:
    """One row per run with its choices and its headline. A run that did not finish has no headline."""
    table = pd.DataFrame([_run(folder) for folder in folders(*paths)])
    return table.astype(dict.fromkeys(("headline", "seconds", "trained_steps", "reused_steps"), float))


def settings(*paths: Path | str) -> pd.DataFrame:
    """The settings of each run, as text; a setting that only other runs have is empty."""
    return _rows(paths, _settings).astype(object).fillna("")


def steps(*paths: Path | str) -> pd.DataFrame:
    """One row per step of each run: its pairs, its reference, its first and last loss, and more."""
    table = _rows(paths, _steps)
    return table.astype({name: float for name in MAYBE_NULL if name in table})  # old runs lack some


def measures(*paths: Path | str) -> pd.DataFrame:
    """Every measure of S (t = 0) and of each M_t, one per row."""
    columns = ["t", "measure", "source", "name", "value", "low", "high", "n"]
    return _rows(paths, _measures, columns).astype(dict.fromkeys(("value", "low", "high"), float))


def train(*paths: Path | str) -> pd.DataFrame:
    """One row per logged update."""
    return _rows(paths, _train)


def answers(*paths: Path | str) -> pd.DataFrame:
    """The answers of S (t = 0) and of each M_t to the prompts of evaluate=generate; empty without that suite."""
    return _rows(paths, _answers, ["t", "id", "turn", "prompt", "answer"])


def trajectory(*paths: Path | str) -> pd.DataFrame:
    """The log-probabilities of each probe pair under each model, as policy and as reference."""
    table = _parquet(paths, "trajectory.parquet")
    return table.assign(gamma=table["chosen_logp"] - table["rejected_logp"])


def references(*paths: Path | str) -> pd.DataFrame:
    """The rows of the trajectory for the first reference of each step, on the pairs that the step trains on."""
    return trajectory(*paths).query("role == 'reference' and update == 0 and chunk == t")


def pairs(*paths: Path | str) -> pd.DataFrame:
    """Every pair of each run with its chunk (0: held out), score, token counts and ratings."""
    return _parquet(paths, "pairs.parquet")


def last(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last model of each run."""
    return table[table["t"] == table.groupby("run")["t"].transform("max")]


def by_arm(table: pd.DataFrame, keys: list[str], column: str = "value") -> pd.DataFrame:
    """Mean and 95 % interval of `column` over seeds for each arm and `keys`: arm, keys, value, low, high, seeds.

    An arm with one seed keeps the interval of its own evaluation (`low`, `high`), if it has one. Raises UserError if an
    arm has two runs with one seed: they are not independent.
    """
    twice = table[table.duplicated(["arm", "seed", *keys])]
    if len(twice):
        arm, seed = twice.iloc[0][["arm", "seed"]]
        raise UserError(f"{arm} has two runs with seed {seed}; give folders in which each arm runs a seed once")
    summary = significance.by_group(table, ["arm", *keys], column)
    if {"low", "high"} <= set(table) and column == "value":
        own = table.drop_duplicates(["arm", *keys], keep=False).set_index(["arm", *keys])
        alone = pd.MultiIndex.from_frame(summary[["arm", *keys]])
        for side in ("low", "high"):
            summary[side] = summary[side].fillna(pd.Series(own[side].reindex(alone).to_numpy()))
    return summary


def _is_run(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _ended(folder: Path) -> bool:
    return (folder / "done").is_file()


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _identified(paths: Paths) -> Iterator[tuple[Path, dict]]:
    """The finished runs' folders, each with the first columns of its rows. Raises UserError if no run finished."""
    ended = [folder for folder in folders(*paths) if _ended(folder)]
    if not ended:
        raise UserError(f"no run in {', '.join(map(str, paths))} has ended; wait until one writes its file `done`")
    for folder in ended:
        manifest = _read(folder / "manifest.json")
        yield folder, {name: manifest[name] for name in ("run", "arm", "seed")}


def _rows(paths: Paths, read: Callable[[Path], Iterable[dict]], columns: list[str] | None = None) -> pd.DataFrame:
    """One table of the rows that `read` yields for each run folder, after its run, arm and seed."""
    rows = [names | row for folder, names in _identified(paths) for row in read(folder)]
    return pd.DataFrame(rows, columns=columns and ["run", "arm", "seed", *columns])


def _parquet(paths: Paths, name: str) -> pd.DataFrame:
    """The parquet files of this name from all run folders, concatenated."""
    tables = []
    for folder, names in _identified(paths):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; W&B does not store it, so give the folder that the run wrote")
        table = pd.read_parquet(folder / name)
        tables.append(pd.DataFrame(names, index=table.index).join(table))
    return pd.concat(tables, ignore_index=True)


def _run(folder: Path) -> dict:
    manifest, error_file = _read(folder / "manifest.json"), folder / "error.txt"
    said = error_file.read_text(encoding="utf-8").splitlines() if error_file.is_file() else None
    summary = _read(folder / "summary.json") if _ended(folder) else {}
    headline = summary.get("headline", {})
    return {
        **{name: manifest[name] for name in ("run", "arm", "seed", "sweep")},
        "done": _ended(folder),
        "error": next(iter(said), "its error could not be written") if said is not None else None,
        "headline_name": headline.get("name"),
        "headline": headline.get("value"),
        **{name: summary.get(name) for name in OUTCOME},
        "model_key": manifest.get("model_key"),
        "folder": folder,
        **{f"choices.{axis}": option for axis, option in manifest["choices"].items()},
    }


def _settings(folder: Path) -> list[dict]:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return pd.json_normalize({"settings": config}).astype(str).to_dict("records")


def _lines(folder: Path, kind: str) -> list[dict]:
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    return [entry for entry in entries if entry.pop("kind") == kind]


def _steps(folder: Path) -> Iterator[dict]:
    manifest = _read(folder / "manifest.json")
    names = {manifest["model_key"]: "M_0"} | {step["key"]: f"M_{step['t']}" for step in manifest["steps"]}
    lineage = {step["t"]: step for step in manifest["steps"]}
    for entry in _lines(folder, "step"):
        step = lineage[entry["t"]]
        mixtures = dict.fromkeys(_mixture(window["weights"], names) for window in step["windows"])
        start = names.get(step["start"], step["start"][:8])
        yield entry | {"key": step["key"], "start": start, "reference": ", ".join(mixtures) or "none"}


def _mixture(weights: dict[str, float], names: dict[str, str]) -> str:
    """The weights of a reference as a sum of models: "M_1", or "0.4 M_0 + 0.6 M_1"."""
    terms = [(names.get(key, key[:8]), coefficient) for key, coefficient in weights.items()]
    return " + ".join(name if coefficient == 1 else f"{coefficient:.3g} {name}" for name, coefficient in terms)


def _measures(folder: Path) -> Iterator[dict]:
    for entry in _lines(folder, "eval"):
        for measure, numbers in entry["eval"].items():
            yield {"t": entry["t"], **_parts(measure), **numbers}


def _answers(folder: Path) -> Iterator[dict]:
    for entry in _lines(folder, "answers"):
        for row in entry["answers"]:
            for turn, (prompt, answer) in enumerate(zip(row["turns"], row["answers"], strict=True), 1):
                yield {"t": entry["t"], "id": row["id"], "turn": turn, "prompt": prompt, "answer": answer}


def _parts(measure: str) -> dict[str, str]:
    """Split `preference/<source>/gamma` into the source and `preference/gamma`; other suites have no sources."""
    suite, _, rest = measure.partition("/")
    source, _, name = rest.rpartition("/") if suite == "preference" else ("", "", rest)
    return {"measure": measure, "source": source, "name": f"{suite}/{name}"}


def _train(folder: Path) -> Iterator[dict]:
    before, last = 0, {"t": 1, "update": 0}
    for entry in _lines(folder, "train"):
        if entry["t"] != last["t"]:
            before += last["update"]
        last = entry
        yield entry | {"overall_update": before + entry["update"]}
