"""Judges with the package alpaca_eval: prompts, order of answers, parsing, length control. Replies are our endpoint's.

As AlpacaEval 2 prescribes, each prompt is asked once, in an order that the package draws from the instruction. Of the
annotator's settings, those of its endpoint (model, price, client) are replaced by evaluate.judge's.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import yaml
from huggingface_hub import hf_hub_download

from sdpo.data.prompts import Prompt
from sdpo.errors import UserError, one_line
from sdpo.evals import result_files
from sdpo.evals.judge.alpaca_package import alpaca_eval
from sdpo.evals.judge.case import MODEL, Asking, Case, labelled
from sdpo.evals.judge.chat_endpoint import Endpoint, Reply, ask, digest
from sdpo.stats import Measure, Measures, around, as_measure, length_controlled, mean
from sdpo.store.artifacts import Store

# digest of AlpacaEval's 805 instructions, in the order of its data set and of all results/*/model_outputs.json
INSTRUCTIONS = "c5770d532bf3f697"
DATA_SET, DIFFICULTIES = "tatsu-lab/alpaca_eval", "df_gamed.csv"  # on the Hub, with the instructions' difficulties
OF_ENDPOINT = {"model_name", "client_kwargs", "price_per_token", "requires_chatml"}
ASKED = {"max_tokens", "temperature", "logprobs", "top_logprobs"}


class AlpacaEval:
    """An annotator of the package."""

    pairwise = True

    def __init__(self, annotator: str):
        """Raises UserError if the package is missing, or has no such annotator that asks a chat endpoint for text."""
        folder = alpaca_eval().constants.EVALUATORS_CONFIG_DIR
        self.annotator, self.package = annotator, f"alpaca_eval {version('alpaca_eval')}"
        file = folder / annotator / "configs.yaml"
        if not annotator or not file.is_file():
            known = sorted(path.parent.name for path in folder.glob("*/configs.yaml"))
            raise UserError(f"{self.package} has no annotator {annotator!r}; it has {', '.join(known)}")
        configs = list(yaml.safe_load(file.read_text()).values())
        settings = configs[0].get("completions_kwargs", {})
        template = (folder / configs[0]["prompt_template"]).read_text()
        unread = settings.keys() - OF_ENDPOINT - ASKED
        chat = configs[0].get("fn_completions") == "openai_completions" and template.lstrip().startswith("<|im_start|>")
        if len(configs) > 1 or configs[0].get("batch_size", 1) > 1 or unread or not chat:
            raise UserError(
                f"the annotator {annotator} asks in a way that is not built ({', '.join(sorted(unread)) or 'no chat'}):"
                " use weighted_alpaca_eval_gpt4_turbo, which reads log-probs, or alpaca_eval_gpt4, which reads text"
            )
        top = settings.get("top_logprobs") if settings.get("logprobs") else None
        self.asking = Asking(settings["max_tokens"], float(settings["temperature"]), top)
        parsing = {key: configs[0].get(key) for key in ("fn_completion_parser", "completion_parser_kwargs")}
        self.label = {
            "protocol": self.package,
            "annotator": annotator,
            "prompt": digest([template, parsing | {"randomized": configs[0].get("is_randomize_output_order", True)}]),
        }

    def check(self, prompts: list[Prompt]) -> None:
        """Raise UserError if the published length control applies and the data that it reads cannot be had."""
        if not _are_alpaca_eval(prompts):
            return
        try:
            hf_hub_download(DATA_SET, DIFFICULTIES, repo_type="dataset")
        except OSError as error:  # errors of the Hub's client are some, too
            raise UserError(
                f"AlpacaEval's length control reads {DIFFICULTIES} of {DATA_SET} on the Hub, which cannot be had "
                f"({one_line(error)[:200]}): with a connection, run `hf download --repo-type dataset {DATA_SET} "
                f"{DIFFICULTIES}` once"
            ) from error

    def verdicts(self, case: Case, endpoint: Endpoint, store: Store) -> list[dict[str, Any]]:
        """The package's annotations, without the texts; `preference` is None if the reply has no verdict."""
        about = {"judge": endpoint.model} | self.label
        versions: dict[str, None] = {}

        def complete(prompts: list[str], **_: Any) -> dict[str, list]:
            to_chat = alpaca_eval().utils.prompt_to_chatml
            replies = ask(endpoint, [to_chat(prompt.strip()) for prompt in prompts], about, store)
            versions.update(dict.fromkeys(reply.version for reply in replies))
            return {"completions": [reply.text or " " for reply in replies], "completions_all": _choices(replies)}

        with _quiet():
            pool = alpaca_eval().annotators.PairwiseAnnotator(annotators_config=self.annotator, caching_path=None)
            (single,) = pool.annotators.values()
            single.fn_completions = complete
            outputs = [
                [
                    {"instruction": prompt.turns[0], "output": answer, "generator": generator}
                    for prompt, answer in zip(case.prompts, answers, strict=True)
                ]
                for answers, generator in ((case.theirs, case.opponent), (case.first, MODEL))
            ]
            rows = pool.annotate_head2head(*outputs, is_ordered=True, chunksize=None)
        return [
            self.label
            | {
                "generator_1": row["generator_1"],
                "generator_2": row["generator_2"],
                "preference": _number(row["preference"]),
                "version": ", ".join(versions),
            }
            for row in rows
        ]

    def measures(self, verdicts: list[dict[str, Any]], case: Case) -> Measures:
        """AlpacaEval's win rate, as it is and length-controlled."""
        if not verdicts:
            return {}
        found = result_files.alpaca_annotations(verdicts)[MODEL] | {"alpaca_eval/longer": mean(case.longer)}
        parts = [*dict.fromkeys(row["version"] for row in verdicts), self.package, self.annotator]
        parts += [f"prompt {self.label['prompt']}", f"against {case.opponent}"]
        controlled, method = self._length_controlled(verdicts, case)
        return labelled(found, *parts) | labelled({"alpaca_eval/length_controlled": controlled}, *parts, method)

    def _length_controlled(self, verdicts: list[dict[str, Any]], case: Case) -> tuple[Measure, str]:
        """The length-controlled win rate, and the method: the package's, which needs AlpacaEval's own instructions."""
        if _are_alpaca_eval(case.prompts):
            texts = zip(verdicts, case.theirs, case.first, strict=True)
            rows = [row | {"output_1": theirs, "output_2": ours} for row, theirs, ours in texts]
            with _quiet():
                found = alpaca_eval().metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
            value, error = found["length_controlled_winrate"] / 100, found["lc_standard_error"] / 100
            return as_measure(around(float(value), float(error), len(rows))), "length control of the package"
        wins_N = np.array([np.nan if row["preference"] is None else row["preference"] - 1 for row in verdicts])
        known_N = ~np.isnan(wins_N)
        controlled = length_controlled(wins_N[known_N], np.array(case.longer)[known_N]) if known_N.any() else mean([])
        return controlled, "length control of sdpo: no instruction difficulties, for these are not AlpacaEval's prompts"


def _are_alpaca_eval(prompts: list[Prompt]) -> bool:
    return digest([prompt.turns[0] for prompt in prompts]) == INSTRUCTIONS


def _choices(replies: list[Reply]) -> list[dict[str, Any]]:
    return [{"text": reply.text, "logprobs": reply.logprobs} for reply in replies]


def _number(preference: Any) -> float | None:
    return None if preference is None or math.isnan(preference) else float(preference)


@contextmanager
def _quiet() -> Iterator[None]:
    """The package uses arguments of scikit-learn and pandas that newer versions announce to remove."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
