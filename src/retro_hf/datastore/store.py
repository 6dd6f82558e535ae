"""RetroDatastore: a folder of documents, tokens, keys and index, opened read-only through memory maps."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from ..errors import DatastoreInputError
from . import compatibility, derive, hub, update
from .build import BuildOptions, build_datastore
from .embedder import ChunkEmbedder
from .executors import Executor, as_executor
from .manifest import DatastoreManifest
from .policy import DEFAULT_SHARD_CHUNKS, IndexOptions, parse_bytes
from .shard import Shard
from .view import RestrictedIndex, View, checked_search, verify_files


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RetroDatastore"]


def _remove_own_folder(folder: str, owner: int) -> None:
    """Remove a temporary store, but not from a forked child, which has a copy of the object."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class RetroDatastore:
    """The retrieval database of section 2.3 of Borgeaud et al. (2022): keys, values and where they come from.

    Made by [`RetroDatastore.build`] or [`RetroDatastore.from_texts`], opened by [`RetroDatastore.load`]. A chunk is
    `chunk_size` consecutive tokens of one document; its key is the embedding of its text; its value, the *neighbor*,
    is the chunk and what follows it in the same document, up to `neighbor_size` tokens.

    The folder is portable: no absolute paths, no pickle. Its files never change; [`append`], [`delete`] and [`compact`]
    write new ones and then, as one step, the manifest that names them. Everything is memory-mapped: opening reads the
    manifest and takes milliseconds, processes share the pages. Chunk ids and document numbers are places in the store:
    deleted documents keep theirs, and are counted, until `compact` numbers anew.

    Attributes:
        path (`Path`): the folder.

    *Memory*: per million chunks of 64 tokens at `dim=384`, 128 MB of tokens (uint16), 768 MB of keys, and an index of
    1,536 MB (`Flat`) or 833 MB, of which 57 MB are the process's own. The rest are pages of the disk cache, shared by
    processes and dropped when memory is short; they count as resident once mapped, 200 MB after 200 single queries.
    *Processes*: pickling keeps the path; each process opens its own files. Forked children search with one thread.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: DatastoreManifest) -> None:
        self.path = Path(path)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._view = View.open(self.path, manifest)

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
        recall: float = 0.95,
        memory_budget: float | str | None = None,
        batch_size: int = 64,
        shard_chunks: int = DEFAULT_SHARD_CHUNKS,
        executor: Executor | int = 1,
        show_progress: bool | None = None,
    ) -> RetroDatastore:
        """Build a datastore and open it.

        Killed or interrupted at any moment, it goes on where it was when the same call is made again, and ends with the
        same bytes. Its unfinished work lies beside `path`, in a hidden folder that is gone at the end.

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
                exact up to 200,000 chunks and 4-bit IVF-PQ with re-scoring above.
            recall (`float`, defaults to 0.95): share of the two nearest neighbors that an approximate index is to find.
                Its search parameters are chosen so, measured against exact search, and recorded; 1.0 is exact search. The
                queries are chunks of the store itself, and queries less like them find less.
            memory_budget (`float` or `str`, *optional*): what the index may keep in memory when searched: bytes, or a text
                such as `"4GB"` or `"1.5 GiB"`. It chooses the kind of index; what does not fit is refused before any work is spent.
            batch_size (`int`, defaults to 64): chunks per forward pass of the embedder.
            shard_chunks (`int`, defaults to 67,108,864): chunks per shard at most; only a single document with more has
                a larger one. Memory while building is bounded by a
                shard's index; a cluster searches shards on different machines.
            executor (`int` or [`Executor`], defaults to 1): number of processes on this machine, a
                [`RankExecutor`] under torchrun or Slurm, or a [`RayExecutor`].
            show_progress (`bool`, *optional*): progress bars; by default on a terminal only.
        Returns:
            [`RetroDatastore`]: the opened store.
        Raises:
            DatastoreInputError: for documents or options that cannot make a store.
            DatastoreExistsError: if `path` is taken.
        *Determinism*: the same documents, tokenizer, embedder, library versions and thread count give the same bytes.
        *Memory*: a few hundred MB and the encoder, whatever the input; then the index of one shard.
        """
        tokenizer = compatibility.load_tokenizer(tokenizer)
        if isinstance(embedder, (str, os.PathLike)):
            embedder = ChunkEmbedder.from_pretrained(embedder)
        options = BuildOptions(
            tokenizer=tokenizer,
            embedder=embedder,
            chunk_size=chunk_size,
            neighbor_size=neighbor_size,
            index=IndexOptions(index, recall, parse_bytes(memory_budget)),
            batch_size=batch_size,
            shard_chunks=shard_chunks,
            show_progress=show_progress,
        )
        build_datastore(documents, path, options, as_executor(executor))
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
            options: the other options of [`RetroDatastore.build`]: `chunk_size`, `neighbor_size`, `index`, `recall`,
                `memory_budget`, `batch_size`, `shard_chunks`, `executor`, `show_progress`.
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
        datastore = cls(path, DatastoreManifest.read(path))
        if verify:
            datastore.verify()
        return datastore

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        verify: bool = True,
    ) -> RetroDatastore:
        """Open a datastore from a folder, or from a dataset repository on the Hub.

        A downloaded one is read-only: [`save`] makes a copy that can be changed.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository.
            revision (`str`, *optional*): branch, tag or commit; a commit pins the content.
            cache_dir (`str` or `Path`, *optional*): where downloads are kept; by default `$HF_HOME/hub`.
            token (`str`, *optional*): for the Hub; by default the one that `hf auth login` saved.
            verify (`bool`, defaults to `True`): compare the sha256 of every downloaded file with the manifest, at about
                2 GB per second, also of one that was downloaded before.
        Raises:
            DatastoreNotFoundError: if there is no such folder or repository, or it holds no datastore.
            DatastoreCorruptError: if its files are not what its manifest says.
        """
        folder = hub.local_folder(name_or_path, revision=revision, cache_dir=cache_dir, token=token, verify=verify)
        return cls.load(folder)

    def refresh(self) -> None:
        """See what has changed in the folder since it was opened: documents appended, deleted or compacted.

        Raises:
            DatastoreCorruptError: if the folder is damaged; what was open stays open.
        """
        manifest = DatastoreManifest.read(self.path)
        if manifest != self.manifest:
            self._view = View.open(self.path, manifest, self._view.shards)

    # Each is documented where it is defined, with the datastore as its first argument.
    append = update.append
    delete = update.delete
    compact = update.compact
    save = derive.save
    subset = derive.subset
    retokenize = derive.retokenize
    merge = staticmethod(derive.merge)
    push_to_hub = hub.push
    check_compatible = compatibility.check_compatible

    def verify(self) -> None:
        """Compare size and sha256 of every file with the manifest; raises `DatastoreCorruptError` at the first."""
        verify_files(self.path, self.manifest)

    @property
    def manifest(self) -> DatastoreManifest:
        """What the folder says about itself."""
        return self._view.manifest

    @property
    def generation(self) -> int:
        """1 when built, one more with every change."""
        return self.manifest.generation

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The opened shards, whose documents and chunks are numbered in this order."""
        return self._view.shards

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
        """Chunks in the store, those of deleted documents included: one more than the largest chunk id."""
        return self._view.num_chunks

    @property
    def num_documents(self) -> int:
        """Documents in the store, deleted ones included, without the empty ones of the input."""
        return self._view.num_documents

    @property
    def num_deleted_documents(self) -> int:
        """Documents that are no longer returned."""
        return len(self._view.deleted)

    @property
    def deleted_documents(self) -> np.ndarray:
        """Numbers (int64) of the documents that are no longer returned, in order."""
        return self._view.deleted

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

    def gather(self, chunk_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The neighbors of given chunk ids: each chunk and what follows it in the same document.

        Args:
            chunk_ids (`np.ndarray` of integers, any shape `(...)`): -1 stands for no neighbor.
        Returns:
            `(tokens, mask)`, both `np.ndarray` of int64 and shape `(..., neighbor_size)`. The mask is 1 at tokens and
            0 at padding; tokens are 0 where it is 0. Chunks of deleted documents come back as no neighbor.
        Raises:
            DatastoreInputError: for an id that is not in the store.
        """
        view = self._view
        return view.gather(view.checked_ids(chunk_ids))

    def keys_of(self, chunk_ids: Any) -> np.ndarray:
        """The keys of given chunk ids (integers, `(n,)`): float32 of shape `(n, dim)`, rows of length 1."""
        view = self._view
        return view.keys_of(view.checked_ids(chunk_ids))

    def document_of(self, chunk_ids: Any) -> np.ndarray:
        """Document numbers (int64, in the shape of `chunk_ids`) of chunks; -1 for -1."""
        view = self._view
        return view.document_of(view.checked_ids(chunk_ids))

    def first_chunks(self, documents: np.ndarray) -> np.ndarray:
        """The first chunk (int64) of documents by number, and for `num_documents` the number of chunks."""
        return self._view.first_chunks(documents)

    def random_chunks(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Chunk ids (int64) drawn uniformly from the documents that are not deleted."""
        ids = generator.integers(self.num_chunks, size=shape)
        while len(self._view.deleted):
            hidden = np.isin(self.document_of(ids), self._view.deleted)
            if not hidden.any():
                break
            if len(self._view.deleted) == self.num_documents:
                return np.full(shape, -1, dtype=np.int64)
            ids[hidden] = generator.integers(self.num_chunks, size=np.count_nonzero(hidden))
        return ids

    def document(self, number: int) -> dict[str, Any]:
        """One document: `id`, `title`, `source`, `text`, and whatever other fields it was given with.

        Raises:
            DatastoreInputError: if there is no such document, or it has been deleted.
        """
        view = self._view
        if not isinstance(number, (int, np.integer)) or not 0 <= number < self.num_documents:
            raise DatastoreInputError(
                f"There is no document {number!r}: the store has documents 0 to {self.num_documents - 1}. The number of an id "
                "is `document_number(id)`."
            )
        if number in view.deleted:
            raise DatastoreInputError(f"Document {number} has been deleted from {str(self.path)!r}.")
        return view.document(number)

    def document_number(self, id: str) -> int:
        """The number of the document with a given id.

        Raises:
            DatastoreInputError: if there is none, or it has been deleted.
        """
        number = self.document_numbers([id])[0]
        if number < 0:
            raise DatastoreInputError(f"There is no document with the id {id!r} in {str(self.path)!r}.")
        return int(number)

    def document_numbers(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers (int64, `(n,)`) of documents by id, -1 for those that aren't there or have been deleted."""
        return self._view.document_numbers(ids)

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
        view = self._view
        queries, excluded = checked_search(view.manifest, queries, num_neighbors, exclude_documents)
        return view.search(queries, num_neighbors, excluded)

    def restricted_to(self, documents: np.ndarray) -> RestrictedIndex:
        """An index of some of the documents (bool, `(num_documents,)`), for an [`EmbeddingSearcher`]; nothing is copied."""
        return RestrictedIndex(self._view, documents)

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
