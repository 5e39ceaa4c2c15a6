"""Tables of log-probs as parquet files: columns `id`, `chosen` and `rejected`, one row per pair."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdpo.errors import UserError, one_line
from sdpo.types import TokenPair


def write(path: Path, rows: list[TokenPair], logps_N2: np.ndarray) -> None:
    """Write the log-probs of these rows."""
    columns = {"id": [row.id for row in rows], "chosen": logps_N2[:, 0], "rejected": logps_N2[:, 1]}
    pq.write_table(pa.table(columns), path)


def read(path: Path) -> np.ndarray:
    """The log-probs [N, 2], in the order of the rows that they were written for.

    Raises UserError if the file is no whole table.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); remove its folder and start again") from error
    return np.stack([table["chosen"].to_numpy(), table["rejected"].to_numpy()], axis=1)
