"""Samples as Arrow's record batches, the form in which they lie on disk."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

SAMPLES: pa.Schema = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "source": Value("string")}
).arrow_schema
"""As `datasets` reads it."""

Row = tuple[np.ndarray, np.ndarray, str]
"""Tokens and labels of a sample, (T,) int32 each, and the source of its record."""


def to_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """At least one row, copied."""
    input_ids, labels, sources = zip(*rows, strict=True)
    offsets = pa.array(np.cumsum([0, *map(len, input_ids)]), pa.int32())
    columns = [pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(part))) for part in (input_ids, labels)]
    return pa.record_batch([*columns, pa.array(sources, pa.string())], schema=SAMPLES)


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    """Its rows, as views of its memory."""
    bounds = batch.column("input_ids").offsets.to_numpy()
    input_ids, labels = (batch.column(name).values.to_numpy() for name in ("input_ids", "labels"))
    sources = batch.column("source").to_pylist()
    return [
        (input_ids[begin:end], labels[begin:end], source)
        for begin, end, source in zip(bounds, bounds[1:], sources, strict=False)
    ]
