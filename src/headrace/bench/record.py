"""The raw record of a run: one row per request, kept whole; every number in a report is computed from it.

All times are nanoseconds of `headrace.clock`. 0 means that the stage was not reached. The backend's four stamps are
host times: on CUDA, `started` to `computed` is the time to launch the model, not to finish it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

PHASES = ("first", "warm_up", "measured")
STATUSES = ("unanswered", "ok", "error", "wrong", "shed")  # shed: refused for want of room

RECORD_DTYPE = np.dtype(
    [
        ("index", np.int32),  # order of sending, over all phases
        ("phase", np.int8),  # into PHASES
        ("batch", np.int32),  # which prepared batch was sent
        ("rows", np.int32),
        ("scheduled_ns", np.int64),  # when the plan wanted it sent
        ("issued_ns", np.int64),  # when it was handed to the transport
        ("received_ns", np.int64),  # taken from the request queue by the backend
        ("started_ns", np.int64),  # the forward call began
        ("computed_ns", np.int64),  # the forward call returned
        ("responded_ns", np.int64),  # the answer, on the CPU, was handed to the response queue
        ("completed_ns", np.int64),  # the answer was in the client's hands
        ("worker", np.int16),  # which predict thread, or lane
        ("batch_rows", np.int32),  # rows of the batch that it was computed in; 0 in records of older versions
        ("generator", np.int16),  # which process sent it
        ("status", np.int8),  # into STATUSES
    ]
)

Records = npt.NDArray[np.void]  # of RECORD_DTYPE
WORDS = {"phase": PHASES, "status": STATUSES}
# Moments that follow each other are far smaller as differences: of 64,245 requests 0.94 MB were left of 2.44.
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": list(WORDS),
    "column_encoding": {name: "DELTA_BINARY_PACKED" for name in RECORD_DTYPE.names or () if name not in WORDS},
}


def empty_records(count: int) -> Records:
    """Return `count` unanswered records, their memory touched, so that stamping one never allocates."""
    records = np.zeros(count, dtype=RECORD_DTYPE)
    records["index"] = np.arange(count)
    return records


def measured(records: Records) -> Records:
    chosen: Records = records[records["phase"] == PHASES.index("measured")]
    return chosen


def write_records(records: Records, path: Path) -> None:
    """Write Parquet (zstd), phases and statuses as words."""
    pq.write_table(as_table(records), path, **PARQUET)


def as_table(records: Records) -> pa.Table:
    """Return records as Parquet holds them."""
    columns: dict[str, pa.Array] = {name: pa.array(records[name]) for name in RECORD_DTYPE.names or ()}
    for name, words in WORDS.items():
        columns[name] = pa.DictionaryArray.from_arrays(columns[name], pa.array(words))
    return pa.table(columns)


def read_records(path: Path) -> Records:
    """Read what `write_records` wrote, a column at a time: at its height it needs the records and two columns more."""
    file = pq.ParquetFile(path)
    records = empty_records(file.metadata.num_rows)
    for name in set(RECORD_DTYPE.names or ()) & set(file.schema_arrow.names):
        column = file.read(columns=[name]).column(0)
        if name in WORDS:
            records[name] = _codes(column, WORDS[name])
        else:
            records[name] = column.to_numpy()
    return records


def _codes(column: pa.ChunkedArray, words: tuple[str, ...]) -> npt.NDArray[np.int8]:
    """Return each word's place in `words`. Raises ValueError for a word that is not there."""
    coded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    if isinstance(coded, pa.ChunkedArray):  # of no rows
        return np.empty(0, dtype=np.int8)
    places = np.array([words.index(word) for word in coded.dictionary.to_pylist()], dtype=np.int8)
    codes: npt.NDArray[np.int8] = places[coded.indices.to_numpy()]
    return codes
