"""One generation of a datastore as it was opened: its shards under common numbers, and what is deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arguments
from ..errors import DatastoreCorruptError, DatastoreInputError, RetroError
from ..locks import lazy
from .atomic_files import INT64, damaged, map_npy
from .manifest import DatastoreManifest, check_sizes
from .search_excluding import Deleted, merge_results
from .shard import Shard


if TYPE_CHECKING:
    from .store import RetroDatastore


# How often a reader starts again because a writer was faster. A writer takes much longer than opening.
_ATTEMPTS = 20
# Tokens gathered in one call: 2 GB of them, and 2 GB of their mask.
MAX_GATHERED = 1 << 28


def with_current_files(datastores: Sequence[RetroDatastore], action: Callable[[], Any]) -> Any:
    """Run `action`, which reads files of datastores by name. If a writer removed some meanwhile, refresh and run it again."""
    for _ in range(_ATTEMPTS):
        try:
            return action()
        except (RetroError, OSError):
            changed = [store for store in datastores if DatastoreManifest.read(store.path) != store.manifest]
            if not changed:
                raise
            for store in changed:
                store.refresh()
    return action()


@dataclass(frozen=True)
class Generation:
    """An opened generation. It is never changed, only replaced as a whole, so a thread sees one generation or the next.

    It may hold only some consecutive shards, whose chunks and documents keep the numbers that they have in the store.

    Attributes:
        manifest ([`DatastoreManifest`]): of this generation.
        shards (`tuple[Shard]`): in order; each numbers its own chunks and documents from 0.
        chunk_starts, document_starts (`np.ndarray` of int64 and shape `(num_shards + 1,)`): the first chunk and document of
            each shard, then the end of the last one.
        deleted (`np.ndarray` of int64): numbers of deleted documents, in order.
    """

    manifest: DatastoreManifest
    shards: tuple[Shard, ...]
    chunk_starts: np.ndarray
    document_starts: np.ndarray
    deleted: np.ndarray

    @classmethod
    def open(
        cls, folder: Path, manifest: DatastoreManifest, known: Iterable[Shard] = (), places: slice = slice(None)
    ) -> Generation:
        """Open the shards at some `places` of a manifest, taking over those that are open already.

        Raises:
            DatastoreCorruptError: if a file is missing, or not as the manifest says.
        """
        entries = manifest.shards[places]
        names = {None, *(entry.name for entry in entries)}
        check_sizes(folder, [file for file in manifest.files if file.shard in names])
        files = manifest.files_by_shard()
        # Shards that stay open keep their memory maps and the pages that are warm; only new ones are opened. A shard stays open
        # only if its files are the same: another store may have been built at this path.
        opened = {shard.entry.name: shard for shard in known if shard.files == files.get(shard.entry.name)}
        deleted = np.empty(0, dtype=np.int64)
        for file in manifest.entries("deleted"):
            deleted = np.array(map_npy(folder / file.name, INT64, manifest.num_deleted_documents))
            if (np.diff(deleted) <= 0).any() or deleted[0] < 0 or deleted[-1] >= manifest.num_documents:
                raise damaged(folder / file.name, "its numbers of deleted documents are not in order, or too large")
        first, end, _ = places.indices(len(manifest.shards))
        return cls(
            manifest,
            tuple(opened.get(entry.name) or Shard(folder, manifest, entry, files[entry.name]) for entry in entries),
            np.cumsum([0, *(entry.num_chunks for entry in manifest.shards)])[first : end + 1],
            np.cumsum([0, *(entry.num_documents for entry in manifest.shards)])[first : end + 1],
            deleted,
        )

    @classmethod
    def current(cls, folder: Path, known: Iterable[Shard] = ()) -> Generation:
        """Open what is in a folder now. If another process changes it in the meantime, the next generation is opened.

        Raises:
            DatastoreNotFoundError: if there is no datastore.
            DatastoreCorruptError: if a file is missing, or not as the manifest says.
        """

        for _ in range(_ATTEMPTS):
            manifest = DatastoreManifest.read(folder)
            try:
                return cls.open(folder, manifest, known)
            except DatastoreCorruptError:
                if DatastoreManifest.read(folder) == manifest:
                    raise
        return cls.open(folder, DatastoreManifest.read(folder), known)

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The neighbors of chunk ids; see [`RetroDatastore.gather`]."""
        size = self.manifest.neighbor_size
        if ids.size * size > MAX_GATHERED:
            raise DatastoreInputError(
                f"{ids.size:,} neighbors of {size:,} tokens are more than the {MAX_GATHERED:,} tokens that are gathered at once. Ask "
                "for fewer chunks or neighbors in one call."
            )
        if len(self.deleted):
            ids = np.where(np.isin(self.document_of(ids), self.deleted), -1, ids)
        if len(self.shards) == 1:
            return self.shards[0].gather(ids)
        tokens = np.zeros((*ids.shape, size), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for number, here in self.by_shard(ids):
            tokens[here], mask[here] = self.shards[number].gather(ids[here] - self.chunk_starts[number])
        return tokens, mask

    def without(self, documents: np.ndarray) -> Generation:
        """The same with more documents (numbers, int64) that are not found, as if they were deleted."""
        return replace(self, deleted=np.union1d(self.deleted, documents))

    @lazy
    def deleted_by_shard(self) -> tuple[Deleted | None, ...]:
        """The deleted documents under the numbers of each shard."""
        parts = []
        for shard, start in zip(self.shards, self.document_starts, strict=False):
            begin, end = np.searchsorted(self.deleted, (start, start + shard.num_documents))
            numbers = self.deleted[begin:end] - start
            mask = np.zeros(shard.num_documents, dtype=bool)
            mask[numbers] = True
            num_chunks = int((shard.doc_offsets[numbers + 1] - shard.doc_offsets[numbers]).sum())
            parts.append(Deleted(mask, num_chunks) if len(numbers) else None)
        return tuple(parts)

    def chunk_ids(self, ids: Any) -> np.ndarray:
        """Chunk ids as int64, -1 for none; DatastoreInputError for another type, or ids that the store does not have."""
        return arguments.numbers("Chunk ids", ids, DatastoreInputError, -1, int(self.chunk_starts[-1]) - 1)

    def place_of(self, number: Any) -> tuple[Shard, int]:
        """The shard of a document and its number there; DatastoreInputError for a document that the store does not have."""
        last = int(self.document_starts[-1]) - 1
        number = arguments.whole("The number of a document", number, DatastoreInputError, least=0, most=last)
        place = int(np.searchsorted(self.document_starts, number, side="right") - 1)
        return self.shards[place], number - int(self.document_starts[place])

    def first_chunks(self, documents: Any) -> np.ndarray:
        """The first chunk (int64) of documents by number; for the number of documents that of chunks."""
        documents = arguments.numbers("Documents", documents, DatastoreInputError, 0, int(self.document_starts[-1]))
        owner = np.searchsorted(self.document_starts, documents, side="right") - 1
        owner = np.minimum(owner, len(self.shards) - 1)
        first = np.empty(documents.shape, dtype=np.int64)
        for number, shard in enumerate(self.shards):
            here = owner == number
            local = documents[here] - self.document_starts[number]
            first[here] = shard.doc_offsets[local] + self.chunk_starts[number]
        return first

    def by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each shard that has some of the chunks: its place, and which of `ids` (bool) it has."""
        for number in range(len(self.shards)):
            here = (ids >= self.chunk_starts[number]) & (ids < self.chunk_starts[number + 1])
            if here.any():
                yield number, here

    def document_of(self, ids: np.ndarray) -> np.ndarray:
        """Document numbers of chunks, int64 in the shape of `ids`; -1 for -1."""
        if len(self.shards) == 1:
            return self.shards[0].document_of(ids)
        numbers = np.full(ids.shape, -1, dtype=np.int64)
        for number, here in self.by_shard(ids):
            local = self.shards[number].document_of(ids[here] - self.chunk_starts[number])
            numbers[here] = local + self.document_starts[number]
        return numbers

    def search(
        self, queries: np.ndarray, num_neighbors: int, excluded: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search every shard and merge; `excluded` holds document numbers, int64 of shape `(num_queries, any)`."""
        parts = []
        for number, shard in enumerate(self.shards):
            local = None
            if excluded is not None:
                # Documents of other shards become -1, for none.
                local = excluded - self.document_starts[number]
                local = np.where((excluded < 0) | (local < 0) | (local >= shard.num_documents), -1, local)
            scores, ids = shard.search(queries, num_neighbors, local, self.deleted_by_shard[number])
            if self.chunk_starts[number]:
                ids = np.where(ids < 0, -1, ids + self.chunk_starts[number])
            parts.append((scores, ids))
        return merge_results(parts)
