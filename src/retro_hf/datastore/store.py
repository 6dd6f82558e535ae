"""RetroDatastore: a folder of documents, tokens, keys and index, opened read-only through memory maps."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from ..errors import DatastoreCorruptError, DatastoreInputError
from .build import build_datastore
from .chunks import document_of, gather_tokens
from .compatibility import check_compatible
from .embedder import ChunkEmbedder
from .exclusion import checked_exclusion, search_excluding
from .index import max_effort, open_index, search_index
from .manifest import MANIFEST_NAME, DatastoreManifest
from .storage import map_npy, map_tensor, new_folder, sha256_of
from .table import DocumentTable


if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

__all__ = ["RetroDatastore"]

# Borders of up to a million documents are checked when a store opens: a few milliseconds.
_CHECKED_DOCUMENTS = 1 << 20


def _remove_own_folder(folder: str, owner: int) -> None:
    """Remove a temporary store, but not from a forked child, which has a copy of the object."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class RetroDatastore:
    """The retrieval database of section 2.3 of Borgeaud et al. (2022): keys, values and where they come from.

    Made by [`RetroDatastore.build`] or [`RetroDatastore.from_texts`], opened by [`RetroDatastore.load`]. A chunk is
    `chunk_size` consecutive tokens of one document; its key is the embedding of its text; its value, the *neighbor*,
    is the chunk and what follows it in the same document, up to `neighbor_size` tokens.

    The folder is portable (no absolute paths, no pickle) and is never written to after it has been built. Everything
    is memory-mapped: opening reads the manifest and takes milliseconds, processes share the pages.

    Attributes:
        path (`Path`): the folder.
        manifest ([`DatastoreManifest`]): what the folder says about itself.

    *Memory*: per million chunks of 64 tokens at `dim=384`, 128 MB of tokens (uint16), 768 MB of keys, and an index of
    1,536 MB (`Flat`) or 833 MB (61 MB of it resident).
    *Processes*: pickling keeps the path; each process opens its own files. Forked children search with one thread.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: DatastoreManifest) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._check_sizes()
        self._doc_offsets = map_npy(self._file("doc_offsets"), np.dtype(np.int64), self.num_documents + 1)
        self._doc_lengths = map_npy(self._file("doc_lengths"), np.dtype(np.int64), self.num_documents)
        tokens = map_npy(self._file("tokens"), np.dtype(manifest.token_dtype), self.num_chunks * self.chunk_size)
        self._chunks = tokens.reshape(self.num_chunks, self.chunk_size)
        self._check_borders()

    @classmethod
    def build(
        cls,
        documents: Any,
        path: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | str,
        embedder: ChunkEmbedder | str,
        chunk_size: int = 64,
        neighbor_size: int = 128,
        index: str = "auto",
        batch_size: int = 64,
        show_progress: bool | None = None,
    ) -> RetroDatastore:
        """Build a datastore and open it.

        Args:
            documents: an iterable of texts, of dicts with `text` (and perhaps `id`, `title`, `source`, and any other
                field) or of `Path`s; or the path of a .txt, .md, .jsonl, .jsonl.gz or .parquet file or of a folder of
                such files; or a `datasets.Dataset` or `IterableDataset` with a `text` column. Ids must be unique;
                documents without text are skipped and counted.
            path (`str` or `Path`): the folder to make. It appears when it is complete; an existing one is an error.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`): of the language model that will read it.
            embedder ([`ChunkEmbedder`] or `str`): the frozen encoder that makes the keys.
            chunk_size (`int`, defaults to 64): tokens per chunk; m in the paper.
            neighbor_size (`int`, defaults to 128): tokens per neighbor, continuation included; r in the paper.
            index (`str`, defaults to `"auto"`): a FAISS factory string such as `"Flat"` or `"IVF64,Flat"`. `"auto"` is
                exact up to 200,000 chunks and 4-bit IVF-PQ with re-scoring above, tuned to a measured recall of 0.95.
            batch_size (`int`, defaults to 64): chunks per forward pass of the embedder.
            show_progress (`bool`, *optional*): progress bars; by default on a terminal only.
        Returns:
            [`RetroDatastore`]: the opened store.
        Raises:
            DatastoreInputError: for documents or options that cannot make a store.
            DatastoreExistsError: if `path` is taken.
        *Determinism*: the same documents, tokenizer, embedder, library versions and thread count give the same bytes.
        """
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if isinstance(embedder, (str, os.PathLike)):
            embedder = ChunkEmbedder.from_pretrained(embedder)
        build_datastore(
            documents,
            Path(path),
            tokenizer=tokenizer,
            embedder=embedder,
            chunk_size=chunk_size,
            neighbor_size=neighbor_size,
            index=index,
            batch_size=batch_size,
            show_progress=show_progress,
        )
        datastore = cls.load(path)
        datastore._tokenizer = tokenizer
        return datastore

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase | str,
        *,
        embedder: ChunkEmbedder | str,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> RetroDatastore:
        """Build a datastore from texts or dicts, by default in a temporary folder that lives as long as the object.

        Args:
            path (`str` or `Path`, *optional*): the folder to make instead of a temporary one.
            options: the other options of [`RetroDatastore.build`].
        """
        if path is not None:
            return cls.build(texts, path, tokenizer=tokenizer, embedder=embedder, **options)
        folder = tempfile.mkdtemp(prefix="retro-datastore-")
        try:
            datastore = cls.build(texts, Path(folder) / "store", tokenizer=tokenizer, embedder=embedder, **options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(datastore, _remove_own_folder, folder, os.getpid())
        return datastore

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> RetroDatastore:
        """Open a datastore read-only. Nothing is written or deleted.

        Args:
            path (`str` or `Path`): its folder.
            verify (`bool`, defaults to `False`): also compare the sha256 of every file (about 2 GB per second).
        Raises:
            DatastoreNotFoundError: if there is none.
            DatastoreCorruptError: if a file is missing, has another size or (with `verify`) other content than its
                manifest says.
        """
        datastore = cls(path, DatastoreManifest.read(Path(path)))
        if verify:
            datastore.verify()
        return datastore

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the datastore to a new folder, which appears when the copy is complete."""
        with new_folder(Path(path)) as folder:
            for entry in self.manifest.files:
                shutil.copyfile(self.path / entry.name, folder / entry.name)
            # The manifest last, as in a build.
            shutil.copyfile(self.path / MANIFEST_NAME, folder / MANIFEST_NAME)

    def verify(self) -> None:
        """Compare size and sha256 of every file with the manifest; raises `DatastoreCorruptError` at the first."""
        self._check_sizes()
        for entry in self.manifest.files:
            found = sha256_of(self.path / entry.name)
            if found != entry.sha256:
                raise self._corrupt(entry.name, f"its sha256 is {found}, but the manifest says {entry.sha256}")

    def check_compatible(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chunk_size: int | None = None,
        neighbor_size: int | None = None,
        embedder: ChunkEmbedder | None = None,
    ) -> None:
        """Check that the datastore fits a language model's tokenizer and sizes, and the embedder of the queries.

        Raises:
            DatastoreMismatchError: naming both sides, what would go wrong, and the remedy.
        """
        check_compatible(
            self.path,
            self.manifest,
            tokenizer=tokenizer,
            chunk_size=chunk_size,
            neighbor_size=neighbor_size,
            embedder=embedder,
        )

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return self.manifest.chunk_size

    @property
    def neighbor_size(self) -> int:
        """Tokens per neighbor: a chunk and its continuation."""
        return self.manifest.neighbor_size

    @property
    def num_chunks(self) -> int:
        """Chunks in the store."""
        return self.manifest.num_chunks

    @property
    def num_documents(self) -> int:
        """Documents in the store, without the empty ones of the input."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, without padding."""
        return self.manifest.num_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the token stream, from the store's own copy."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.path)
        return self._tokenizer

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys: a read-only float16 memory map of shape `(num_chunks, dim)`, rows of length 1."""
        return map_tensor(self._file("keys"), (self.num_chunks, self.manifest.dim))

    @cached_property
    def index(self) -> Any:
        """The FAISS index over the keys, opened on first use through a memory map."""
        return open_index(self._file("index"), self.num_chunks, self.manifest.dim)

    @cached_property
    def _table(self) -> DocumentTable:
        return DocumentTable(self._file("documents"), self.num_documents)

    def gather(self, chunk_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The neighbors of given chunk ids: each chunk and what follows it in the same document.

        Args:
            chunk_ids (`np.ndarray` of integers, any shape `(...)`): -1 stands for no neighbor.
        Returns:
            `(tokens, mask)`, both `np.ndarray` of int64 and shape `(..., neighbor_size)`. The mask is 1 at tokens and
            0 at padding; tokens are 0 where it is 0.
        Raises:
            DatastoreInputError: for an id that is not in the store.
        """
        ids = self._checked_ids(chunk_ids)
        return gather_tokens(ids, self._chunks, self._doc_offsets, self._doc_lengths, self.neighbor_size)

    def document_of(self, chunk_ids: Any) -> np.ndarray:
        """Document numbers (int64, in the shape of `chunk_ids`) of chunks; -1 for -1."""
        return document_of(self._checked_ids(chunk_ids), self._doc_offsets)

    def document(self, number: int) -> dict[str, Any]:
        """One document: `id`, `title`, `source`, `text`, and whatever other fields it was given with."""
        if not 0 <= number < self.num_documents:
            raise DatastoreInputError(
                f"There is no document {number}: the store has documents 0 to {self.num_documents - 1}."
            )
        return self._table.document(number)

    def document_number(self, id: str) -> int:
        """The number of the document with a given id. The first call reads all ids into memory."""
        number = self._table.numbers.get(id)
        if number is None:
            raise DatastoreInputError(f"There is no document with the id {id!r} in {str(self.path)!r}.")
        return number

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query, best first.

        Args:
            queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors of the store's embedder.
            num_neighbors (`int`): chunks per query; k in the paper.
            exclude_documents (`np.ndarray` of integers and shape `(num_queries,)` or `(num_queries, any)`,
                *optional*): document numbers whose chunks a query must not get, -1 for none. In training a chunk must
                not retrieve its own document: the answer would be copied from it. Excluded results are replaced by
                the next best.
        Returns:
            `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64. A score is the inner
            product of the unit vectors, so bigger is nearer; the paper's distance is `d = 2 - 2 * score`. Where
            the store has no more chunks, the id is -1 and the score -inf.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dim:
            raise DatastoreInputError(
                f"The queries have shape {queries.shape}, but (num_queries, {self.manifest.dim}) is expected."
            )
        if not np.isfinite(queries).all():
            raise DatastoreInputError("The queries hold values that are not finite (NaN or infinity).")
        if num_neighbors < 1:
            raise DatastoreInputError(f"num_neighbors is {num_neighbors}, but it must be at least 1.")
        limit = max_effort(self.index, self.manifest.index["search"])
        if exclude_documents is None:
            scores, ids = self._search(queries, num_neighbors, 1)
            if limit == 1 or (ids[:, : self.num_chunks] >= 0).all():
                return scores, ids
            # Few lists were read and they held too little: read more of them for the rows that came out short.
            excluded = np.full((len(queries), 1), -1, dtype=np.int64)
        else:
            excluded = checked_exclusion(exclude_documents, len(queries), self.num_documents)
        return search_excluding(self._search, queries, num_neighbors, excluded, self._doc_offsets, limit)

    def _search(self, queries: np.ndarray, num_neighbors: int, effort: int) -> tuple[np.ndarray, np.ndarray]:
        """Search, padded to `num_neighbors` columns; `effort` multiplies the number of lists that are read."""
        search = dict(self.manifest.index["search"])
        if "nprobe" in search:
            search["nprobe"] *= effort
        found = min(num_neighbors, self.num_chunks)
        scores = np.full((len(queries), num_neighbors), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), num_neighbors), -1, dtype=np.int64)
        if len(queries):
            scores[:, :found], ids[:, :found] = search_index(self.index, queries, found, search)
        if ids.size and (ids.max() >= self.num_chunks or ids.min() < -1):
            raise self._corrupt(self._file("index").name, "it returns chunks that the store does not have")
        return scores, ids

    def _checked_ids(self, chunk_ids: Any) -> np.ndarray:
        ids = np.asarray(chunk_ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise DatastoreInputError(f"Chunk ids are of type {ids.dtype}, not integers.")
        ids = ids.astype(np.int64, copy=False)
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_chunks):
            raise DatastoreInputError(
                f"Chunk ids run from {ids.min()} to {ids.max()}, but the store has chunks 0 to {self.num_chunks - 1} "
                "(-1 for none). Were they computed with another datastore?"
            )
        return ids

    def _file(self, kind: str) -> Path:
        return self.path / self.manifest.entries(kind)[0].name

    def _check_sizes(self) -> None:
        """Sizes come first: reading past the end of a mapped file that was cut short kills the process."""
        for entry in self.manifest.files:
            file = self.path / entry.name
            if not file.is_file():
                raise self._corrupt(entry.name, "it is missing")
            size = file.stat().st_size
            if size != entry.size:
                raise self._corrupt(entry.name, f"it has {size:,} bytes, but the manifest says {entry.size:,}")

    def _check_borders(self) -> None:
        offsets, lengths = self._doc_offsets, self._doc_lengths
        sound = offsets[0] == 0 and offsets[-1] == self.num_chunks
        if sound and self.num_documents <= _CHECKED_DOCUMENTS:
            chunks = np.diff(offsets)
            sound = bool((-(-lengths // self.chunk_size) == chunks).all() and (lengths > 0).all())
        if not sound:
            raise self._corrupt(self._file("doc_offsets").name, "its document borders contradict each other")

    def _corrupt(self, name: str, reason: str) -> DatastoreCorruptError:
        return DatastoreCorruptError(
            f"The file {name!r} of the datastore {str(self.path)!r} is damaged: {reason}. Restore it from a copy, or "
            "build the datastore again."
        )

    def __len__(self) -> int:
        return self.num_chunks

    def __getstate__(self) -> dict[str, Any]:
        return {"path": os.path.abspath(self.path)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], DatastoreManifest.read(Path(state["path"])))  # type: ignore[misc]

    def __repr__(self) -> str:
        return (
            f"RetroDatastore({str(self.path)!r}, num_documents={self.num_documents}, num_chunks={self.num_chunks}, "
            f"chunk_size={self.chunk_size}, neighbor_size={self.neighbor_size}, "
            f"index={self.manifest.index['factory']!r}, embedder={self.manifest.embedder['name']!r})"
        )
