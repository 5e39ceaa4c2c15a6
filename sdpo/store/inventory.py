"""`python -m sdpo.store list|verify|prune`: what the store holds, whether it is whole, what no run needs.

Everything is read from manifests as JSON; no model is loaded.
"""

import json
import re
import time
from argparse import ArgumentParser
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sdpo.console import columns
from sdpo.errors import UserError
from sdpo.store.artifacts import Artifact, Store, damaged, is_current, manifest_of
from sdpo.store.publishing import remove

KEY = re.compile(r"\b[0-9a-f]{64}\b")
DAY = 24 * 3600  # seconds after which what a process left unfinished counts as abandoned


class Entry(NamedTuple):
    """An artifact of the store, or what an abandoned process left of one (then without a key)."""

    kind: str
    key: str
    folder: Path
    size: int  # bytes
    parents: set[str]  # the keys that its manifest names: what it was made from
    is_model: bool
    is_current: bool = True  # whether this version of the code stored it


def entries(store: Store) -> list[Entry]:
    """Every artifact of the store, by kind and key."""
    return [_entry(path) for path in sorted(store.root.glob("[!.]*/[0-9a-f]*/manifest.json"))]


def _entry(path: Path) -> Entry:
    manifest = manifest_of(path.parent)
    if manifest is None:
        raise UserError(f"{path} cannot be read; remove {path.parent} and start again")
    parents = set(KEY.findall(path.read_text())) - {manifest["key"], *manifest["files"].values()}
    is_model = any(path.parent.glob("model*.safetensors"))
    size, current = _size(path.parent), is_current(manifest)
    return Entry(manifest["kind"], manifest["key"], path.parent, size, parents, is_model, current)


def leftovers(store: Store) -> list[Entry]:
    """What processes left that ended long ago: unfinished artifacts, and checkpoints of steps that are finished."""
    found = []
    for folder in [*store.root.glob("*/tmp-*"), *store.root.glob("partial/*")]:
        with suppress(FileNotFoundError):  # a run that goes on has just renamed or removed it
            is_finished = (store.root / "step" / folder.name / "manifest.json").is_file()
            if is_finished or time.time() - folder.stat().st_mtime > DAY:
                found.append(Entry("unfinished", "", folder, _size(folder), set(), is_model=False))
    return found


def needed(stored: list[Entry], runs: list[Path], keep: str) -> set[str]:
    """The keys that finished runs need: of the models that they keep, and of what was measured on these.

    `keep` is all, last, or the numbers of steps with commas between them.
    """
    models = set[str]()
    for run in runs:
        manifest = json.loads((run / "manifest.json").read_text())
        steps = {step["t"]: step["key"] for step in manifest["steps"]}
        dropped = {key for t, key in steps.items() if not _is_kept(t, max(steps), keep)}
        models |= set(KEY.findall(json.dumps(manifest))) - dropped
    return models | {one.key for one in stored if not one.is_model and (not one.parents or one.parents & models)}


def _is_kept(t: int, last: int, keep: str) -> bool:
    return keep == "all" or (t == last if keep == "last" else str(t) in keep.split(","))


def find_runs(folders: list[Path]) -> list[Path]:
    """The run folders in some folders. Raises UserError if there are none."""
    runs = sorted({path.parent for folder in folders for path in folder.rglob("config.yaml")})
    if not runs:
        raise UserError(f"no run folder in {', '.join(map(str, folders))}: name the folders that hold all runs")
    return runs


def list_entries(store: Store, folders: list[Path]) -> str:
    """A line per artifact, which names the runs in `folders` that hold it, and a sum per kind."""
    stored, users = entries(store), _users(find_runs(folders) if folders else [])
    rows = [
        (e.kind, e.key[:16], _text(e.size), " ".join(sorted(key[:16] for key in e.parents)), " ".join(users[e.key]))
        for e in stored
    ]
    lines = columns([("kind", "key", "size", "made from", "runs" if folders else ""), *rows]) if rows else []
    sums = Counter[str]()
    for one in [*stored, *leftovers(store)]:
        sums[one.kind] += one.size
    return "\n".join(lines + [f"{kind}: {_text(size)}" for kind, size in sums.items()])


def _users(runs: list[Path]) -> dict[str, list[str]]:
    """Key -> the names of the runs whose manifests hold it."""
    users = defaultdict(list)
    for run in runs:
        for key in set(KEY.findall((run / "manifest.json").read_text())):
            users[key].append(run.name)
    return users


def verify(store: Store) -> str:
    """Read every file, and count the artifacts. Raises UserError if one is not what was stored.

    Artifacts of other versions of this code are counted apart: their hashes are others, and no run reads them.
    """
    found = entries(store)
    stored = [one for one in found if one.is_current]
    moved = [one.folder for one in found if one.folder != store.folder(one.kind, one.key)]
    bad = moved + [one.folder for one in stored if damaged(Artifact(one.key, one.folder, reused=True))]
    others = len(found) - len(stored)
    if bad:
        raise UserError(f"{len(bad)} artifacts have changed: {', '.join(map(str, bad))}; remove them and start again")
    unread = f"; {others} of another version of sdpo were not read" if others else ""
    return f"{len(stored)} artifacts are what was stored{unread}"


def prune(store: Store, folders: list[Path], keep: str, abandon: bool, confirmed: bool) -> str:
    """List what no run in `folders` needs, and remove it if that is `confirmed`, with the links of runs to it.

    Raises UserError if a run is not finished, whose needs nobody knows, unless `abandon` is set.
    """
    runs = find_runs(folders)
    finished = [run for run in runs if (run / "done").is_file()]
    if len(finished) < len(runs) and not abandon:
        open_run = min(set(runs) - set(finished))
        raise UserError(f"{open_run} is not finished: finish it, or add --abandon to lose what it has done")
    stored = entries(store)
    wanted = needed(stored, finished, keep)
    surplus = [one for one in stored if one.key not in wanted] + leftovers(store)
    if confirmed:
        for one in surplus:
            remove(one.folder)
        for link in (link for run in runs for link in run.glob("steps/*")):
            if not link.exists():
                link.unlink()
    lines = [f"{one.folder}  {_text(one.size)}" for one in surplus]
    total = _text(sum(one.size for one in surplus))
    return "\n".join([*lines, f"{total} {'removed' if confirmed else 'can be removed: add --yes'}"])


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def main() -> None:
    """Do what the command asks for."""
    parser = ArgumentParser("python -m sdpo.store", description="What the store (SDPO_STORE) holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="every artifact, its size, what it was made from, whose it is")
    listing.add_argument("runs", nargs="*", type=Path, help="folders with the runs to name")
    commands.add_parser("verify", help="read every file and compare it with the hash that was stored")
    pruning = commands.add_parser("prune", help="list or remove what no run needs")
    pruning.add_argument("runs", nargs="+", type=Path, help="folders that hold all runs which use the store")
    pruning.add_argument("--keep", default="all", help="models of a run that stay: all | last | numbers, as 1,3")
    pruning.add_argument("--abandon", action="store_true", help="also what only unfinished runs would need")
    pruning.add_argument("--yes", action="store_true", help="remove it; without this it is only listed")
    given = parser.parse_args()
    if given.command == "list":
        print(list_entries(Store(), given.runs))
    elif given.command == "verify":
        print(verify(Store()))
    else:
        print(prune(Store(), given.runs, given.keep, given.abandon, given.yes))
