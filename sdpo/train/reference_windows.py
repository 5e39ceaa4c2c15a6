"""A reference rule's windows, with the artifacts that its handles mean: what a step's key and its first pass need."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sdpo.binding import choose
from sdpo.config import Config
from sdpo.launch import local as launch
from sdpo.model import hub
from sdpo.store import Artifact, Store
from sdpo.variants import reference as references


class Windows(NamedTuple):
    """`listed` is JSON, `num_updates` and `weights` by artifact key; only after the first window may weights be
    those of the moving `policy` and `reference`. `first` is the first window's model; None where nothing is read."""

    listed: list[dict]
    first: Artifact | None


def resolve(
    config: Config,
    t: int,
    num_updates: int,
    policy: Artifact,
    history: list[Artifact],
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
) -> Windows:
    """The windows of step `t`, which starts at `policy`; `history` is M_0 .. M_{t-1}.

    A first window of several models is their weighted mean, made here and kept in the store.
    """
    handles = {f"M_{i}": model for i, model in enumerate(history)} | {"policy": policy}
    if config.reference["name"] == "external":
        handles["external"] = external(config.reference)
    rule = choose(references, {name: value for name, value in config.reference.items() if name != "placebo"})
    windows = rule(t, num_updates)
    if not windows:
        return Windows([], None)
    keys = {handle: model.key for handle, model in handles.items()}
    listed = [{"num_updates": windows[0].num_updates, "weights": _by_key(windows[0].weights, keys)}]
    keys.pop("policy")  # from here on it has moved
    listed += [{"num_updates": w.num_updates, "weights": _by_key(w.weights, keys)} for w in windows[1:]]
    by_key = {model.key: model for model in handles.values()}
    return Windows(listed, _mean(listed[0]["weights"], by_key, config, store, tokenizer))


def external(settings: dict) -> Artifact:
    """A reference that was made elsewhere, by content: a folder, or else a repository of the hub."""
    is_folder = Path(settings["path"]).is_dir()
    folder = hub.locate(settings["path"], settings.get("revision"), on_hub=not is_folder)
    return Artifact(hub.fingerprint(folder), folder, reused=True)


def _by_key(weights: dict[str, float], keys: dict[str, str]) -> dict[str, float]:
    """Coefficients by artifact key; handles of one artifact count together."""
    total: dict[str, float] = {}
    for handle, coefficient in weights.items():
        name = keys.get(handle, handle)
        total[name] = total.get(name, 0.0) + coefficient
    return total


def _mean(
    weights: dict[str, float],
    by_key: dict[str, Artifact],
    config: Config,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
) -> Artifact:
    """The model whose weights are this mean, accumulated in fp32."""
    if len(weights) == 1:
        return by_key[next(iter(weights))]

    def build(folder: Path) -> None:
        if launch.is_main():
            trusted = config.model.trust_remote_code
            parts = ((c, hub.load(by_key[key].folder, trust_remote_code=trusted)) for key, c in weights.items())
            coefficient, model = next(parts)
            state = {name: coefficient * tensor for name, tensor in model.state_dict().items()}
            for coefficient, other in parts:
                for name, tensor in other.state_dict().items():
                    state[name] += coefficient * tensor
            hub.save(model, state, tokenizer, folder)

    return store.make("mean", {"weights": weights}, build)
