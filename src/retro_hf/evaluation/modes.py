"""Which neighbors a model is given: retrieved, none, random, another chunk's, or those of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..datastore import EmbeddingSearcher, RetroDatastore, chunk_texts
from ..errors import RetrieverError
from ..retriever import RetroRetriever
from ..training.leakage import document_numbers
from .kept import KeptBlocks, digest_of
from .scoring import Document, num_complete_chunks


if TYPE_CHECKING:
    from ..datastore import VectorIndex

__all__ = ["MODES", "Chunks", "Lookup", "Run", "as_many", "oracle_neighbors", "random_neighbors", "shuffled_neighbors"]

MODES = {
    "off": "no neighbors",
    "on": "the neighbors that the retriever finds",
    "random": "as many chunks of the datastore, drawn blindly",
    "shuffled": "the neighbors of another chunk of the same document",
    "oracle": "cheating: what is looked up with the very chunk that is to be predicted",
}
_BLOCK_CHUNKS = 1024


@dataclass(frozen=True)
class Run:
    """One way to score the documents: a mode, or a point of a sweep.

    Attributes:
        name (`str`): a mode, `"k=5"` or `"fraction=0.1"`.
        chunk_ids (`list` of int64 arrays of shape `(num_complete_chunks, num_neighbors)`, *optional*): for each document the
            neighbors of its chunks, -1 for none; `None` for no retrieval.
        num_neighbors (`int`): per chunk.
        fraction (`float`, *optional*): of the datastore's documents, in a sweep over that.
        num_documents, num_chunks (`int`): that neighbors were looked for in.
    """

    name: str
    chunk_ids: list[np.ndarray] | None
    num_neighbors: int = 0
    fraction: float | None = None
    num_documents: int = 0
    num_chunks: int = 0


@dataclass(frozen=True)
class Chunks:
    """All chunks of some documents, one after another, the short last ones of documents among them.

    Attributes:
        rows, mask (`np.ndarray` of int64 and bool, and shape `(num_chunks, chunk_size)`): token ids; `False` at padding.
        counts (`np.ndarray` of int64 and shape `(num_documents,)`): chunks of each document.
        complete (`np.ndarray` of int64 and shape `(num_documents,)`): complete chunks of each document.
    """

    rows: np.ndarray
    mask: np.ndarray
    counts: np.ndarray
    complete: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Document], chunk_size: int) -> Chunks:
        """Cut documents into chunks."""
        counts = np.array([-(-len(document.input_ids) // chunk_size) for document in documents], dtype=np.int64)
        rows = np.zeros((int(counts.sum()), chunk_size), dtype=np.int64)
        mask = np.zeros(rows.shape, dtype=bool)
        for document, start in zip(documents, (np.cumsum(counts) - counts).tolist(), strict=True):
            place = slice(start * chunk_size, start * chunk_size + len(document.input_ids))
            rows.reshape(-1)[place] = document.input_ids
            mask.reshape(-1)[place] = True
        complete = np.array([num_complete_chunks(document, chunk_size) for document in documents], dtype=np.int64)
        return cls(rows, mask, counts, complete)

    @property
    def starts(self) -> np.ndarray:
        """The first chunk of each document."""
        return np.cumsum(self.counts) - self.counts

    def by_document(self, values: np.ndarray) -> list[np.ndarray]:
        """An array with one row per chunk as one array per document."""
        return np.split(values, self.starts[1:])

    def complete_by_document(self, values: np.ndarray) -> list[np.ndarray]:
        """The same without the rows of short chunks, which are never looked up by a model."""
        return [rows[:count] for rows, count in zip(self.by_document(values), self.complete, strict=True)]

    def given(self, chunk_ids: Sequence[np.ndarray]) -> np.ndarray:
        """What a run gives for the tokens of every chunk: the neighbors of the chunk before.

        Args:
            chunk_ids (`Sequence` of int64 arrays of shape `(num_complete_chunks, num_neighbors)`): of each document.
        Returns:
            `np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`; -1 for the first chunk of a document.
        """
        shifted = np.full((len(self.rows), chunk_ids[0].shape[1]), -1, dtype=np.int64)
        for start, count, ids in zip(self.starts.tolist(), self.counts.tolist(), chunk_ids, strict=True):
            shifted[start + 1 : start + count] = ids[: count - 1]
        return shifted


class Lookup:
    """Looks the chunks of documents up; each is embedded once, however many searches follow.

    A chunk gets nothing from the datastore's document of the same id.

    Args:
        retriever ([`RetroRetriever`]): who finds the neighbors.
        documents (`Sequence[Document]`): that the chunks are of.
        chunks ([`Chunks`]): of the documents.
        kept ([`KeptBlocks`]): where vectors are kept, so that a resumed run need not embed again.
        progress: a progress bar, in chunks.
    """

    def __init__(
        self,
        retriever: RetroRetriever,
        documents: Sequence[Document],
        chunks: Chunks,
        kept: KeptBlocks,
        progress: Any,
    ) -> None:
        self.retriever = retriever
        self.chunks = chunks
        own = document_numbers(retriever.datastore, [document.id for document in documents])
        self.num_same_id = int((own >= 0).any(axis=1).sum())
        self._own = np.repeat(own, chunks.counts, axis=0)
        self._vectors: np.ndarray | None = None
        searcher = retriever.searcher
        # Only what is known through and through is taken apart; any other retriever is asked as generation asks it.
        if type(retriever) is RetroRetriever and type(searcher) is EmbeddingSearcher:
            embedder = searcher.embedder
            identity = f"{embedder.query_fingerprint} {embedder.dtype} {embedder.device.type}"
            parts = [np.empty((0, embedder.dim), dtype=np.float32)]
            for block in self._blocks():
                texts = chunk_texts(retriever.tokenizer, chunks.rows[block], chunks.mask[block])
                parts.append(
                    kept.load_or_make(
                        "vectors",
                        digest_of(identity, *texts),
                        lambda texts=texts: embedder.embed_queries(texts),  # type: ignore[misc]
                    )
                )
                progress.update(len(texts))
            self._vectors = np.concatenate(parts)

    def _blocks(self) -> list[slice]:
        total = len(self.chunks.rows)
        return [slice(start, min(start + _BLOCK_CHUNKS, total)) for start in range(0, total, _BLOCK_CHUNKS)]

    def nearest(self, num_neighbors: int, index: VectorIndex | None = None) -> np.ndarray:
        """The neighbors of every chunk, also of the short ones.

        Args:
            num_neighbors (`int`): results per chunk.
            index ([`VectorIndex`], *optional*): where to search instead of where the retriever does.
        Returns:
            `np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`: chunk ids, best first, -1 for none.
        Raises:
            RetrieverError: for an index, if the retriever does not search by vectors of its own datastore.
        """
        found = [np.empty((0, num_neighbors), dtype=np.int64)]
        for block in self._blocks():
            if self._vectors is not None:
                searcher: Any = self.retriever.searcher
                search = searcher.search_vectors if index is None else index.search
                ids = search(self._vectors[block], num_neighbors, exclude_documents=self._own[block])[1]
            elif index is None:
                ids = self.retriever.search(
                    torch.from_numpy(self.chunks.rows[block]),  # type: ignore[arg-type]
                    torch.from_numpy(self.chunks.mask[block].astype(np.int64)),  # type: ignore[arg-type]
                    num_neighbors=num_neighbors,
                    exclude_documents=self._own[block],
                ).chunk_ids
            else:
                raise RetrieverError(
                    f"Fractions of a datastore are searched by vectors, but this {type(self.retriever).__name__} searches "
                    f"with {type(self.retriever.searcher).__name__}. Write the fractions, `datastore.subset(folder, "
                    "fraction=...)`, and evaluate with a retriever over each."
                )
            found.append(np.asarray(ids, dtype=np.int64))
        return np.concatenate(found)


def random_neighbors(
    datastore: RetroDatastore, counts: Sequence[int], num_neighbors: int, seed: int
) -> list[np.ndarray]:
    """As many chunks of the datastore for each document, `(counts[i], num_neighbors)`, drawn uniformly."""
    return [
        datastore.random_chunks(np.random.default_rng([seed, number]), (int(count), num_neighbors))
        for number, count in enumerate(counts)
    ]


def as_many(drawn: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of neighbors drawn blindly only as many as were found for each chunk.

    A retriever that is silent for some chunks would else beat the control there by reading less.
    """
    return [np.where(ids < 0, -1, random[:, : ids.shape[1]]) for random, ids in zip(drawn, found, strict=True)]


def shuffled_neighbors(found: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """For each chunk the neighbors of another chunk of its document, but not of the one that follows: those are the oracle's.

    Args:
        found (`Sequence` of int64 arrays of shape `(num_complete_chunks, num_neighbors)`): of each document.
    Returns:
        The same shapes; -1 where a document has no such other chunk.
    """
    result = []
    for number, ids in enumerate(found):
        generator = np.random.default_rng([seed, number, 1])
        shuffled = np.full_like(ids, -1)
        for place in range(len(ids)):
            others = np.setdiff1d(np.arange(len(ids)), (place, place + 1))
            if len(others):
                shuffled[place] = ids[generator.choice(others)]
        result.append(shuffled)
    return result


def oracle_neighbors(
    datastore: RetroDatastore, found: Sequence[np.ndarray], complete: Sequence[int]
) -> list[np.ndarray]:
    """For each complete chunk the neighbors whose continuation is nearest to what must be predicted.

    The chunk that follows is looked up, and of what is found for it the chunk before is given: a model has learned that
    what follows its own chunk stands in the continuation of a neighbor. A chunk that begins its document is given as it is.

    Args:
        found (`Sequence` of int64 arrays of shape `(num_chunks, num_neighbors)`): of each document, also of its short chunk.
        complete (`Sequence[int]`): complete chunks of each document.
    Returns:
        `list` of arrays of shape `(complete[i], num_neighbors)`; -1 where nothing follows.
    """
    result = []
    for ids, count in zip(found, complete, strict=True):
        before = np.maximum(ids - 1, -1)
        answers = np.where(datastore.document_of(before) == datastore.document_of(ids), before, ids)
        result.append(np.concatenate([answers, np.full((1, ids.shape[1]), -1, dtype=np.int64)])[1 : count + 1])
    return result
