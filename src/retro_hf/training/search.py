"""Finding the neighbors of training chunks, and what identifies a result."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable

import numpy as np

from ..arguments import whole
from ..datastore import EmbeddingSearcher, HybridSearcher, LexicalSearcher, RetroDatastore, Searcher, chunk_texts
from ..datastore.atomic_files import digest_of
from ..datastore.chunks import ranges
from ..errors import DatasetError, RetrieverError
from ..retriever import RetroRetriever
from .own_text import Text, search_without_copies


# Far above what a model can read; each takes eight bytes for every chunk of a dataset.
MOST_NEIGHBORS = 1 << 16


def datastore_of(retriever: RetroRetriever | RetroDatastore) -> RetroDatastore:
    """The datastore of a retriever, or the datastore itself; RetrieverError for anything else."""
    if not isinstance(retriever, (RetroRetriever, RetroDatastore)):
        raise RetrieverError(
            f"The retriever is of type {type(retriever).__name__}. Pass a RetroRetriever or a RetroDatastore."
        )
    return retriever if isinstance(retriever, RetroDatastore) else retriever.datastore


def wanted_neighbors(retriever: RetroRetriever | RetroDatastore | None, num_neighbors: int | None) -> int:
    """The number of neighbors asked for, else the retriever's, else the paper's 2."""
    if num_neighbors is None:
        return retriever.num_neighbors if isinstance(retriever, RetroRetriever) else 2
    return whole("num_neighbors", num_neighbors, RetrieverError, most=MOST_NEIGHBORS)


def neighbor_source(datastore: RetroDatastore, num_neighbors: int) -> str:
    """JSON that identifies what chunk ids refer to, wherever the datastore's folder is.

    It has one digest per shard, because appending to a datastore does not change the chunk ids of its first shards.
    """
    manifest = datastore.manifest
    shards, files = [], manifest.files_by_shard()
    for shard in manifest.shards:
        digests = {kind: entry.sha256 for kind, entry in files[shard.name].items()}
        stream = [digests.get(kind, "") for kind in ("tokens", "doc_offsets", "doc_lengths", "chunk_starts")]
        # Datasets on disk have this very digest, so it must not change.
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


def search_digest(retriever: RetroRetriever | RetroDatastore, *settings: object) -> str:
    """A digest of how neighbors are found and of other settings: the fingerprint of a kept result."""
    searcher = retriever if isinstance(retriever, RetroDatastore) else retriever.searcher
    files = [entry.sha256 for entry in datastore_of(retriever).manifest.files]
    min_score = None if isinstance(retriever, RetroDatastore) else retriever.min_score
    return digest_of(*files, _identity(searcher), f"without copies, {min_score}", *map(str, settings))[:16]


def _identity(searcher: Searcher | RetroDatastore) -> str:
    if isinstance(searcher, HybridSearcher):
        return f"{searcher.metric} ({_identity(searcher.dense)}, {_identity(searcher.lexical)})"
    if isinstance(searcher, (RetroDatastore, LexicalSearcher)):
        return type(searcher).__name__
    if isinstance(searcher, EmbeddingSearcher) and searcher.index is searcher.datastore:
        return RetroDatastore.__name__
    # The content of any other index may have changed, so its results are never found again.
    return uuid.uuid4().hex


def neighbors_of_windows(
    retriever: RetroRetriever | RetroDatastore,
    tokens: np.ndarray,
    lengths: np.ndarray,
    num_neighbors: int,
    documents: np.ndarray | None,
    starts: np.ndarray | None,
) -> tuple[np.ndarray, int]:
    """The neighbors of every complete chunk of some windows, none of them from the windows' own documents.

    A neighbor equal to the chunk and its continuation is left out. If no id names the window's document, that neighbor's
    document is taken for it and left out whole.

    Args:
        tokens (`np.ndarray` of integers and shape `(lengths.sum(),)`): the windows one after another.
        lengths (`np.ndarray` of int64 and shape `(num_windows,)`): tokens of each window.
        documents (`np.ndarray` of int64 and shape `(num_windows, any)`, *optional*): numbers of the stored documents to
            exclude for each window, its own first; -1 for none.
        starts (`np.ndarray` of int64 and shape `(num_windows,)`, *optional*): position of each window in its document. A
            chunk that is itself in the datastore then uses its stored key as the query.
    Returns:
        Chunk ids, int64 of shape `((lengths // chunk_size).sum(), num_neighbors)`, -1 where there are no more; and for how
        many chunks a copy of the text was left out.
    Raises:
        DatasetError: if a chunk must be embedded, but there is only a datastore.
    """
    datastore = datastore_of(retriever)
    size = datastore.chunk_size
    counts = lengths // size
    chunks = tokens[ranges(np.cumsum(lengths) - lengths, counts * size)].reshape(-1, size).astype(np.int64)
    if not len(chunks):
        return np.empty((0, num_neighbors), dtype=np.int64), 0
    # The end-of-text token of a document is not part of its text; the stored chunk ends before it.
    last = np.cumsum(lengths)[lengths > 0] - 1
    without_end = tokens.astype(np.int64)
    without_end[last[tokens[last] == datastore.tokenizer.eos_token_id]] = -1
    text = Text.of_windows(without_end, lengths, size)
    hidden = np.full((len(lengths), 1), -1, dtype=np.int64) if documents is None else documents
    places = np.full(len(chunks), -1, dtype=np.int64)
    # A stored key can be a query only if queries are embedded as chunks are.
    if documents is not None and starts is not None and "query" not in datastore.manifest.embedder:
        places = _stored_places(datastore, documents[:, 0], starts, counts)
    search, queries = _search_and_queries(retriever, chunks, text, places)
    return search_without_copies(
        datastore,
        lambda rows, count, excluded: search(queries[rows], count, exclude_documents=excluded),
        text,
        num_neighbors,
        owners=np.repeat(np.arange(len(lengths)), counts),
        excluded=np.repeat(hidden, counts, axis=0),
        has_id=np.repeat((hidden >= 0).any(axis=1), counts),
        is_training=True,
        min_score=None if isinstance(retriever, RetroDatastore) else retriever.min_score,
    )


def _search_and_queries(
    retriever: RetroRetriever | RetroDatastore, chunks: np.ndarray, text: Text, places: np.ndarray
) -> tuple[Callable[..., tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """How to search, and the query of each chunk: its text, or its vector, which is the stored one where it is stored.

    Args:
        chunks (`np.ndarray` of int64 and shape `(num_chunks, m)`), text ([`Text`]): token ids, and the same without padding.
        places (`np.ndarray` of int64 and shape `(num_chunks,)`): the chunk ids that they would have; -1 for none.
    """
    datastore = datastore_of(retriever)
    searcher = retriever if isinstance(retriever, RetroDatastore) else retriever.searcher
    if not isinstance(searcher, (RetroDatastore, EmbeddingSearcher)):
        texts = np.array(chunk_texts(retriever.tokenizer, chunks), dtype=object)
        return lambda texts, *args, **options: searcher.search(texts.tolist(), *args, **options), texts
    queries = np.empty((len(chunks), datastore.manifest.dim), dtype=np.float32)
    is_stored = np.zeros(len(chunks), dtype=bool)
    if (places >= 0).any():
        stored, mask = datastore.gather(places)
        is_stored = (np.where(mask == 1, stored, -1)[:, : chunks.shape[1]] == text.chunks).all(axis=1)
        is_stored &= text.chunks[:, 0] >= 0
        queries[is_stored] = datastore.keys_of(places[is_stored])
    if not is_stored.all():
        if isinstance(searcher, RetroDatastore):
            raise DatasetError(
                f"{np.count_nonzero(~is_stored)} of {len(chunks)} chunks have no stored key that can be their query. Pass a "
                "RetroRetriever, which can embed them, instead of the datastore."
            )
        queries[~is_stored] = searcher.embedder.embed_queries(chunk_texts(retriever.tokenizer, chunks[~is_stored]))
    return searcher.search if isinstance(searcher, RetroDatastore) else searcher.search_vectors, queries


def _stored_places(
    datastore: RetroDatastore, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Chunk ids that windows would have in the datastore: `counts[i]` from token `starts[i]` of `documents[i]` on.

    -1 for a document that is not in the datastore, for a place past its end, and for windows off the chunk grid.
    """
    usable = (documents >= 0) & (starts % datastore.chunk_size == 0)
    numbers = np.maximum(documents, 0)
    # The chunks of a document have consecutive ids.
    # A window that starts at token 128 of a document whose first chunk is 40 begins, with chunks of 64, at chunk 42.
    first = datastore.first_chunks(numbers) + starts // datastore.chunk_size
    ends = np.repeat(np.where(usable, datastore.first_chunks(numbers + 1), -1), counts)
    places = ranges(first, counts)
    return np.where(places < ends, places, -1)
