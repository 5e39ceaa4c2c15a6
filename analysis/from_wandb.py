"""Run folders from W&B: from its offline folders or from an online project.

    python -m analysis.from_wandb WANDB_FOLDER_OR_PROJECT... --out FOLDER

They hold manifest.json, config.yaml, metrics.jsonl and summary.json as the run wrote them. So `collect.runs`, `steps`,
`measures`, `train` and the tables read them like other run folders; log-probabilities of single pairs are not in W&B.
"""

import argparse
import json
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from analysis.collect import MAYBE_NULL
from sdpo.errors import UserError
from sdpo.metrics import OUTCOME

Row = dict[str, Any]

BLOCK = 32768  # bytes of a block in LevelDB's log format; the client writes that format after a header of its own
HEADER = 7  # bytes of the file's header, and of the header of every fragment
FULL, LAST = 1, 4  # the types of fragment that complete a record


class Mirrored(NamedTuple):
    """One W&B run; `rows` are its history in order, without undefined values."""

    name: str
    config: dict[str, Any]
    rows: list[Row]
    summary: dict[str, Any]
    finished: bool  # it ended without an error


def offline(file: Path) -> Mirrored:
    """The run in a `.wandb` file. Raises UserError if it is not such a file."""
    config, summary, rows, name, code = Row(), Row(), [], "", None
    for record in records(file):
        if record.HasField("run"):
            name = record.run.display_name
            config |= _values(record.run.config.update)
        elif record.HasField("config"):
            config |= _values(record.config.update)
        elif record.HasField("summary"):
            summary |= _values(record.summary.update)
        elif record.HasField("history"):
            rows.append(_values(record.history.item))
        elif record.HasField("exit"):
            code = record.exit.exit_code
    return Mirrored(name, config, rows, summary, code == 0)


def online(project: str) -> Iterator[Mirrored]:
    """The runs of `ENTITY/PROJECT`. Raises UserError if W&B does not return them."""
    import wandb

    try:
        runs = list(wandb.Api().runs(project))
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"{project} is neither a folder nor a project that W&B can read: {error}") from error
    for run in runs:
        rows = [{key: value for key, value in row.items() if value is not None} for row in run.scan_history()]
        yield Mirrored(run.name, dict(run.config), rows, dict(run.summary), run.state == "finished")


def records(file: Path) -> Iterator:
    """The records (protobuf messages) of a `.wandb` file, without one that was incomplete when the run died."""
    from wandb.proto import wandb_internal_pb2

    read_record = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]  # protobuf defines it at import
    data, position, body = file.read_bytes(), HEADER, b""
    if data[:4] != b":W&B":
        raise UserError(f"{file} was not written by the W&B client")
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too short for a header: the block ends in zeros
            position += BLOCK - position % BLOCK
            continue
        _, length, fragment = struct.unpack_from("<IHB", data, position)  # checksum, bytes, type of fragment
        body += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if fragment in (FULL, LAST) and position <= len(data):
            yield read_record(body)
            body = b""


def entries(rows: Iterable[Row]) -> Iterator[dict]:
    """The lines of metrics.jsonl from which these rows were made. Answers are missing: W&B holds them as a table."""
    reached: dict[int, int] = {}  # step -> updates of the run up to the step's last row
    for row in rows:
        kind = next((name.partition("/")[0] for name in row if "/" in name), None)
        if kind is None:
            continue
        t, values = row["t"], {name.partition("/")[2]: value for name, value in row.items() if "/" in name}
        before = max((updates for step, updates in reached.items() if step < t), default=0)
        reached[t] = row["updates"]
        if kind == "train":
            yield {"kind": kind, "t": t, "update": row["updates"] - before} | values
        else:
            yield {"kind": kind, "t": t} | (_evaluation(values) if kind == "eval" else _step(values))


def write(run: Mirrored, out: Path) -> Path:
    """Write the run's folder into `out`, or into its sweep's folder there. Returns its path."""
    unknown = {"run": run.name, "sweep": None, "arm": run.name, "seed": run.config.get("seed")}
    manifest = run.config.get("manifest") or unknown | {"choices": run.config.get("choices", {})}
    folder = out / (manifest["sweep"] or "") / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(entries(run.rows))
    settings = {
        name: value for name, value in run.config.items() if name not in ("arm", "choices", "manifest", "_wandb")
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if run.finished and "manifest" in run.config:
        (folder / "summary.json").write_text(json.dumps(_summary(lines, run.summary), indent=1))
        (folder / "done").touch()
    return folder


def _values(items: Iterable) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _evaluation(values: Row) -> dict:
    """Measures from their parts `lab/gold`, `lab/gold/low`, `lab/gold/high`, `lab/gold/n`; missing parts were null."""
    names = sorted(name.removesuffix("/n") for name in values if name.endswith("/n"))  # W&B keeps no order
    measures = {}
    for name in names:
        parts = {part: values.get(f"{name}/{part}") for part in ("low", "high", "n")}
        version = {"version": values[f"{name}/version"]} if f"{name}/version" in values else {}
        measures[name] = {"value": values.get(name)} | parts | version
    return {"eval": measures}


def _step(values: Row) -> dict:
    sources = {name.removeprefix("sources/"): n for name, n in values.items() if name.startswith("sources/")}
    rest = {name: value for name, value in values.items() if not name.startswith("sources/")}
    return dict.fromkeys(MAYBE_NULL) | rest | {"sources": sources}


def _summary(lines: list[dict], outcome: dict[str, Any]) -> dict:
    """The content of summary.json."""
    evals = {line["t"]: line["eval"] for line in lines if line["kind"] == "eval"}
    steps = [line | {"eval": evals[line["t"]]} for line in lines if line["kind"] == "step"]
    for step in steps:
        del step["kind"]
    headline = {"value": outcome.get("headline")} | {name: outcome.get(f"headline_{name}") for name in ("name", "n")}
    rest = {name: outcome[name] for name in (*OUTCOME, "spent")}
    return {"steps": steps, "initial": {"eval": evals[0]}, "headline": headline} | rest


def _found(name: str) -> Iterable[Mirrored]:
    """The runs in a folder, or in a project if there is no such folder."""
    if not Path(name).is_dir():
        return online(name)
    files = sorted(Path(name).rglob("*.wandb"))
    if not files:
        raise UserError(f"there is no .wandb file in {name}; only runs with record=wandb write one")
    return map(offline, files)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.from_wandb", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help="folders with .wandb files at any depth, or ENTITY/PROJECT")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the run folders to")
    chosen = parser.parse_args()
    try:
        for name in chosen.what:
            for run in _found(name):
                print(write(run, chosen.out))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
