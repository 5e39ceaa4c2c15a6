"""Numbers that came with the pairs, from which score=column makes an order."""

import numpy as np

from sdpo.data.cells import BadRow, parse_row
from sdpo.data.pair_table import PairTable
from sdpo.data.readers import read_file
from sdpo.data.schemas import check_id, first_number
from sdpo.errors import UserError


def read(table: PairTable, file: str | None) -> np.ndarray:
    """The `pair_score` of each pair [N]: the data's own column, or that of a file that names pairs by their `id`.

    A file may name other pairs too. Raises UserError if it has a bad row or an id twice, and if a pair has no score.
    """
    scores = _by_id(file) if file else {pair.id: pair.pair_score for pair in table.pairs}
    missing = [id for id in table.ids if scores.get(id) is None]
    if missing:
        raise UserError(
            f"score=column needs a pair_score of every training pair, which {len(missing)} of {len(table)} lack in "
            f"{file or 'the data'}, {missing[0]} among them; add the column (data.columns can map it), or set "
            "score.file to a file with the columns id and pair_score"
        )
    return np.array([scores[id] for id in table.ids], dtype=np.float64)


def _by_id(file: str) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for number, given in read_file(file).rows:
        try:
            row = parse_row(given)
            id, score = check_id(row.get("id")), first_number(row, ["pair_score"])
        except BadRow as bad:
            raise UserError(f"{file}, row {number}: {bad}; repair it") from bad
        if id in scores:
            raise UserError(f"{file}, row {number}: the id {id!r} was used before; give every pair one score")
        scores[id] = score
    return scores
