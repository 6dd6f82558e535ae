"""Neighbors of a training set, computed once: documents cut into windows, and a column of chunk ids per chunk."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .. import extras
from ..datastore import (
    EmbeddingSearcher,
    HybridSearcher,
    LexicalSearcher,
    RetroDatastore,
    Searcher,
    chunk_texts,
)
from ..datastore.chunks import ranges
from ..datastore.executors import progress_bar
from ..errors import DatasetError, RetrieverError
from ..retriever import RetroRetriever
from .exclusion import duplicates_in, excluded_documents, flattened


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ID_COLUMN",
    "NEIGHBORS_COLUMN",
    "SOURCE_COLUMN",
    "START_COLUMN",
    "nearest_chunks",
    "neighbor_source",
    "neighbors_of_windows",
    "precompute_neighbors",
    "tokenize_documents",
    "way_of",
]

logger = logging.get_logger(__name__)

NEIGHBORS_COLUMN = "neighbor_chunk_ids"
SOURCE_COLUMN = "neighbor_source"
ID_COLUMN = "document_id"
START_COLUMN = "window_start"
_BATCHES_PER_BLOCK = 16


def tokenize_documents(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chunk_size: int,
    text_column: str = "text",
    id_column: str = "id",
    batch_size: int = 256,
) -> Dataset:
    """Tokenize documents as a datastore does, and cut each into training windows that begin at a chunk border.

    Windows of one document follow each other without overlap; the last one is as short as it falls. No window holds
    two documents, so none needs more than its own document excluded. A last window of a single token, which has nothing
    to predict, and documents without text are left out.

    Args:
        dataset (`datasets.Dataset`): one document per row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the language model.
        max_length (`int`): tokens per window, a multiple of `chunk_size`.
        chunk_size (`int`): tokens per chunk; m in the paper.
        text_column (`str`, defaults to `"text"`): column with the text.
        id_column (`str`, defaults to `"id"`): column with the document's id, the same as in the datastore. Without
            such a column the row number is the id, as it is in a datastore built from the same dataset.
        batch_size (`int`, defaults to 256): documents per call of the tokenizer.
    Returns:
        `datasets.Dataset` with the columns `input_ids`, `document_id` and `window_start` (the token of its document
        that a window begins with).
    Raises:
        DatasetError: if there is no text column, or `max_length` is no multiple of `chunk_size`.
    """
    if chunk_size < 1 or max_length < 2 or max_length % chunk_size:
        raise DatasetError(
            f"max_length={max_length} is not a multiple of chunk_size={chunk_size} (and at least 2). A window must begin "
            f"at a chunk border of its document. Use {max(1, max_length // max(chunk_size, 1)) * max(chunk_size, 1)}."
        )
    if text_column not in dataset.column_names:
        raise DatasetError(
            f"The dataset has no column {text_column!r}, only {dataset.column_names}. Name the column that holds the text: "
            "tokenize_documents(..., text_column=...)."
        )

    def cut(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        windows: dict[str, list[Any]] = {"input_ids": [], ID_COLUMN: [], START_COLUMN: []}
        texts = [text or "" for text in batch[text_column]]
        encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
        ids = batch[id_column] if id_column in batch else numbers
        for text, tokens, document_id in zip(texts, encoded, ids, strict=True):
            # A datastore skips documents of white space, too.
            for start in range(0, len(tokens) - 1 if text.strip() else 0, max_length):
                windows["input_ids"].append(tokens[start : start + max_length])
                windows[ID_COLUMN].append(str(document_id))
                windows[START_COLUMN].append(start)
        return windows

    datasets = extras.load("datasets", "Training")
    return dataset.map(
        cut,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                ID_COLUMN: datasets.Value("string"),
                START_COLUMN: datasets.Value("int64"),
            }
        ),
        desc="Tokenizing documents",
    )


def precompute_neighbors(
    dataset: Dataset,
    retriever: RetroRetriever | RetroDatastore,
    *,
    num_neighbors: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk_size: int | None = None,
    document_id_column: str | None = None,
    exclude_near_duplicates: bool = False,
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    show_progress: bool | None = None,
) -> Dataset:
    """Find the neighbors of every complete chunk of a tokenized dataset, once, before training.

    Section 2.3 of Borgeaud et al. (2022). A chunk gets no neighbors from its own document, whose continuation is the
    answer it must learn to predict: more results are fetched, and those of the excluded documents dropped. Where a
    chunk is itself a chunk of the datastore, its stored key is the query and nothing is embedded.

    Killed or interrupted, it goes on where it was when the same call is made again, if the result is kept on disk; at most
    a block of 16 batches is searched again.

    Args:
        dataset (`datasets.Dataset`): examples with `input_ids`, not padded, such as [`tokenize_documents`] makes them.
        retriever ([`RetroRetriever`] or [`RetroDatastore`]): where to look. A datastore alone serves where every chunk
            of the dataset is in it.
        num_neighbors (`int`, *optional*): neighbors per chunk; the retriever's number by default, 2 for a datastore.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): of the model to train; checked against the
            datastore's.
        chunk_size (`int`, *optional*): of the model to train; checked against the datastore's.
        document_id_column (`str`, *optional*): column with the id of each example's document in the datastore, or a
            list of ids (near-duplicates, all documents packed into one window); `"document_id"` by default if there is
            one. Ids that the datastore does not have exclude nothing.
        exclude_near_duplicates (`bool`, defaults to `False`): also exclude the documents that [`near_duplicates`] finds
            for a chunk's document, by the paper's rule.
        batch_size (`int`, defaults to 256): examples per search.
        cache_dir (`str` or `Path`, *optional*): a folder to keep the result in, block by block. By default a dataset that
            lies on disk has it beside its own files, and one in memory is not kept.
        show_progress (`bool`, *optional*): a progress bar; by default on a terminal only.
    Returns:
        `datasets.Dataset`: the same rows with two more columns. `neighbor_chunk_ids`: per complete chunk a list of
        `num_neighbors` chunk ids, best first, -1 for none. `neighbor_source`: JSON that says which datastore, chunk size
        and embedder they come from, so that [`RetroDataCollator`] refuses any other.
    Raises:
        DatasetError: for a dataset that is not tokenized, or padded; or a datastore alone that lacks some chunk.
        DatastoreMismatchError: if tokenizer or chunk size are not those of the datastore.
    *Determinism*: the same dataset, datastore and batch size give the same column.
    *Disk*: `8 * num_neighbors` bytes per chunk; `datasets` keeps the result and finds it again under its fingerprint.
    """
    datasets = extras.load("datasets", "Training")
    if not isinstance(dataset, datasets.Dataset):
        raise DatasetError(
            f"The dataset is of type {type(dataset).__name__}, not datasets.Dataset. Of a DatasetDict pass one split; "
            "from a list make one with `Dataset.from_list(...)`."
        )
    if "input_ids" not in dataset.column_names:
        raise DatasetError(
            f"The dataset has no column 'input_ids', only {dataset.column_names}. Tokenize it first: "
            "`tokenize_documents(dataset, tokenizer, max_length=..., chunk_size=...)`."
        )
    datastore = retriever if isinstance(retriever, RetroDatastore) else retriever.datastore
    datastore.check_compatible(tokenizer=tokenizer, chunk_size=chunk_size)
    wanted = wanted_neighbors(retriever, num_neighbors)
    id_column = _document_id_column(dataset, document_id_column)
    source = neighbor_source(datastore, wanted)

    duplicates = None
    if exclude_near_duplicates:
        if id_column is None:
            raise DatasetError(
                "Near-duplicates are those of each row's document, but the dataset has no column of document ids. Name it with "
                "`document_id_column=`."
            )
        duplicates = duplicates_in(dataset, datastore, id_column, START_COLUMN)

    def find(batch: pa.Table) -> pa.Table:
        if "attention_mask" in batch.column_names and pc.min(flattened(batch["attention_mask"])[0]).as_py() == 0:
            raise DatasetError("The examples are padded (attention_mask has zeros). Tokenize them without padding.")
        values, lengths = flattened(batch["input_ids"])
        counts = lengths // datastore.chunk_size
        found = neighbors_of_windows(
            retriever,
            values.to_numpy(zero_copy_only=False),
            lengths,
            wanted,
            excluded_documents(datastore, batch[id_column], duplicates) if id_column else None,
            batch[START_COLUMN].to_numpy() if START_COLUMN in batch.column_names else None,
        )
        chunks = pa.ListArray.from_arrays(
            np.arange(len(found) + 1, dtype=np.int32) * np.int32(wanted), pa.array(found.reshape(-1))
        )
        neighbors = pa.ListArray.from_arrays(np.cumsum([0, *counts]).astype(np.int32), chunks)
        batch = batch.drop_columns([name for name in (NEIGHBORS_COLUMN, SOURCE_COLUMN) if name in batch.column_names])
        batch = batch.append_column(NEIGHBORS_COLUMN, neighbors)
        return batch.append_column(SOURCE_COLUMN, pa.repeat(source, len(batch)))

    features = dataset.features.copy()
    features.update(
        {
            NEIGHBORS_COLUMN: datasets.List(datasets.List(datasets.Value("int64"))),
            SOURCE_COLUMN: datasets.Value("string"),
        }
    )
    # The fingerprint `datasets` would make hashes the pickled retriever, which only knows paths.
    files = [entry.sha256 for entry in datastore.manifest.files]
    way = way_of(datastore if isinstance(retriever, RetroDatastore) else retriever.searcher)
    identity = f"{dataset._fingerprint} {source} {files} {id_column} {batch_size} {way} {exclude_near_duplicates}"
    if cache_dir is not None:
        try:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(
                f"cache_dir {str(cache_dir)!r} cannot be made a folder: {error}. Name a folder that can be written to, or leave it out."
            ) from error
    step, parts = batch_size * _BATCHES_PER_BLOCK, []
    with (
        progress_bar(show_progress, total=len(dataset), unit="row", desc="Finding neighbors") as progress,
        _without_bars_of_datasets(),
    ):
        # By blocks, each with a file of its own: what a killed run has finished is found again.
        for start in range(0, max(1, len(dataset)), step):
            block = dataset.with_format("arrow").select(range(start, min(start + step, len(dataset))))
            fingerprint = hashlib.sha256(f"{identity} {start}".encode()).hexdigest()[:16]
            parts.append(
                block.map(
                    find,
                    batched=True,
                    batch_size=batch_size,
                    features=features,
                    new_fingerprint=fingerprint,
                    cache_file_name=None
                    if cache_dir is None
                    else str(Path(cache_dir) / f"neighbors-{fingerprint}.arrow"),
                )
            )
            progress.update(len(block))
    result = datasets.concatenate_datasets(parts)
    form = dataset.format
    shown = None
    if len(form["columns"]) < len(dataset.column_names):
        shown = list(dict.fromkeys([*form["columns"], NEIGHBORS_COLUMN, SOURCE_COLUMN]))
    return result.with_format(
        form["type"], columns=shown, output_all_columns=form["output_all_columns"], **form["format_kwargs"]
    )


@contextmanager
def _without_bars_of_datasets() -> Iterator[None]:
    """One bar for the whole, instead of one for each block."""
    datasets = extras.load("datasets", "Training")
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def wanted_neighbors(retriever: RetroRetriever | RetroDatastore | None, num_neighbors: int | None) -> int:
    """The number asked for, else the retriever's, else the paper's 2."""
    if num_neighbors is not None and (not isinstance(num_neighbors, (int, np.integer)) or num_neighbors < 1):
        raise RetrieverError(
            f"num_neighbors is {num_neighbors!r}, but it must be an integer of at least 1. Leave it out for the retriever's own."
        )
    return num_neighbors or (retriever.num_neighbors if isinstance(retriever, RetroRetriever) else 2)


def neighbor_source(datastore: RetroDatastore, num_neighbors: int) -> str:
    """JSON that identifies what chunk ids refer to: the token streams and their borders, wherever the folder lies.

    One digest per shard: appending to the datastore leaves the ids of its first shards what they are.
    """
    manifest = datastore.manifest
    shards = []
    for shard in manifest.shards:
        digests = {entry.kind: entry.sha256 for entry in manifest.files if entry.shard == shard.name}
        stream = [digests.get(kind, "") for kind in ("tokens", "doc_offsets", "doc_lengths", "chunk_starts")]
        shards.append(hashlib.sha256(" ".join(stream).encode()).hexdigest()[:16])
    content = {
        "datastore": shards,
        "chunk_size": datastore.chunk_size,
        "num_neighbors": num_neighbors,
        "embedder": manifest.embedder["name"],
        "embedder_fingerprint": manifest.embedder["fingerprint"][:16],
        **({"query_fingerprint": query["fingerprint"][:16]} if (query := manifest.embedder.get("query")) else {}),
        "tokenizer_fingerprint": manifest.tokenizer["fingerprint"][:16],
    }
    return json.dumps(content, sort_keys=True)


def complete_chunks(input_ids: Sequence[int] | np.ndarray, chunk_size: int) -> np.ndarray:
    """The complete chunks of one sequence, int64 of shape `(len(input_ids) // chunk_size, chunk_size)`."""
    complete = len(input_ids) // chunk_size
    return np.asarray(input_ids[: complete * chunk_size], dtype=np.int64).reshape(complete, chunk_size)


def neighbors_of_windows(
    retriever: RetroRetriever | RetroDatastore,
    tokens: np.ndarray,
    lengths: np.ndarray,
    num_neighbors: int,
    documents: np.ndarray | None,
    starts: np.ndarray | None,
) -> np.ndarray:
    """The neighbors of every complete chunk of some windows, none from the windows' own documents.

    Args:
        tokens (`np.ndarray` of integers and shape `(lengths.sum(),)`): the windows one after another.
        lengths (`np.ndarray` of int64 and shape `(num_windows,)`): tokens of each.
        documents (`np.ndarray` of int64 and shape `(num_windows, any)`, *optional*): documents of the datastore that a
            window must get nothing from, its own first; -1 for none.
        starts (`np.ndarray` of int64 and shape `(num_windows,)`, *optional*): the token of its document that a window
            begins with; where the chunk is in the datastore, its stored key is the query.
    Returns:
        `np.ndarray` of int64 and shape `((lengths // chunk_size).sum(), num_neighbors)`; -1 where there are no more.
    """
    datastore = retriever if isinstance(retriever, RetroDatastore) else retriever.datastore
    size = datastore.chunk_size
    counts = lengths // size
    chunks = tokens[ranges(np.cumsum(lengths) - lengths, counts * size)].reshape(-1, size).astype(np.int64)
    places = None
    if documents is None:
        documents = np.full((len(lengths), 1), -1, dtype=np.int64)
    elif starts is not None:
        places = _stored_places(datastore, documents[:, 0], starts, counts)
    excluded = np.repeat(documents, counts, axis=0)
    return nearest_chunks(retriever, chunks, num_neighbors, exclude_documents=excluded, candidates=places)


def nearest_chunks(
    retriever: RetroRetriever | RetroDatastore,
    chunks: np.ndarray,
    num_neighbors: int,
    *,
    exclude_documents: np.ndarray,
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """The nearest chunks of many chunks in one search.

    Args:
        retriever ([`RetroRetriever`] or [`RetroDatastore`]): where to look.
        chunks (`np.ndarray` of int64 and shape `(num_chunks, chunk_size)`): complete chunks.
        num_neighbors (`int`): results per chunk.
        exclude_documents (`np.ndarray` of int64 and shape `(num_chunks, any)`): document numbers, -1 for none.
        candidates (`np.ndarray` of int64 and shape `(num_chunks,)`, *optional*): chunk ids where the very same tokens
            may lie in the datastore, -1 for none; where they do, the stored key is the query, if queries are embedded as
            chunks are.
    Returns:
        `np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`; -1 where there are no more.
    """
    datastore = retriever if isinstance(retriever, RetroDatastore) else retriever.datastore
    if not len(chunks):
        return np.empty((0, num_neighbors), dtype=np.int64)
    searcher = retriever if isinstance(retriever, RetroDatastore) else retriever.searcher
    if not isinstance(searcher, (RetroDatastore, EmbeddingSearcher)):
        texts = chunk_texts(retriever.tokenizer, chunks)
        return searcher.search(texts, num_neighbors, exclude_documents=exclude_documents)[1]
    queries = np.empty((len(chunks), datastore.manifest.dim), dtype=np.float32)
    known = np.zeros(len(chunks), dtype=bool)
    # A key is a query only where both are embedded alike.
    symmetric = "query" not in datastore.manifest.embedder
    if candidates is not None and symmetric:
        tokens, mask = datastore.gather(candidates)
        size = datastore.chunk_size
        known = ((tokens[:, :size] == chunks) & (mask[:, :size] == 1)).all(axis=1)
        queries[known] = datastore.keys_of(candidates[known])
    if not known.all():
        if isinstance(searcher, RetroDatastore):
            reason = (
                f"{np.count_nonzero(~known)} of {len(chunks)} chunks are not in the datastore under their document's id, so "
                "they have no stored key and"
                if symmetric
                else "The datastore was built for queries that are embedded in another way than its chunks, so they"
            )
            raise DatasetError(
                f"{reason} must be embedded. Pass a RetroRetriever, which has the embedder, instead of the datastore alone."
            )
        queries[~known] = searcher.embedder.embed_queries(chunk_texts(retriever.tokenizer, chunks[~known]))
    search = searcher.search if isinstance(searcher, RetroDatastore) else searcher.search_vectors
    return search(queries, num_neighbors, exclude_documents=exclude_documents)[1]


def way_of(searcher: Searcher | RetroDatastore) -> str:
    """How neighbors are found, for the fingerprint of a kept result."""
    if isinstance(searcher, HybridSearcher):
        return f"{searcher.metric} ({way_of(searcher.dense)}, {way_of(searcher.lexical)})"
    if isinstance(searcher, (RetroDatastore, LexicalSearcher)):
        return type(searcher).__name__
    if isinstance(searcher, EmbeddingSearcher) and searcher.index is searcher.datastore:
        return RetroDatastore.__name__
    # Nobody knows whether another index still holds what it held: its results are never found again.
    return uuid.uuid4().hex


def _stored_places(
    datastore: RetroDatastore, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Chunk ids that windows would have in the datastore: `counts[i]` from token `starts[i]` of `documents[i]` on.

    -1 for a document that is not in the datastore, for a place past its end, and off the chunk grid.
    """
    # Chunks of a document are numbered in a row.
    usable = (documents >= 0) & (starts % datastore.chunk_size == 0)
    known = np.maximum(documents, 0)
    first = datastore.first_chunks(known) + starts // datastore.chunk_size
    ends = np.repeat(np.where(usable, datastore.first_chunks(known + 1), -1), counts)
    places = ranges(first, counts)
    return np.where(places < ends, places, -1)


def _document_id_column(dataset: Dataset, column: str | None) -> str | None:
    if column is not None and column not in dataset.column_names:
        raise DatasetError(f"The dataset has no column {column!r} of document ids, only {dataset.column_names}.")
    if column is None and ID_COLUMN in dataset.column_names:
        column = ID_COLUMN
    if column is None:
        logger.warning(
            "No column of document ids: a chunk whose document is in the datastore will find itself there. Name the "
            "column with `document_id_column=`."
        )
    return column
