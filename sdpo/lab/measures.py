"""The laboratory's measures: gold reward, right answers, fillers, exact KL to S, multiple choice, best of n.

A measure is {"value", "low", "high", "n"}: a mean over prompts or items with its 95 % Student interval, or a share of
right ones with Wilson's.
Shapes: P prompts, K answers per prompt, I items, C choices (the right one first).
"""

from collections.abc import Callable
from math import comb

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo.lab import world
from sdpo.lab.exam import Exam
from sdpo.model.sampling import encode, kl, response_logp, sample
from sdpo.stats import Measure, Measures, mean, share

BEST_OF = (1, 2, 4, 8, 16, 32, 64)
ANSWER_BATCH = 8  # answers per prompt that are sampled at once: the KV cache of more takes too much memory


def measure(
    model: PreTrainedModel,
    initial_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Exam,
) -> Measures:
    """All measures of a model except best of n; `initial_model` is S. All models get equal random numbers."""
    answers = sample(model, tokenizer, exam.prompts, exam.num_samples, seed=0)
    greedy_P = sample(model, tokenizer, exam.prompts, 1, seed=None).text
    text_PK = np.array(answers.text).reshape(-1, exam.num_samples)
    right_P = np.array([world.answer(prompt) for prompt in exam.prompts])
    gold_P = _gold(exam.prompts, answers.text).mean(axis=1)
    kl_PK = kl(model, initial_model, answers).double().cpu().numpy().reshape(text_PK.shape)
    right_I = _multiple_choice(model, tokenizer, exam.items)
    return {
        "lab/gold": mean(gold_P),
        "lab/exact": mean((text_PK == right_P[:, None]).mean(axis=1)),
        "lab/greedy_exact": share(right_P == greedy_P),
        "lab/fillers": mean(np.char.count(text_PK, world.FILLER).mean(axis=1)),
        "lab/kl": mean(kl_PK.mean(axis=1)),
        "lab/h4": share(right_I),
        **_by_family("lab/gold", exam.prompts, gold_P, mean),
        **_by_family("lab/h4", [item[0] for item in exam.items], right_I, share),
    }


def best_of_n(initial_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: Exam) -> Measures:
    """`lab/best_of/<n>`: the gold reward of the best of n answers of S. Its KL to S is at most log n - (n - 1)/n.

    Of K answers, the expected best of n <= K has an unbiased estimate: the i-th smallest is the best of
    (i - 1 choose n - 1) of the (K choose n) subsets.
    """
    seeds = range(BEST_OF[-1] // ANSWER_BATCH)
    batches = (sample(initial_model, tokenizer, exam.prompts, ANSWER_BATCH, one).text for one in seeds)
    gold_PK = np.concatenate([_gold(exam.prompts, text) for text in batches], axis=1)
    return {f"lab/best_of/{n}": mean(_expected_best(gold_PK, n)) for n in BEST_OF}


def _expected_best(gold_PK: np.ndarray, n: int) -> np.ndarray:
    """The expected largest of n of the K values of each prompt [P]."""
    num = gold_PK.shape[1]
    chance_K = np.array([comb(i, n - 1) / comb(num, n) for i in range(num)])
    return np.sort(gold_PK, axis=1) @ chance_K


def _gold(prompts: list[str], texts: list[str]) -> np.ndarray:
    """The gold reward [P, K] of every answer; the answers to a prompt are next to each other in `texts`."""
    each = len(texts) // len(prompts)
    return np.array([world.gold(prompts[i // each], text) for i, text in enumerate(texts)]).reshape(-1, each)


def _multiple_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[list[str]]) -> np.ndarray:
    """Whether the model gives the right choice of an item a higher log-prob than every wrong one [I]."""
    prompts = [prompt for prompt, *choices in items for _ in choices]
    texts = [choice for _, *choices in items for choice in choices]
    logp = response_logp(model, encode(tokenizer, prompts, texts, model.device))
    logp_IC = logp.view(len(items), -1)
    return (logp_IC[:, 0] > logp_IC[:, 1:].amax(dim=1)).cpu().numpy()


def _by_family(name: str, prompts: list[str], values: np.ndarray, measure: Callable[[np.ndarray], Measure]) -> Measures:
    families = np.array([world.family_of(prompt) for prompt in prompts])
    return {f"{name}/{family}": measure(values[families == family]) for family in world.FAMILIES}
