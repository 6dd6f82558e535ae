"""Which neighbors a model reads: those found, none, random ones, another chunk's, or those of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..arguments import listed, shown
from ..datastore import EmbeddingSearcher, RetroDatastore, chunk_texts
from ..errors import RetrieverError
from ..progress import progress_bar
from ..retriever import RetroRetriever
from ..training.exclusion import documents_by_row
from ..training.own_text import Text, search_without_copies, tell_lookups
from .cache import ArrayCache
from .scoring import TokenizedDocument


if TYPE_CHECKING:
    from ..datastore import VectorIndex

MODES = {
    "off": "no neighbors",
    "on": "the neighbors that the retriever finds",
    "random": "as many random chunks of the datastore",
    "shuffled": "the neighbors of another chunk of the same document",
    "oracle": "cheating: the neighbors found for the chunk that is to be predicted",
    "in_context": "the base model alone, with the neighbors of on in its prompt",
}
NeighborIds = list[np.ndarray]
"""For each document the chunk ids of the neighbors of its complete chunks: int64 of shape
`(num_complete_chunks, num_neighbors)`, best first, -1 for none."""

_BLOCK_CHUNKS = 1024


@dataclass(frozen=True)
class Run:
    """One way to score the documents: a mode, or a point of a sweep.

    Attributes:
        name (`str`): a mode, `"k=5"` or `"fraction=0.1"`.
        chunk_ids (`NeighborIds`, *optional*): the neighbors; `None` for no retrieval.
        num_neighbors (`int`): neighbors per chunk.
        fraction (`float`, *optional*): share of the datastore's documents, in a sweep over it.
        num_documents, num_chunks (`int`): size of the datastore that was searched, in a sweep.
    """

    name: str
    chunk_ids: NeighborIds | None
    num_neighbors: int = 0
    fraction: float | None = None
    num_documents: int = 0
    num_chunks: int = 0


@dataclass(frozen=True)
class Chunks:
    """All chunks of some documents, one after another, including the short chunks that end documents.

    With documents of 10 and 16 tokens and 8 tokens per chunk, `counts` is [2, 2] and `complete` is [1, 2].

    Attributes:
        rows, mask (`np.ndarray` of int64 and bool, and shape `(num_chunks, chunk_size)`): token ids; `False` at padding.
        counts (`np.ndarray` of int64 and shape `(num_documents,)`): chunks of each document.
        complete (`np.ndarray` of int64 and shape `(num_documents,)`): complete chunks of each document. Only these get
            neighbors.
    """

    rows: np.ndarray
    mask: np.ndarray
    counts: np.ndarray
    complete: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[TokenizedDocument], chunk_size: int) -> Chunks:
        """Cut documents into chunks."""
        lengths = np.array([len(document.input_ids) for document in documents], dtype=np.int64)
        counts = -(-lengths // chunk_size)
        rows = np.zeros((int(counts.sum()), chunk_size), dtype=np.int64)
        mask = np.zeros(rows.shape, dtype=bool)
        for document, start in zip(documents, (np.cumsum(counts) - counts).tolist(), strict=True):
            place = slice(start * chunk_size, start * chunk_size + len(document.input_ids))
            rows.reshape(-1)[place] = document.input_ids
            mask.reshape(-1)[place] = True
        return cls(rows, mask, counts, lengths // chunk_size)

    @property
    def starts(self) -> np.ndarray:
        """The first chunk of each document."""
        return np.cumsum(self.counts) - self.counts

    def by_document(self, values: np.ndarray) -> list[np.ndarray]:
        """Split an array with one row per chunk into one array per document."""
        return np.split(values, self.starts[1:])

    def complete_by_document(self, values: np.ndarray) -> NeighborIds:
        """The same, without the rows of short chunks."""
        return [rows[:count] for rows, count in zip(self.by_document(values), self.complete, strict=True)]

    def read_by_each(self, chunk_ids: NeighborIds) -> np.ndarray:
        """The neighbors that the tokens of each chunk read, int64 of shape `(num_chunks, num_neighbors)`.

        These are the neighbors of the chunk before it. -1 for the first chunk of a document, which reads nothing.
        """
        shifted = np.full((len(self.rows), chunk_ids[0].shape[1]), -1, dtype=np.int64)
        for start, count, ids in zip(self.starts.tolist(), self.counts.tolist(), chunk_ids, strict=True):
            shifted[start + 1 : start + count] = ids[: count - 1]
        return shifted


class NeighborSearch:
    """Finds the neighbors of all chunks of some documents. Each chunk is embedded once, for any number of searches.

    A chunk gets no neighbors from the datastore's document of the same id, and none that is equal to the chunk and its
    continuation. Where no id names the document, the whole document of such a neighbor is left out.

    Args:
        retriever ([`RetroRetriever`]): finds the neighbors.
        documents (`Sequence[TokenizedDocument]`): the documents.
        chunks ([`Chunks`]): the chunks of these documents.
        cache ([`ArrayCache`], *optional*): keeps the vectors, so that a resumed run does not embed again.
        show_progress (`bool`, *optional*): whether to show a progress bar; by default only on a terminal.
    """

    def __init__(
        self,
        retriever: RetroRetriever,
        documents: Sequence[TokenizedDocument],
        chunks: Chunks,
        *,
        cache: ArrayCache | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self.retriever = retriever
        self.chunks = chunks
        own = documents_by_row(retriever.datastore, [document.id for document in documents])
        self.num_same_id = int((own >= 0).any(axis=1).sum())
        self._own = np.repeat(own, chunks.counts, axis=0)
        self._owners = np.repeat(np.arange(len(documents)), chunks.counts)
        # What follows a chunk is the next chunk of the same document. -2 marks the end of the text, and -1 the padding of
        # a neighbor; the two are never equal.
        rows = np.where(chunks.mask, chunks.rows, -2)
        following = np.full_like(rows, -2)
        following[:-1] = np.where((self._owners[1:] == self._owners[:-1])[:, None], rows[1:], -2)
        self._text = Text(rows, following)
        self._vectors: np.ndarray | None = None
        # A subclass may search in its own way, so it is asked as generation asks it.
        if type(retriever) is RetroRetriever and type(retriever.searcher) is EmbeddingSearcher:
            self._vectors = self._embed(retriever.searcher.embedder, cache or ArrayCache(), show_progress)

    def _embed(self, embedder: Any, cache: ArrayCache, show_progress: bool | None) -> np.ndarray:
        """Vectors of all chunks, float32 of shape `(num_chunks, dim)`."""
        identity = f"{embedder.query_fingerprint} {embedder.dtype} {embedder.device.type}"
        parts = [np.empty((0, embedder.dim), dtype=np.float32)]
        with progress_bar(show_progress, total=len(self.chunks.rows), unit="chunk", desc="Embedding chunks") as bar:
            for block in self._blocks():
                texts = chunk_texts(self.retriever.tokenizer, self.chunks.rows[block], self.chunks.mask[block])
                embed = partial(embedder.embed_queries, texts)
                parts.append(cache.load_or_compute("vectors", [identity, *texts], embed))
                bar.update(len(texts))
        return np.concatenate(parts)

    def _blocks(self) -> list[slice]:
        return [slice(start, start + _BLOCK_CHUNKS) for start in range(0, len(self.chunks.rows), _BLOCK_CHUNKS)]

    def nearest(self, num_neighbors: int, index: VectorIndex | None = None) -> np.ndarray:
        """The neighbors of every chunk, including short ones.

        Args:
            num_neighbors (`int`): neighbors per chunk.
            index ([`VectorIndex`], *optional*): where to search instead of the whole datastore.
        Returns:
            `np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`: chunk ids, best first, -1 for none.
        Raises:
            RetrieverError: for an index, if the retriever does not search by vectors.
        """
        if index is not None and self._vectors is None:
            raise RetrieverError(
                f"Fractions of a datastore are searched by vectors, but this retriever uses a "
                f"{type(self.retriever.searcher).__name__}. Write each fraction with `datastore.subset(folder, fraction=...)` "
                "and evaluate with a retriever over it."
            )
        parts = [np.empty((0, num_neighbors), dtype=np.int64)]
        num_copied = 0
        for block in self._blocks():
            found, copied = search_without_copies(
                self.retriever.datastore,
                partial(self._search, block, index),
                Text(self._text.chunks[block], self._text.following[block]),
                num_neighbors,
                owners=self._owners[block],
                excluded=self._own[block],
                has_id=np.asarray((self._own[block] >= 0).any(axis=1)),
                is_training=False,
                min_score=self.retriever.min_score,
            )
            parts.append(found)
            num_copied += copied
        found = np.concatenate(parts)
        if index is None:
            tell_lookups("the scored documents", np.asarray((found < 0).all(axis=1)), num_copied)
        return found

    def _search(
        self, block: slice, index: VectorIndex | None, rows: np.ndarray, count: int, excluded: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._vectors is not None:
            searcher: Any = self.retriever.searcher
            search = searcher.search_vectors if index is None else index.search
            scores, ids = search(self._vectors[block][rows], count, exclude_documents=excluded)
            return np.asarray(scores), np.asarray(ids, dtype=np.int64)
        found = self.retriever.search(
            torch.from_numpy(self.chunks.rows[block][rows]),
            torch.from_numpy(self.chunks.mask[block][rows].astype(np.int64)),
            num_neighbors=count,
            exclude_documents=excluded,
        )
        return np.asarray(found.scores), np.asarray(found.chunk_ids, dtype=np.int64)


def check_modes(modes: Iterable[str], known: Sequence[str], *, has_neighbors: bool) -> tuple[str, ...]:
    """Check the names of modes, and that neighbors are available to those that need some.

    Returns:
        `tuple[str, ...]`: the modes.
    Raises:
        ValueError: for an unknown mode, and for a mode other than `off` without neighbors.
    """
    found = tuple(listed(modes) or ())
    if not found:
        raise ValueError(f"modes is {shown(modes)}, but it must be a list of {list(known)}.")
    if unknown := [mode for mode in found if not isinstance(mode, str) or mode not in known]:
        raise ValueError(f"Unknown modes {shown(unknown)}; choose from {list(known)}.")
    if not has_neighbors and set(found) != {"off"}:
        raise ValueError(f"The modes {list(found)} need neighbors. Pass `retriever=`, or measure `modes=('off',)`.")
    return found


def neighbors_by_mode(
    datastore: RetroDatastore, chunks: Chunks, nearest: np.ndarray, seed: int
) -> dict[str, NeighborIds | None]:
    """The neighbors of each mode, from those found for every chunk: int64 of shape `(num_chunks, num_neighbors)`."""
    on = chunks.complete_by_document(nearest)
    return {
        "off": None,
        "on": on,
        "random": random_neighbors(datastore, on, seed),
        "shuffled": shuffled_neighbors(on, seed),
        "oracle": oracle_neighbors(datastore, chunks.by_document(nearest), chunks.complete.tolist()),
    }


def random_neighbors(datastore: RetroDatastore, found: NeighborIds, seed: int) -> NeighborIds:
    """As many random chunks of the datastore as were found for each chunk, drawn uniformly."""
    # A generator per document, so that the length of one does not move the draws of the next.
    # Where nothing was found, nothing is drawn. A retriever that is often silent would otherwise beat this control only
    # because it reads less.
    return [
        np.where(ids < 0, -1, datastore.random_chunks(np.random.default_rng([seed, number]), ids.shape))
        for number, ids in enumerate(found)
    ]


def shuffled_neighbors(found: NeighborIds, seed: int) -> NeighborIds:
    """For each chunk the neighbors of another chunk of its document; none if there is no other chunk."""
    result = []
    for number, ids in enumerate(found):
        generator = np.random.default_rng([seed, number, 1])
        shuffled = np.full_like(ids, -1)
        for place in range(len(ids)):
            # Not those of the next chunk: these are the oracle's.
            others = np.setdiff1d(np.arange(len(ids)), (place, place + 1))
            if len(others):
                shuffled[place] = ids[generator.choice(others)]
        result.append(shuffled)
    return result


def oracle_neighbors(datastore: RetroDatastore, found: list[np.ndarray], complete: Sequence[int]) -> NeighborIds:
    """For each complete chunk the neighbors whose continuation is nearest to the text to predict.

    Args:
        found (`list` of int64 arrays of shape `(num_chunks, num_neighbors)`): of each document, with its short chunk.
        complete (`Sequence[int]`): number of complete chunks of each document.
    """
    # The next chunk is looked up, and of each result the chunk before it is given, because a model has learned that the
    # continuation of its own chunk is in the continuation of a neighbor. With results [5, 8] for chunk 3, chunk 2 reads
    # [4, 7]; if 8 begins its document, [4, 8].
    result = []
    for ids, count in zip(found, complete, strict=True):
        before = np.maximum(ids - 1, -1)
        answers = np.where(datastore.document_of(before) == datastore.document_of(ids), before, ids)
        result.append(np.concatenate([answers, np.full((1, ids.shape[1]), -1, dtype=np.int64)])[1 : count + 1])
    return result
