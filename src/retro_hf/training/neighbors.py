"""The neighbors of a training set, computed once before training: a column with chunk ids for every chunk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .. import extras
from ..arguments import flag, path, whole
from ..datastore import RetroDatastore
from ..datastore.atomic_files import writing
from ..datastore.compatibility import check_record, vocabulary_size
from ..errors import DatasetError, DatastoreMismatchError
from ..progress import progress_bar
from ..retriever import RetroRetriever
from .columns import check_columns, flattened
from .exclusion import duplicates_in, excluded_documents
from .own_text import tell_lookups
from .search import datastore_of, neighbor_source, neighbors_of_windows, search_digest, wanted_neighbors
from .windows import ID_COLUMN, START_COLUMN, TOKENIZER_COLUMN


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

NEIGHBORS_COLUMN = "neighbor_chunk_ids"
SOURCE_COLUMN = "neighbor_source"
_BATCHES_PER_BLOCK = 16
_MOST_ROWS = 1 << 20  # of a batch


def precompute_neighbors(
    dataset: Dataset,
    retriever: RetroRetriever | RetroDatastore,
    *,
    num_neighbors: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    exclude_near_duplicates: bool = False,
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    show_progress: bool | None = None,
) -> Dataset:
    """Find the neighbors of every complete chunk of a tokenized dataset, once, before training.

    Section 2.3 of Borgeaud et al. (2022). A chunk gets no neighbors from its own document, because the continuation there
    is the answer that it must learn to predict. A neighbor equal to the chunk and its continuation is left out. If no id names
    the chunk's document (it is missing, or the datastore lacks it), that neighbor's document is taken for it and left out
    whole. If a chunk is itself in the datastore, its stored key is the query, and nothing is embedded.

    If the result is kept on disk, rerun an interrupted call to resume it: at most a block of 16 batches is searched again.

    Args:
        dataset (`datasets.Dataset`): examples with `input_ids`, not padded, as [`tokenize_documents`] makes them. The
            column `document_id` has the id of each example's document in the datastore, or a list of ids (near-duplicates,
            all documents packed into one window).
        retriever ([`RetroRetriever`] or [`RetroDatastore`]): where to search. A datastore alone is enough if every chunk
            of the dataset is in it.
        num_neighbors (`int`, *optional*): neighbors per chunk; by default the retriever's number, 2 for a datastore.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): tokenizer of the model to train, to check it
            against the datastore's. That of examples by [`tokenize_documents`] is checked without it.
        exclude_near_duplicates (`bool`, defaults to `False`): also exclude the documents that [`near_duplicates`] finds
            for a chunk's document.
        batch_size (`int`, defaults to 256): examples per search.
        cache_dir (`str` or `Path`, *optional*): folder to keep the result in, block by block. By default the result of a
            dataset on disk is kept beside its files, and that of a dataset in memory is not kept.
        show_progress (`bool`, *optional*): whether to show a progress bar; by default only on a terminal.
    Returns:
        `datasets.Dataset`: the same rows with two more columns. `neighbor_chunk_ids`: per complete chunk a list of
        `num_neighbors` chunk ids, best first, -1 for none. `neighbor_source`: JSON that identifies the datastore, chunk
        size and embedder, so that [`RetroDataCollator`] rejects any other.
    Raises:
        DatasetError: if the dataset is not tokenized or is padded, or a datastore alone lacks a chunk.
        DatastoreMismatchError: if the tokenizer, or that of the examples, is not that of the datastore.
        DatastoreWriteError: if the disk is full.
    *Determinism*: the same dataset, datastore and batch size give the same column.
    *Disk*: `8 * num_neighbors` bytes per chunk.
    """
    check_columns(dataset, ["input_ids"])
    datastore = datastore_of(retriever)
    datastore.check_compatible(tokenizer=tokenizer)
    for record in dataset.unique(TOKENIZER_COLUMN) if TOKENIZER_COLUMN in dataset.column_names else []:
        check_record(datastore, record)
    num_ids = vocabulary_size(datastore.tokenizer)
    wanted = wanted_neighbors(retriever, num_neighbors)
    batch_size = whole("batch_size", batch_size, ValueError, most=_MOST_ROWS)
    folder = None if cache_dir is None else _make_folder(cache_dir)
    exclude_near_duplicates = flag("exclude_near_duplicates", exclude_near_duplicates, DatasetError)
    source = neighbor_source(datastore, wanted)
    has_ids, duplicates = ID_COLUMN in dataset.column_names, None
    if exclude_near_duplicates:
        check_columns(dataset, [ID_COLUMN])
        duplicates = duplicates_in(dataset, datastore)
    elif not has_ids:
        logger.warning(
            f"The dataset has no column {ID_COLUMN!r}, so its own documents in the datastore are known by their text alone. If "
            f"another column has their ids, rename it: `dataset.rename_column(..., {ID_COLUMN!r})`. If none has, add one: for each window "
            "an id, or a list of the ids of its documents."
        )
    num_copied = 0

    def find(batch: pa.Table) -> pa.Table:
        if "attention_mask" in batch.column_names and pc.min(flattened(batch["attention_mask"])[0]).as_py() == 0:
            raise DatasetError("The examples are padded (attention_mask has zeros). Tokenize them without padding.")
        nonlocal num_copied
        values, lengths = flattened(batch["input_ids"])
        if len(values) and not 0 <= pc.min(values).as_py() <= pc.max(values).as_py() < num_ids:
            raise DatastoreMismatchError(
                f"The examples have ids from {pc.min(values)} to {pc.max(values)}, but the tokenizer of the datastore, "
                f"{datastore.manifest.tokenizer['name']!r}, has {num_ids:,} tokens. Tokenize them with that tokenizer, or make a copy of the "
                "datastore for another one with `datastore.retokenize('<new folder>', tokenizer)`."
            )
        found, copied = neighbors_of_windows(
            retriever,
            values.to_numpy(zero_copy_only=False),
            lengths,
            wanted,
            excluded_documents(datastore, batch[ID_COLUMN], duplicates) if has_ids else None,
            batch[START_COLUMN].to_numpy() if START_COLUMN in batch.column_names else None,
        )
        num_copied += copied
        return _with_columns(batch, found, lengths // datastore.chunk_size, source)

    features = dataset.features.copy()
    datasets = extras.load("datasets", "Training")
    features[NEIGHBORS_COLUMN] = datasets.List(datasets.List(datasets.Value("int64")))
    features[SOURCE_COLUMN] = datasets.Value("string")
    step, parts = batch_size * _BATCHES_PER_BLOCK, []
    with (
        progress_bar(show_progress, total=len(dataset), unit="row", desc="Finding neighbors") as progress,
        _without_bars_of_datasets(),
    ):
        # Each block has a file of its own, so that a killed run finds its finished blocks again.
        for start in range(0, max(1, len(dataset)), step):
            block = dataset.with_format("arrow").select(range(start, min(start + step, len(dataset))))
            # The fingerprint that `datasets` would make hashes the pickled retriever, which only knows paths.
            settings = dataset._fingerprint, source, batch_size, exclude_near_duplicates, start
            fingerprint = search_digest(retriever, *settings)
            file = None if folder is None else str(folder / f"neighbors-{fingerprint}.arrow")
            with writing(folder or Path(datasets.config.HF_DATASETS_CACHE)):
                parts.append(
                    block.map(
                        find,
                        batched=True,
                        batch_size=batch_size,
                        features=features,
                        new_fingerprint=fingerprint,
                        cache_file_name=file,
                    )
                )
            progress.update(len(block))
    result = datasets.concatenate_datasets(parts)
    rows, per_row = flattened(result.select_columns([NEIGHBORS_COLUMN]).with_format("arrow")[:][NEIGHBORS_COLUMN])
    found = pc.list_flatten(rows).to_numpy(zero_copy_only=False).reshape(-1, wanted)
    tell_lookups("the dataset", (found < 0).all(axis=1), num_copied, int((per_row == 0).sum()))
    return _in_format_of(dataset, result)


def _make_folder(cache_dir: str | os.PathLike[str]) -> Path:
    folder = path("cache_dir", cache_dir, DatasetError)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"cache_dir {str(folder)!r} cannot be created: {error}. Choose another folder.") from error
    return folder


def _with_columns(batch: pa.Table, found: np.ndarray, counts: np.ndarray, source: str) -> pa.Table:
    """The batch with its neighbors, int64 of shape `(counts.sum(), num_neighbors)`, and where they are from.

    Args:
        counts (`np.ndarray` of int64 and shape `(num_rows,)`): complete chunks of each row.
    """
    # A list per row of lists per chunk, made of borders, since Python lists of every id would take most of the time.
    ends = np.arange(len(found) + 1, dtype=np.int32) * np.int32(found.shape[1])
    chunks = pa.ListArray.from_arrays(ends, pa.array(found.reshape(-1)))
    per_row = np.cumsum([0, *counts]).astype(np.int32)
    batch = batch.drop_columns([name for name in (NEIGHBORS_COLUMN, SOURCE_COLUMN) if name in batch.column_names])
    batch = batch.append_column(NEIGHBORS_COLUMN, pa.ListArray.from_arrays(per_row, chunks))
    return batch.append_column(SOURCE_COLUMN, pa.repeat(source, len(batch)))


def _in_format_of(dataset: Dataset, result: Dataset) -> Dataset:
    """The result in the format of the dataset it was made from; its new columns are shown."""
    form, shown = dataset.format, None
    if len(form["columns"]) < len(dataset.column_names):
        shown = list(dict.fromkeys([*form["columns"], NEIGHBORS_COLUMN, SOURCE_COLUMN]))
    options = {"columns": shown, "output_all_columns": form["output_all_columns"], **form["format_kwargs"]}
    return result.with_format(form["type"], **options)


@contextmanager
def _without_bars_of_datasets() -> Iterator[None]:
    """Show one bar for the whole, instead of one for each block."""
    datasets = extras.load("datasets", "Training")
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
