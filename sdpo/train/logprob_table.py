"""Tables of log-probs as parquet files: columns `id`, `chosen` and `rejected`, one row per pair."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdpo.types import TokenPair


def write(path: Path, rows: list[TokenPair], logps_N2: np.ndarray) -> None:
    """Write the log-probs of these rows."""
    columns = {"id": [row.id for row in rows], "chosen": logps_N2[:, 0], "rejected": logps_N2[:, 1]}
    pq.write_table(pa.table(columns), path)


def read(path: Path) -> np.ndarray:
    """The log-probs [N, 2], in the order of the rows that they were written for."""
    table = pq.read_table(path)
    return np.stack([table["chosen"].to_numpy(), table["rejected"].to_numpy()], axis=1)
