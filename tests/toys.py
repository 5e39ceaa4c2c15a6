"""What a run on the toy sources starts from, for tests of what happens before its first step."""

from conftest import compose

from sdpo import inputs
from sdpo.store import Store


def prepare(toy, folder, *overrides):
    """The configuration and inputs of a run on the toy, with its store in `folder`."""
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]"]
    base += ["data.template=plain", "optim.lr=3e-3", "optim.pairs_per_update=12"]
    settings = compose(*base, *overrides)
    return settings, inputs.prepare(settings, Store(folder))
