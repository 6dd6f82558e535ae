"""The documents that a training chunk must not retrieve from: its own document and near-duplicates of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..datastore import RetroDatastore, near_duplicates
from ..datastore.chunks import ranges
from ..datastore.documents import known_id
from ..datastore.duplicates import document_tokens
from ..errors import DatasetError
from .columns import flattened
from .windows import ID_COLUMN, START_COLUMN


if TYPE_CHECKING:
    from datasets import Dataset

_BLOCK_ROWS = 4096


def excluded_documents(
    datastore: RetroDatastore, column: pa.ChunkedArray, duplicates: Mapping[str, Sequence[int]] | None = None
) -> np.ndarray:
    """Document numbers for each row of a column. A row has one id or a list of ids.

    Args:
        duplicates (`Mapping[str, Sequence[int]]`, *optional*): document numbers that an id names besides its own.
    Returns:
        `np.ndarray` of int64 and shape `(num_rows, any)`; document numbers, -1 for none and for unknown ids.
    """
    names, counts = _ids_of(column)
    encoded = names.dictionary_encode()
    ids = encoded.dictionary.to_pylist()
    # One more place at the end, for ids that are null.
    places = pc.fill_null(encoded.indices, len(ids)).to_numpy(zero_copy_only=False)
    own = [*datastore.document_numbers(ids).tolist(), -1]
    # Two ragged steps without a loop over rows: `flat` has the numbers of each distinct id one after another, and each id of
    # the column takes its part of it. With a -> [3], b -> [5, 8] and the rows [a], [b, a], `values` is [3 | 5, 8, 3] and
    # `rows` [0 | 1, 1, 1].
    numbers = [[number, *(duplicates or {}).get(id, ())] for number, id in zip(own, [*ids, None], strict=True)]
    sizes = np.array([len(row) for row in numbers])
    flat = np.concatenate([np.array(row, dtype=np.int64) for row in numbers])
    values = flat[ranges((np.cumsum(sizes) - sizes)[places], sizes[places])]
    rows = np.repeat(np.repeat(np.arange(len(column)), counts), sizes[places])
    widths = np.bincount(rows, minlength=len(column))
    excluded = np.full((len(column), max(1, widths.max(initial=0))), -1, dtype=np.int64)
    excluded[rows, np.arange(len(rows)) - np.repeat(np.cumsum(widths) - widths, widths)] = values
    return excluded


def _ids_of(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The ids in a column of ids, or of lists of ids, as strings, and how many each row has."""
    if _has_lists(column):
        names, counts = flattened(column)
    else:
        names, counts = column.combine_chunks(), np.ones(len(column), dtype=np.int64)
    return names.cast(pa.string()), counts


def _has_lists(column: pa.ChunkedArray) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def documents_by_row(datastore: RetroDatastore, ids: Sequence[Any]) -> np.ndarray:
    """Document numbers for each row, which has one id or a list of ids: int64 of shape `(len(ids), any)`, -1 for unknown ids."""
    rows = [[known_id(id) for id in (row if isinstance(row, list) else [row])] for row in ids]
    return excluded_documents(datastore, pa.chunked_array([pa.array(rows, type=pa.list_(pa.string()))]))


def duplicates_in(dataset: Dataset, datastore: RetroDatastore) -> dict[str, list[int]]:
    """The documents of the datastore that are near-duplicates of each document of a tokenized dataset.

    A document that is in the datastore is compared as it is stored. Of any other document the windows are joined.

    Args:
        dataset (`datasets.Dataset`): with `input_ids`, `document_id`, and `window_start` where a document has several
            windows.
    Returns:
        `dict[str, list[int]]`: document numbers by id, for ids that have near-duplicates.
    Raises:
        DatasetError: if a window of several documents has one that is not in the datastore.
    """
    known: dict[str, int] = {}
    windows: dict[str, list[tuple[int, np.ndarray]]] = {}
    table = dataset.with_format("arrow")
    for start in range(0, len(dataset), _BLOCK_ROWS):
        block = table[start : start + _BLOCK_ROWS]
        names, _ = _ids_of(block[ID_COLUMN])
        ids = [id for id in names.unique().to_pylist() if id is not None and id not in known]
        known |= zip(ids, datastore.document_numbers(ids).tolist(), strict=True)
        missing = {id for id in ids if known[id] < 0} | windows.keys()
        if missing and _has_lists(block[ID_COLUMN]):
            raise DatasetError(
                f"The document {min(missing)!r} is not in the datastore and shares a window with others, so its text is not "
                "known. Give each window one id, or find the near-duplicates with `near_duplicates(texts, datastore)`."
            )
        if missing:
            _collect(windows, missing, block, names)
    stored = [id for id, number in known.items() if number >= 0]
    tokens = document_tokens(datastore, np.array([known[id] for id in stored], dtype=np.int64))
    for id, parts in windows.items():
        stored.append(id)
        tokens.append(np.concatenate([part for _, part in sorted(parts, key=lambda pair: pair[0])]))
    found = near_duplicates(tokens, datastore)
    numbers = iter(datastore.document_numbers([id for row in found for id in row]).tolist())
    rows = {id: [next(numbers) for _ in row] for id, row in zip(stored, found, strict=True)}
    # A stored document is a near-duplicate of itself, and is excluded anyway.
    others = {id: [number for number in row if number != known[id]] for id, row in rows.items()}
    return {id: row for id, row in others.items() if row}


def _collect(
    windows: dict[str, list[tuple[int, np.ndarray]]], missing: set[str], block: pa.Table, names: pa.Array
) -> None:
    """Keep position and tokens of the rows whose document is missing in the datastore."""
    values, counts = flattened(block["input_ids"])
    parts = np.split(values.to_numpy(zero_copy_only=False), np.cumsum(counts)[:-1])
    starts = block[START_COLUMN].to_pylist() if START_COLUMN in block.column_names else [0] * len(parts)
    for id, start, part in zip(names.to_pylist(), starts, parts, strict=True):
        if id in missing:
            windows.setdefault(id, []).append((start, part))
