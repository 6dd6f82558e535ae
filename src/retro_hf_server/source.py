"""The datastore of a server, kept up to date."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_hf.datastore.atomic_files import MANIFEST_NAME
from retro_hf.errors import DatastoreMismatchError, RetroError


if TYPE_CHECKING:
    from retro_hf import RetroRetriever

logger = logging.getLogger(__name__)


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
        num_lookups (`int`): texts that were looked up.
    Raises:
        DatastoreMismatchError: if the store belongs to another tokenizer or chunk size.
    """

    def __init__(self, retriever: RetroRetriever, tokenizer: Any, chunk_size: int) -> None:
        self.retriever = retriever
        self.error: str | None = None
        self._requirements = {"tokenizer": tokenizer, "chunk_size": chunk_size}
        retriever.datastore.check_compatible(**self._requirements)
        self.num_lookups = 0
        self._seen = self._stamp()
        self._snapshot: tuple[Any, Any] = (None, None)

    @property
    def datastore(self) -> Any:
        """The store."""
        return self.retriever.datastore

    def refresh(self) -> None:
        """Open the changes of other processes. If the store cannot be opened, `error` says why, until it can again."""
        try:
            seen = self._stamp()
            if seen == self._seen and self.error is None:
                return
            self.datastore.refresh()
            self.datastore.check_compatible(**self._requirements, embedder=self.retriever.embedder)
            self._seen, self.error = seen, None
        except DatastoreMismatchError as error:
            logger.warning("The store was replaced: %s", error)
            self.error = "The store was replaced by one of another kind. If the model can read it, restart the server."
        except (RetroError, OSError, ValueError) as error:
            logger.warning("The store cannot be read: %s", error)
            self.error = "The store cannot be read at present; the log of the server says why."  # paths stay here

    def snapshot(self) -> RetroRetriever:
        """The retriever over the opened state of the store. It is the same object until that changes."""
        if self._snapshot[0] != self._seen:
            self._snapshot = self._seen, self.retriever.snapshot()
        return self._snapshot[1]

    @property
    def available(self) -> bool:
        """Whether the store was read without an error, and is still there."""
        return self.error is None and os.path.exists(Path(self.datastore.path) / MANIFEST_NAME)

    def describe(self) -> dict[str, int]:
        """The generation of the opened store, and its number of documents."""
        datastore = self.datastore
        return {
            "generation": datastore.generation,
            "documents": datastore.num_documents - datastore.num_deleted_documents,
        }

    def _stamp(self) -> tuple[int, ...]:
        """A value that changes whenever a manifest is written, because that replaces the file."""
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
        self._open()
        changes = self.datastore.append(documents, embedder=self.retriever.embedder, replace=True, show_progress=False)
        self._seen = self._stamp()
        return len(changes.changed) + changes.num_unchanged

    def delete(self, id: str) -> None:
        """Delete a document; raises `UnknownDocumentError` if it is not there."""
        self._open()
        self._number(id)
        self.datastore.delete([id])
        self._seen = self._stamp()  # this server's own changes are open already

    def document(self, id: str) -> dict[str, Any]:
        """A document; raises `UnknownDocumentError` if it is not there."""
        self._open()
        return self.datastore.document(self._number(id))

    def _open(self) -> None:
        """Open the newest generation; raises OSError if the store cannot be read."""
        self.refresh()
        if self.error is not None:
            raise OSError(self.error)

    def _number(self, id: str) -> int:
        number = int(self.datastore.document_numbers([id])[0])
        if number < 0:
            raise UnknownDocumentError(f"There is no document {id!r} in the store.")
        return number
