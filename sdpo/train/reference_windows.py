"""Resolve a reference rule: its windows, with artifacts in place of the rule's handles."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdpo import distributed
from sdpo.binding import bind
from sdpo.config import Settings
from sdpo.model import hub
from sdpo.store.artifacts import Artifact
from sdpo.train.runner import Runner
from sdpo.train.step_key import StepSpec
from sdpo.types import Window
from sdpo.variants import reference as references


class Windows(NamedTuple):
    """The windows of one step.

    `listed` is JSON: for each window `num_updates`, and its `weights` as coefficients by artifact key. Windows after
    the first one may also have coefficients of `policy` and `reference`, which move during the step. A window with a
    `bound` may end early; how many follow, and how long they are, is known only after training (`taken`). `first` is
    the model of the first window; None if there are no windows.
    """

    listed: list[dict]
    first: Artifact | None


def resolve(spec: StepSpec, runner: Runner) -> Windows:
    """The windows of a step. If the first window averages several models, their mean is made and stored here."""
    settings = spec.config.reference
    rule = bind(references, {name: value for name, value in settings.items() if name != "placebo"})
    windows = rule(spec.t, len(spec.plan))
    if not windows:
        return Windows([], None)
    models = {f"M_{i}": model for i, model in enumerate(spec.history)} | {"policy": spec.start}
    if settings["name"] == "external":
        models["external"] = external(settings)
    keys = {handle: model.key for handle, model in models.items()}
    listed = [_listed(windows[0], keys)]
    keys.pop("policy")  # after the first window, the policy is no longer the start
    listed += [_listed(window, keys) for window in windows[1:]]
    by_key = {model.key: model for model in models.values()}
    return Windows(listed, _mean({key: (c, by_key[key]) for key, c in listed[0]["weights"].items()}, runner))


def taken(listed: list[dict], report: list[dict], num_updates: int) -> list[dict]:
    """The windows that a trained step had, each with what was found in it; `report` has one entry per window."""
    if listed and "bound" in listed[-1]:
        first, ends = listed[-1], [found["first_update"] - 1 for found in report[1:]] + [num_updates]
        weights = [first["weights"]] + [{"policy": 1.0}] * (len(report) - 1)
        lengths = np.diff([0, *ends]).tolist()
        listed = [first | {"num_updates": n, "weights": w} for n, w in zip(lengths, weights, strict=True)]
    return [window | found for window, found in zip(listed, report, strict=True)]


def external(settings: Settings) -> Artifact:
    """The model at `path`, which is a folder or a repository of the Hub. Its key is the hash of its content."""
    is_folder = Path(settings["path"]).is_dir()
    folder = hub.locate(settings["path"], settings.get("revision"), on_hub=not is_folder)
    return Artifact(hub.fingerprint(folder), folder, reused=True)


def _listed(window: Window, keys: dict[str, str]) -> dict:
    listed = {"num_updates": window.num_updates, "weights": _by_key(window.weights, keys)}
    return listed if window.bound is None else listed | {"bound": window.bound}


def _by_key(weights: dict[str, float], keys: dict[str, str]) -> dict[str, float]:
    """Coefficients by artifact key. Handles without a key keep their name; those with the same key are added up."""
    total: dict[str, float] = {}
    for handle, coefficient in weights.items():
        name = keys.get(handle, handle)
        total[name] = total.get(name, 0.0) + coefficient
    return total


def _mean(parts: dict[str, tuple[float, Artifact]], runner: Runner) -> Artifact:
    """The model whose weights are the weighted mean of these models, accumulated in fp32."""
    if len(parts) == 1:
        return next(iter(parts.values()))[1]

    def build(folder: Path) -> None:
        if distributed.is_main():
            loaded = ((coefficient, runner.load_verified(model)) for coefficient, model in parts.values())
            coefficient, mean = next(loaded)
            state = {name: coefficient * tensor for name, tensor in mean.state_dict().items()}
            for coefficient, other in loaded:
                for name, tensor in other.state_dict().items():
                    state[name] += coefficient * tensor
            hub.save(mean, state, runner.tokenizer, folder)

    weights = {key: coefficient for key, (coefficient, _) in parts.items()}
    return runner.store.make("mean", {"weights": weights}, build)
