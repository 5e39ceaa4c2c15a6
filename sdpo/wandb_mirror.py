"""The W&B copy of one run. Only this file imports wandb."""

import dataclasses
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.config import Config
from sdpo.console import tell
from sdpo.errors import UserError, one_line
from sdpo.metrics import OUTCOME, Entry

if TYPE_CHECKING:
    import wandb

OTHER_RUNS = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID")  # these would merge this run into another one


class WandbMirror:
    """One W&B run that repeats the metrics of one run folder."""

    def __init__(self, folder: Path, config: Config, arm: str, choices: dict[str, str], sweep: str | None = None):
        """Start the W&B run; `choices` are the options by axis. Raises UserError if W&B cannot start."""
        for name in OTHER_RUNS:
            os.environ.pop(name, None)
        import wandb  # here, because the import takes a second and most runs do not need it

        online = config.record.mode == "online"
        try:
            if online and not wandb.login(prompt=False):
                raise UserError(
                    "record.mode=online finds no W&B credentials: set WANDB_API_KEY or run `wandb login` "
                    "(and leave WANDB_MODE unset), or keep record.mode=offline and upload later with `wandb sync`"
                )
            self._run = wandb.init(
                project=config.record.project,
                dir=folder,
                id=_replace_mirror(folder / "wandb"),
                name=folder.name,
                group=sweep,
                tags=[f"{axis}={choice}"[:64] for axis, choice in choices.items()],  # 64: W&B's limit
                config=dataclasses.asdict(config) | {"arm": arm, "choices": choices},
                mode="online" if online else "offline",
                reinit="create_new",
                settings=_silent(wandb.Settings),
            )
        except wandb.Error as error:
            raise UserError(f"W&B does not start: {one_line(error)}; record.mode=offline needs no network") from error
        self._updates: dict[int, int] = {}  # step -> number of its updates so far
        self._samples: list[tuple] = []
        self._answers: dict[tuple, dict[str, str]] = {}  # (prompt id, turn) -> a row of the table of answers
        self._run.define_metric("train/*", step_metric="updates")
        self._run.define_metric("step/*", step_metric="t")
        self._run.define_metric("eval/*", step_metric="t")

    def log(self, entry: Entry, flat: Entry) -> None:
        """Log an entry; `flat` is the same entry by W&B's names."""
        if entry["kind"] == "train":
            self._updates[entry["t"]] = entry["update"]
            if flat.pop("train/samples", None):
                flat["samples"] = self._samples_so_far(entry)
        if entry["kind"] == "answers":
            flat = {"answers": self._side_by_side(entry)}
        axes = {"t": entry["t"], "updates": sum(self._updates.values())}  # neither ever decreases
        self._run.log(axes | {name: value for name, value in flat.items() if value is not None})

    def _samples_so_far(self, entry: Entry) -> "wandb.Table":
        """All answers to the prompts of probe.file so far, a row each."""
        import wandb

        rows = [(row["prompt"], row["answer"]) for row in entry["samples"]]
        self._samples += [(entry["t"], entry["update"], *row) for row in rows]
        return wandb.Table(columns=["t", "update", "prompt", "answer"], data=self._samples)

    def _side_by_side(self, entry: Entry) -> "wandb.Table":
        """All answers so far as a table with a row per prompt and turn, and a column per model."""
        import wandb

        for row in entry["answers"]:
            for turn, (question, answer) in enumerate(zip(row["turns"], row["answers"], strict=True), 1):
                cells = self._answers.setdefault((row["id"], turn), {"id": str(row["id"]), "prompt": question})
                cells[f"M_{entry['t']}"] = answer
        columns = list(dict.fromkeys(name for cells in self._answers.values() for name in cells))
        rows = [[cells.get(name) for name in columns] for cells in self._answers.values()]
        return wandb.Table(columns=[*columns], data=rows)

    def conclude(self, manifest: Entry, summary: Entry) -> None:
        """Add the manifest to W&B's configuration, and the headline and the outcome to its summary."""
        self._run.config.update({"manifest": manifest})
        headline = {"headline": summary["headline"]["value"]}
        headline |= {f"headline_{name}": summary["headline"][name] for name in ("name", "n")}
        self._run.summary.update(headline | {name: summary[name] for name in (*OUTCOME, "spent")})

    def finish(self, exit_code: int) -> None:
        """End the W&B run; an exit code other than 0 marks it as failed."""
        import wandb

        self._run.finish(exit_code=exit_code)
        wandb.teardown()  # wait for W&B's service, which writes the last records after `finish` has returned
        if self._run.offline:
            tell(f"to upload W&B's copy: wandb sync {self._run.settings.sync_dir}")


def _replace_mirror(folder: Path) -> str:
    """Remove the files of an earlier attempt and return the id of this run, which all its attempts share.

    W&B replaces a run if another one starts with its id, so all attempts are one run there too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*run-*"):
        shutil.rmtree(earlier)
    name = folder / "id"
    if not name.is_file():
        name.write_text(uuid.uuid4().hex)
    return name.read_text()


def _silent(settings: type) -> Any:
    """W&B's settings without console output and capture, links, code, git state, host name and machine statistics."""
    return settings(
        silent=True,
        console="off",
        symlink=False,
        disable_git=True,
        disable_code=True,
        save_code=False,
        host="",
        finish_timeout=600,  # seconds; without a network the run ends all the same, because its numbers are on disk
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
