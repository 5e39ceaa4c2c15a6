"""Benchmarks of a stored model: computed once by sdpo.evals.eval_harness, and kept with all that decides a score."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdpo import distributed
from sdpo.data.prompt_and_answer import as_trained
from sdpo.data.templates import Writer
from sdpo.errors import UserError
from sdpo.evals.generation import load_alone
from sdpo.model import hub
from sdpo.stats import Measures
from sdpo.store.artifacts import Artifact
from sdpo.store.hashing import hash_files
from sdpo.train.runner import Runner


def measure(name: str, model: Artifact, runner: Runner, local: str | None, batch_size: int, **options: Any) -> Measures:
    """Run `eval_harness.<name>(lm, local, **options)` on a model, or read its measures from the store.

    Raises UserError if `local` is not a folder.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"evaluate={name} needs lm-eval: pip install '.[eval]'")
    from sdpo.evals import eval_harness  # here, because lm-eval takes seconds to import

    folder = Path(local) if local else None
    if folder and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; `local` names one with copies of the benchmarks' data")
    data, tokenizer = runner.config.data, runner.tokenizer
    if options.get("asking", {}).get("apply_chat_template"):
        tokenizer = as_trained(tokenizer, data.template)
        tokenizer.chat_template = Writer(tokenizer, None, data.template_date).template()
    determinants = {
        "suite": name,
        "shares": "wilson",
        "weights": model.key,
        "tokenizer": hub.fingerprint_tokenizer(tokenizer),
        "lm_eval": version("lm_eval"),
        "local": hash_files(folder, folder.iterdir()) if folder else None,  # the content, wherever it is
        "batch_size": batch_size,
        **options,
        **runner.numerics.of_own_forward(),
    }
    if name == "h4":
        determinants["mmlu"] = "mean over subjects"
    else:
        determinants["ranks"] = distributed.world_size()  # each has random numbers of its own for sampled answers

    def compute() -> Measures:
        lm = eval_harness.DistributedHFLM(load_alone(model, runner), tokenizer, batch_size)
        return getattr(eval_harness, name)(lm, local, **options)

    return runner.store.make_json("evaluation", determinants, compute)
