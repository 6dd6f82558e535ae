"""The datastore of a server: kept up to date, and read by one batch of requests at a time."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retro_hf.datastore.files import MANIFEST_NAME
from retro_hf.errors import RetroError


if TYPE_CHECKING:
    from retro_hf import RetrievedNeighbor, RetroRetriever

logger = logging.getLogger(__name__)

Key = tuple[int, ...]
"""The tokens of a chunk, -1 at padding."""


class UnknownDocumentError(RetroError, KeyError):
    """The store has no document of that id."""

    __str__ = Exception.__str__


class Source:
    """
    A retriever whose store may change, or go away, while a server uses it.

    Args:
        retriever ([`RetroRetriever`]): over the store.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        chunk_size (`int`): of the model.

    Attributes:
        error (`str`, *optional*): why nothing can be retrieved at present.
    Raises:
        DatastoreMismatchError: if the store belongs to another tokenizer or chunk size.
    """

    def __init__(self, retriever: RetroRetriever, tokenizer: Any, chunk_size: int) -> None:
        self.retriever = retriever
        self.error: str | None = None
        self._requirements = {"tokenizer": tokenizer, "chunk_size": chunk_size}
        retriever.datastore.check_compatible(**self._requirements)
        self._seen = self._stamp()

    @property
    def datastore(self) -> Any:
        """The store."""
        return self.retriever.datastore

    def refresh(self) -> None:
        """Open what another process has changed; if the store cannot be opened, `error` says why until it can."""
        try:
            seen = self._stamp()
            if seen == self._seen and self.error is None:
                return
            self.datastore.refresh()
            self.datastore.check_compatible(**self._requirements, embedder=self.retriever.embedder)
            self._seen, self.error = seen, None
        except (RetroError, OSError, ValueError) as error:
            logger.warning("The store cannot be read: %s", error)
            self.error = "The store cannot be read at present; the log of the server says why."  # paths stay here

    def describe(self) -> dict[str, int]:
        """The generation of the opened store, and how many documents can be found."""
        datastore = self.datastore
        return {
            "generation": datastore.generation,
            "documents": datastore.num_documents - datastore.num_deleted_documents,
        }

    def _stamp(self) -> tuple[int, ...]:
        """Changes whenever a manifest is written, which replaces the file."""
        found = os.stat(Path(self.datastore.path) / MANIFEST_NAME)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def upsert(self, documents: list[dict[str, Any]]) -> int:
        """
        Add documents. A document whose id is there already takes its place.

        Args:
            documents (`list[dict]`): each with `id` and `text`, and optionally `title`, `source` and other fields.
        Returns:
            How many replaced another.
        """
        self.refresh()
        datastore = self.datastore
        numbers = datastore.document_numbers([document["id"] for document in documents])
        replaced = [datastore.document(int(number)) for number in numbers if number >= 0]
        if replaced:
            datastore.delete([document["id"] for document in replaced])
        try:
            datastore.append(documents, embedder=self.retriever.embedder, show_progress=False)
        except BaseException:
            if replaced:
                datastore.append(replaced, embedder=self.retriever.embedder, show_progress=False)
            raise
        self._seen = self._stamp()
        return len(replaced)

    def delete(self, id: str) -> None:
        """Delete a document; raises `UnknownDocumentError` if it is not there."""
        self.refresh()
        self._number(id)
        self.datastore.delete([id])
        self._seen = self._stamp()

    def document(self, id: str) -> dict[str, Any]:
        """A document; raises `UnknownDocumentError` if it is not there."""
        self.refresh()
        return self.datastore.document(self._number(id))

    def _number(self, id: str) -> int:
        number = int(self.datastore.document_numbers([id])[0])
        if number < 0:
            raise UnknownDocumentError(f"There is no document {id!r} in the store.")
        return number


class BatchReader:
    """
    The retriever of one batch. It remembers what each chunk was given, and a failure gives nothing instead of an error.

    Args:
        source ([`Source`]): where to look.
        queries (`dict[Key, str]`): texts that are looked up instead of these chunks.

    Attributes:
        found (`dict[Key, list[RetrievedNeighbor]]`): the neighbors of every chunk that was looked up.
        error (`str`, *optional*): why nothing more was found.
        num_lookups (`int`): chunks that were looked up.
        store (`dict`): the generation of the store, and how many documents can be found.
    """

    def __init__(self, source: Source, queries: dict[Key, str]) -> None:
        self.found: dict[Key, list[RetrievedNeighbor]] = {}
        self.num_lookups = 0
        self._queries = queries
        self._retriever = source.retriever
        self.chunk_size, self.neighbor_size = self._retriever.chunk_size, self._retriever.neighbor_size
        source.refresh()
        self.error = source.error
        self.store = source.describe()

    def __call__(self, chunk_input_ids: torch.Tensor, chunk_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Neighbors of shape `(num_chunks, num_neighbors, neighbor_size)` and their mask, which is 0 after a failure."""
        keys = [tuple(row) for row in chunk_input_ids.masked_fill(chunk_mask == 0, -1).tolist()]
        shape = len(keys), self._retriever.num_neighbors
        tokens = np.zeros((*shape, self.neighbor_size), dtype=np.int64)
        mask = np.zeros_like(tokens)
        if self.error is None:
            try:
                found = self._look_up(keys, chunk_input_ids, chunk_mask)
                chunk_ids = np.full(shape, -1, dtype=np.int64)
                for row, neighbors in zip(chunk_ids, found, strict=True):
                    row[: len(neighbors)] = [neighbor.chunk_id for neighbor in neighbors]
                tokens, mask = self._retriever.datastore.gather(chunk_ids)
                self.found.update(zip(keys, found, strict=True))
                self.num_lookups += len(keys)
            except Exception as error:  # an answer that says so is better than none, whatever went wrong
                logger.warning("A lookup failed: %s", error, exc_info=True)
                self.error = f"The lookup failed ({type(error).__name__}); the log of the server says why."
        device = chunk_input_ids.device
        return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)

    def _look_up(self, keys: list[Key], ids: torch.Tensor, mask: torch.Tensor) -> list[list[RetrievedNeighbor]]:
        """Find the neighbors of all chunks with one search for the chunks, and one for the texts instead of chunks."""
        given = [row for row, key in enumerate(keys) if key in self._queries]
        chunks = [row for row, key in enumerate(keys) if key not in self._queries]
        found: dict[int, list[RetrievedNeighbor]] = {}
        if chunks:
            found |= zip(chunks, self._retriever.trace(ids[chunks], mask[chunks]), strict=True)  # type: ignore[arg-type]
        if given:
            found |= zip(given, self._retriever.find([self._queries[keys[row]] for row in given]), strict=True)
        return [found[row] for row in range(len(keys))]


def described(neighbors: list[RetrievedNeighbor]) -> list[dict[str, Any]]:
    """The neighbors of a chunk, ready for JSON."""
    return [dataclasses.asdict(neighbor) for neighbor in neighbors]
