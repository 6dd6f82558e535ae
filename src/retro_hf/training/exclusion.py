"""What a training chunk must not retrieve from: its own document and near-duplicates of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..datastore import RetroDatastore, near_duplicates
from ..datastore.chunks import ranges
from ..datastore.duplicates import document_tokens
from ..errors import DatasetError


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["document_numbers", "duplicates_in", "excluded_documents", "flattened"]

_BLOCK_ROWS = 4096


def flattened(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The values of a column of lists in a row, and the length (int64) of each list."""
    lists = column.combine_chunks()
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return pc.list_flatten(lists), counts.astype(np.int64)


def excluded_documents(
    datastore: RetroDatastore, column: pa.ChunkedArray, duplicates: Mapping[str, Sequence[int]] | None = None
) -> np.ndarray:
    """The documents that each row of a column of ids, or of lists of ids, names.

    Args:
        duplicates (`Mapping[str, Sequence[int]]`, *optional*): document numbers that an id stands for besides its own.
    Returns:
        `np.ndarray` of int64 and shape `(num_rows, widest)`; document numbers, -1 for none and for unknown ids.
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        names, counts = flattened(column)
    else:
        names, counts = column.combine_chunks(), np.ones(len(column), dtype=np.int64)
    encoded = names.cast(pa.string()).dictionary_encode()
    ids = encoded.dictionary.to_pylist()
    # The last place stands for an id that is missing.
    places = pc.fill_null(encoded.indices, len(ids)).to_numpy(zero_copy_only=False)
    own = np.append(datastore.document_numbers(ids), -1)
    if duplicates:
        numbers = [[number, *duplicates.get(id, ())] for number, id in zip(own.tolist(), [*ids, None], strict=True)]
        sizes = np.array([len(row) for row in numbers])
        values = np.concatenate([np.array(row) for row in numbers])[
            ranges((np.cumsum(sizes) - sizes)[places], sizes[places])
        ]
        rows = np.repeat(np.repeat(np.arange(len(column)), counts), sizes[places])
    else:
        values, rows = own[places], np.repeat(np.arange(len(column)), counts)
    widths = np.bincount(rows, minlength=len(column))
    excluded = np.full((len(column), max(1, widths.max(initial=0))), -1, dtype=np.int64)
    excluded[rows, np.arange(len(rows)) - np.repeat(np.cumsum(widths) - widths, widths)] = values
    return excluded


def document_numbers(datastore: RetroDatastore, ids: Sequence[Any]) -> np.ndarray:
    """Document numbers of ids, or of lists of ids; int64 of shape `(len(ids), widest)`, -1 for what isn't there."""
    rows = [[None if id is None else str(id) for id in (row if isinstance(row, list) else [row])] for row in ids]
    return excluded_documents(datastore, pa.chunked_array([pa.array(rows, type=pa.list_(pa.string()))]))


def duplicates_in(
    dataset: Dataset, datastore: RetroDatastore, id_column: str, start_column: str
) -> dict[str, list[int]]:
    """The numbers of the datastore's documents that are near-duplicates of each document of a tokenized dataset.

    A document that is in the datastore is compared as it stands there; of another the windows are put together.

    Args:
        dataset (`datasets.Dataset`): with `input_ids` and a column of document ids.
        id_column (`str`): the column of ids, or of lists of ids.
        start_column (`str`): the column, where there is one, of the token that a window begins with.
    Returns:
        `dict[str, list[int]]`: by id; only those that have near-duplicates.
    Raises:
        DatasetError: if a window of several documents has one that is not in the datastore.
    """
    known: dict[str, int] = {}
    windows: dict[str, list[tuple[int, np.ndarray]]] = {}
    table = dataset.with_format("arrow")
    for start in range(0, len(dataset), _BLOCK_ROWS):
        block = table[start : start + _BLOCK_ROWS]
        column = block[id_column]
        packed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        names = (flattened(column)[0] if packed else column.combine_chunks()).cast(pa.string())
        ids = [id for id in names.unique().to_pylist() if id is not None and id not in known]
        known |= zip(ids, datastore.document_numbers(ids).tolist(), strict=True)
        missing = {id for id in ids if known[id] < 0} | windows.keys()
        if missing and packed:
            raise DatasetError(
                f"The document {min(missing)!r} is not in the datastore and shares a window with others, so its text is "
                "unknown, and so are its near-duplicates. Give each window one id, or list the near-duplicates yourself: "
                "`near_duplicates(texts, datastore)`."
            )
        if missing:
            _collect(windows, missing, block, names, start_column)
    stored = [id for id, number in known.items() if number >= 0]
    tokens = document_tokens(datastore, np.array([known[id] for id in stored], dtype=np.int64))
    for id, parts in windows.items():
        stored.append(id)
        tokens.append(np.concatenate([part for _, part in sorted(parts, key=lambda pair: pair[0])]))
    found = near_duplicates(tokens, datastore)
    numbers = iter(datastore.document_numbers([id for row in found for id in row]).tolist())
    rows = (
        (id, [number for _ in row if (number := next(numbers)) != known[id]])
        for id, row in zip(stored, found, strict=True)
    )
    return {id: row for id, row in rows if row}


def _collect(
    windows: dict[str, list[tuple[int, np.ndarray]]],
    missing: set[str],
    block: pa.Table,
    names: pa.Array,
    start_column: str,
) -> None:
    """Keep the tokens of the rows whose document is missing in the datastore, with where they begin."""
    values, counts = flattened(block["input_ids"])
    parts = np.split(values.to_numpy(zero_copy_only=False), np.cumsum(counts)[:-1])
    starts = block[start_column].to_pylist() if start_column in block.column_names else [0] * len(parts)
    for id, start, part in zip(names.to_pylist(), starts, parts, strict=True):
        if id in missing:
            windows.setdefault(id, []).append((start, part))
