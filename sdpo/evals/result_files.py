"""Result files of AlpacaEval, Arena-Hard and MT-Bench, as those benchmarks write them, as measures by model.

Win rates are shares from 0 to 1. Intervals treat the questions as independent, not the verdicts on one question.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sdpo.data.cells import BadRow, parse_row
from sdpo.data.readers import read_file
from sdpo.errors import UserError
from sdpo.stats import Measure, Measures, around, as_measure, mean

Row = dict[str, Any]
ByQuestion = dict[Any, list[float]]  # the scores of every question

STRONG = 3  # how often a strong verdict (>>) of Arena-Hard counts
ARENA_HARD = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B=A": 0.5, "B>A": 0.0, "B>>A": 0.0}
ARENA_HARD |= {"A<<B": 0.0, "A<B": 0.0, "B<A": 1.0, "B<<A": 1.0}  # of answer A


def read(names: list[str]) -> dict[str, Measures]:
    """The measures of every model in some result files.

    They are AlpacaEval's leaderboard (.csv) or annotations (.json), Arena-Hard's judgments (.jsonl), and MT-Bench's
    judgments of single answers (.jsonl). Raises UserError for another layout, and if two files give one measure.
    """
    found: dict[str, Measures] = defaultdict(dict)
    for name in names:
        table = read_file(name)
        try:
            rows = [parse_row(row) for _, row in table.rows]
            by_model = _layout(rows)(rows)
        except (BadRow, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{name}: is no result file of AlpacaEval, Arena-Hard or MT-Bench ({error!r})") from error
        for model, measures in by_model.items():
            if repeated := found[model].keys() & measures.keys():
                raise UserError(f"{name}: another file gives {min(repeated)} of {model} too; name one of them")
            found[model] |= measures
    return found


def _layout(rows: list[Row]) -> Any:
    """The function that reads rows with the columns of the first one."""
    columns = rows[0].keys() if rows else set()
    readers = {
        ("win_rate", "standard_error", "n_total"): _alpaca_leaderboard,
        ("generator_2", "preference"): alpaca_annotations,
        ("model", "games"): arena_hard,
        ("model", "question_id", "turn", "score"): mt_bench,
    }
    for needed, reader in readers.items():
        if columns >= set(needed):
            return reader
    raise KeyError(f"columns {', '.join(columns)}")


def _alpaca_leaderboard(rows: list[Row]) -> dict[str, Measures]:
    """AlpacaEval's own numbers, in per cent there; the model stands in the first column, which has no name."""
    found: dict[str, Measures] = {}
    for row in rows:
        n = int(row["n_total"])
        names = {"win_rate": ("win_rate", "standard_error")}
        if row.get("length_controlled_winrate"):
            names["length_controlled"] = ("length_controlled_winrate", "lc_standard_error")
        found[row[""]] = {
            f"alpaca_eval/{ours}": as_measure(around(float(row[value]) / 100, float(row[error]) / 100, n))
            for ours, (value, error) in names.items()
        }
    return found


def alpaca_annotations(rows: list[Row]) -> dict[str, Measures]:
    """`preference` is from 1 (the baseline wins) to 2 (the model wins); 0 is a draw too, and null is no verdict."""
    by_model: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        preference = row["preference"]
        missing = preference is None or math.isnan(preference)
        by_model[row["generator_2"]].append(math.nan if missing else (preference or 1.5) - 1)
    return {
        model: {"alpaca_eval/win_rate": mean(wins), "alpaca_eval/unreadable": mean([math.isnan(win) for win in wins])}
        for model, wins in by_model.items()
    }


def arena_hard(rows: list[Row]) -> dict[str, Measures]:
    """The model's answer is B in the first game and A in the second one; a question with a null score is left out."""
    found: dict[str, Measures] = defaultdict(dict)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], f"{row['category']}/" if row.get("category") else ""].append(row)
    for (model, category), members in groups.items():
        scores: ByQuestion = {}
        for row in members:
            first, second = ((game or {}).get("score") for game in row["games"])
            if first is not None and second is not None:
                lost, won = _repeated(first), _repeated(second)
                scores[row.get("uid", row.get("question_id"))] = [1 - score for score in lost] + won
        unreadable = [False] * len(scores) + [True] * (len(members) - len(scores))
        found[model][f"arena_hard/{category}win_rate"] = _mean_over_questions(scores.values())
        found[model][f"arena_hard/{category}unreadable"] = mean(unreadable)
    return found


def _repeated(verdict: str) -> list[float]:
    """The score of answer A, as often as it counts."""
    return [ARENA_HARD[verdict]] * (STRONG if ">>" in verdict or "<<" in verdict else 1)


def mt_bench(rows: list[Row]) -> dict[str, Measures]:
    """Scores from 1 to 10; -1 is no score."""
    found: dict[str, Measures] = defaultdict(dict)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for name, turns in {"score": (1, 2), "turn_1": (1,), "turn_2": (2,)}.items():
            scores: ByQuestion = defaultdict(list)
            for row in own:
                if row["turn"] in turns and row["score"] != -1:
                    scores[row["question_id"]].append(row["score"])
            found[model][f"mt_bench/{name}"] = _mean_over_questions(scores.values())
        found[model]["mt_bench/unreadable"] = mean([row["score"] == -1 for row in own])
    return found


def _mean_over_questions(scores: Iterable[list[float]]) -> Measure:
    """The mean of all scores, with the Student interval of a ratio of two sums over questions."""
    sums, counts = [sum(own) for own in scores], [len(own) for own in scores]
    n = len(sums)
    if n == 0:
        return mean([])
    value = sum(sums) / sum(counts)
    squares = sum((total - value * count) ** 2 for total, count in zip(sums, counts, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / sum(counts) if n > 1 else math.nan
    return as_measure(around(value, error, n))
