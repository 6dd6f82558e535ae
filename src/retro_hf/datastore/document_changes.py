"""How documents differ from those of a datastore: found by their ids, and compared with what the store holds."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatastoreInputError, counted
from .documents import Document
from .stages import batches, metadata_of


if TYPE_CHECKING:
    from .store import RetroDatastore

_COMPARED_IDS = 20_000


@dataclass(frozen=True)
class Changes:
    """What differs between documents and a datastore.

    Attributes:
        new (`tuple[str]`): ids that the store does not have.
        changed (`tuple[str]`): ids that the store has with another text, title, source or other field.
        gone (`tuple[str]`): ids that only the store has.
        num_unchanged (`int`): documents that are equal.
    """

    new: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]
    num_unchanged: int

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.gone)

    def __str__(self) -> str:
        parts = [f"{name}: {_first(ids)}" for name, ids in (("new", self.new), ("changed", self.changed)) if ids]
        parts += [f"gone: {_first(self.gone)}"] if self.gone else []
        return "\n".join([*parts, f"unchanged: {self.num_unchanged:,}"])


def _first(ids: tuple[str, ...]) -> str:
    more = f" and {len(ids) - 10:,} more" if len(ids) > 10 else ""
    return f"{len(ids):,} ({', '.join(ids[:10])}{more})"


class Comparison:
    """Compares documents with those of a datastore while they are read.

    Args:
        datastore ([`RetroDatastore`]): what the documents are compared with.
        replaces (`bool`): whether a document may take the place of one with its id.
        is_mirror (`bool`): whether these are all documents, so that those that only the store has are gone.

    Attributes:
        replaced (`list[int]`): numbers of stored documents so far that others take the place of.
    """

    def __init__(self, datastore: RetroDatastore, *, replaces: bool, is_mirror: bool = False) -> None:
        self.replaced: list[int] = []
        self._datastore = datastore.snapshot()
        self._replaces = replaces
        self.is_mirror = is_mirror
        self._seen = np.zeros(datastore.num_documents, dtype=bool)
        self._new: dict[str, None] = {}
        self._changed: list[str] = []

    def select(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents that are new or changed.

        Raises:
            DatastoreInputError: if an id comes twice, or is taken and must not be replaced; at the end of a mirror that has no
                document of the store.
        """
        for batch in batches(documents):
            numbers = self._datastore.document_numbers([document.id for document in batch])
            # By number, so that each group of the store's documents is read once. They are handed on in their own order.
            equal = set()
            for place in np.argsort(numbers, kind="stable").tolist():
                document, number = batch[place], int(numbers[place])
                if number >= 0:
                    self._check(document, number)
                    if self._is_equal(document, number):
                        equal.add(place)
            for place, (document, number) in enumerate(zip(batch, numbers.tolist(), strict=True)):
                if number < 0:
                    if document.id in self._new:
                        raise _twice(document)
                    self._new[document.id] = None
                elif place not in equal:
                    self.replaced.append(number)
                    self._changed.append(document.id)
                if place not in equal:
                    yield document
        live = len(self._seen) - self._datastore.num_deleted_documents
        if self.is_mirror and live and not self._seen.any():
            raise DatastoreInputError(
                f"None of the {counted(live, 'document')} of {str(self._datastore.path)!r} is among these documents, so all of them "
                "would be deleted. Check the path of the documents; to keep both, use `append`, and for a new store `build`."
            )

    def _check(self, document: Document, number: int) -> None:
        if not self._replaces:
            raise DatastoreInputError(
                f"{document.where} has the id {document.id!r}, which is in the datastore already. To replace that document, use "
                "`retro append --replace` (in Python: `replace=True`); otherwise give this one another id (a text without an id gets its "
                "position). If the same call was interrupted before, it may have succeeded."
            )
        if self._seen[number]:
            raise _twice(document)
        self._seen[number] = True

    def _is_equal(self, document: Document, number: int) -> bool:
        stored = self._datastore.document(number)
        given = json.loads(metadata_of(document) or "{}")
        given |= {name: getattr(document, name) for name in ("id", "title", "source", "text")}
        # As text, in which NaN equals NaN.
        return json.dumps(stored, sort_keys=True) == json.dumps(given, sort_keys=True)

    def gone(self) -> np.ndarray:
        """The numbers (int64) of documents that only the store has; none unless it is a mirror."""
        missing = ~self._seen & self.is_mirror
        missing[self._datastore.deleted_documents] = False
        return np.flatnonzero(missing)

    def changes(self) -> Changes:
        """What was found, after all documents were read."""
        gone = tuple(self._datastore.document_id(number) for number in self.gone().tolist())
        num_unchanged = int(self._seen.sum()) - len(self._changed)
        return Changes(tuple(self._new), tuple(self._changed), gone, num_unchanged)


def similar_ids(datastore: RetroDatastore, id: str) -> str:
    """For an error about an id that is not there: a sentence with those of the store that are like it; empty if none is.

    A part of an id, another case and another way to write an accent count. Only the first 20,000 documents are looked at.
    """
    deleted = set(datastore.deleted_documents.tolist())
    known = (one for shard in datastore.shards for one in shard.documents.ids())
    plain = {one: _plain(one) for number, one in enumerate(islice(known, _COMPARED_IDS)) if number not in deleted}
    wanted = _plain(id)
    parts = [
        one for one, text in plain.items() if min(len(text), len(wanted)) > 2 and (wanted in text or text in wanted)
    ]
    near = sorted(parts, key=lambda one: abs(len(one) - len(id)))
    if not near:
        close = get_close_matches(wanted, plain.values(), cutoff=0.8)
        near = [one for one, text in plain.items() if text in close]
    return f"Ids like it are {', '.join(map(repr, near[:3]))}. " if near else ""


def _plain(id: str) -> str:
    return unicodedata.normalize("NFC", id).casefold()


def _twice(document: Document) -> DatastoreInputError:
    return DatastoreInputError(
        f"Two documents have the id {document.id!r}, the second is {document.where}. Make the ids unique, or leave them out: "
        "documents are found, excluded and deleted by id."
    )
