"""The laboratory: a small world with an exact gold reward, in which an arm takes seconds and nothing is downloaded."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo import config
from sdpo.data.preferences import Preferences
from sdpo.lab.exam import Exam, set_exam
from sdpo.lab.measures import best_of_n, measure
from sdpo.lab.model import new_model, tokenizer
from sdpo.lab.pairs import demonstrations, preferences

__all__ = ["Exam", "best_of_n", "build", "demonstrations", "measure", "new_model", "tokenizer"]


def build(
    settings: config.Data, initial_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Preferences, Exam]:
    """The pairs of all sources and the exam, both partly made of S's own answers. Raises ValueError."""
    return preferences(settings, initial_model, tokenizer), set_exam(settings.lab, initial_model, tokenizer)
