"""Columns of datasets: checking that they are there, and reading lists and texts from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import extras
from ..arguments import listed, numbers, shown
from ..errors import DatasetError


if TYPE_CHECKING:
    from datasets import Dataset

_REMEDIES = {
    "input_ids": "Tokenize it with `tokenize_documents(dataset, tokenizer, max_length=..., chunk_size=...)`",
    "neighbor_chunk_ids": "Find neighbors with `precompute_neighbors(dataset, retriever)`, or give the collator a retriever",
    "neighbor_source": "Find neighbors with `precompute_neighbors(dataset, retriever)`, or give the collator a retriever",
    "passages": "Look them up with `retrieve_passages(dataset, retriever)`, or work without any: `num_passages=0`",
    "prompt_input_ids": "Make it with `tokenize_questions(dataset, tokenizer, neighbor_size=...)`",
    "passage_input_ids": "Make it with `tokenize_questions(dataset, tokenizer, neighbor_size=...)`",
    "answers": "Each row needs a list of texts; for questions without known answers pass `with_answers=False`",
}


def check_columns(dataset: Dataset, names: Sequence[str]) -> None:
    """Check that a dataset has some columns.

    Raises:
        DatasetError: for another type, and for the first column that is missing.
    """
    if not isinstance(dataset, extras.load("datasets", "Training").Dataset):
        raise DatasetError(
            f"The dataset is of type {type(dataset).__name__}, but it must be a datasets.Dataset. Pass one split of a "
            "DatasetDict, or make one of a list with `Dataset.from_list(...)`."
        )
    for name in names:
        if name not in dataset.column_names:
            remedy = _REMEDIES.get(name, f"Rename the column that has it: `dataset.rename_column(..., {name!r})`")
            raise DatasetError(f"The dataset has no column {name!r}, only {dataset.column_names}. {remedy}.")


def check_example(example: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that an example of a batch has some columns, with values.

    Raises:
        DatasetError: for the first that is missing, or is None, as in rows that were joined from a dataset without it.
    """
    if not isinstance(example, Mapping):
        raise DatasetError(
            f"An example is of type {type(example).__name__}. Pass rows of a dataset, as `Trainer` does."
        )
    for name in names:
        if example.get(name) is None:
            raise DatasetError(
                f"The examples have no column {name!r}, only {sorted(example)}, or it is None. {_REMEDIES[name]}. If the "
                "dataset has it, Trainer dropped it: set `TrainingArguments(remove_unused_columns=False)`."
            )


def checked_examples(examples: Any) -> list[Any]:
    """The examples of a batch as a list; DatasetError if there is none."""
    if not (found := listed(examples)):
        raise DatasetError(f"The examples are {shown(examples)}. Pass a list of at least one row of a dataset.")
    return found


def token_ids(example: Mapping[str, Any], name: str) -> np.ndarray:
    """The token ids (int64, `(n,)`) in a column of an example; DatasetError for anything else."""
    ids = numbers(f"The ids in {name!r}", example[name], DatasetError, -(1 << 31), (1 << 63) - 1)
    if ids.ndim != 1:
        raise DatasetError(f"The ids in {name!r} have the shape {ids.shape}. Pass a list of integers per example.")
    return ids


def lists_of_ids(example: Mapping[str, Any], name: str) -> list[list[int]]:
    """The lists of token ids in a column of an example; DatasetError for anything else."""
    given = example[name]
    if hasattr(given, "dtype"):
        given = numbers(f"The ids in {name!r}", given, DatasetError, -(1 << 31), (1 << 63) - 1)
    if not isinstance(given, (list, tuple)) and not getattr(given, "ndim", 0):
        raise DatasetError(
            f"{name!r} is of type {type(given).__name__}. Pass a list of lists of integers per example."
        )
    return [token_ids({name: ids}, name).tolist() for ids in given]


def checked_text(value: Any, name: str, row: int) -> str:
    """A text with single spaces.

    Raises:
        DatasetError: naming the row, for another type and for an empty text.
    """
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise DatasetError(
            f"The {name} in row {row} is {value!r}, but it must be a text with at least one word. Leave such rows out with "
            "`dataset.filter`."
        )
    return text


def flattened(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The values of a column of lists one after another, and the length (int64) of each list."""
    lists = column.combine_chunks()
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return pc.list_flatten(lists), counts.astype(np.int64)


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """The lengths of the lists in a column, int64 of shape `(num_rows,)`, without making Python lists.

    Raises:
        DatasetError: for a column of something else.
    """
    try:
        return flattened(dataset.select_columns([name]).with_format("arrow")[:][name])[1]
    except pa.ArrowNotImplementedError as error:
        raise DatasetError(
            f"The column {name!r} is of type {dataset.features[name]}, but it must have a list per row. {_REMEDIES[name]}."
        ) from error
