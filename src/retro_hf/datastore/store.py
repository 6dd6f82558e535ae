"""RetroDatastore: a folder of documents, tokens, keys and index, opened read-only through memory maps."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import arguments
from ..errors import DatastoreInputError
from . import compatibility, derive, document_changes, edit, hub, key_coverage, text_of_chunks
from .atomic_files import hash_of
from .build import BuildOptions, build_datastore
from .documents import DocumentReader
from .embedder import ChunkEmbedder
from .executors import Executor, as_executor
from .index_plan import DEFAULT_SHARD_CHUNKS, IndexOptions
from .manifest import DatastoreManifest, check_content, checked_path
from .search_excluding import checked_search
from .searchers import RestrictedIndex
from .shard import Shard
from .store_generation import MAX_GATHERED, Generation, with_current_files


class RetroDatastore:
    """The retrieval database of section 2.3 of Borgeaud et al. (2022): keys, values and where they come from.

    Made by [`RetroDatastore.build`] or [`RetroDatastore.from_texts`], opened by [`RetroDatastore.load`]. A chunk is
    `chunk_size` consecutive tokens of one document; its key is the embedding of its text; its value, the *neighbor*,
    is the chunk and what follows it in the same document, up to `neighbor_size` tokens.

    The folder is portable: no absolute paths, no pickle. Its files never change: [`append`], [`delete`] and [`compact`]
    write new files and then, in one step, the manifest that names them. Everything is memory-mapped: opening reads the
    manifest and takes milliseconds, and processes share the pages. Chunk ids and document numbers are positions in the
    store. Deleted documents keep theirs, and are counted, until `compact` assigns new numbers.

    Attributes:
        path (`Path`): the folder.

    *Memory*: per million chunks of 64 tokens at `dim=384`, 128 MB of tokens (uint16), 768 MB of keys, and an index of
    1,536 MB (`Flat`) or 833 MB, of which 57 MB belong to the process. The rest are pages of the disk cache, shared by
    processes and dropped when memory is short; they count as resident once mapped, 200 MB after 200 single queries.
    *Processes*: pickling keeps the path, and each process opens its own files. Forked children search with one thread.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = checked_path(path)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._original: RetroDatastore | None = None  # of a snapshot
        self._opened = Generation.current(self.path)

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
        index: IndexOptions | str = "auto",
        batch_size: int = 64,
        shard_chunks: int = DEFAULT_SHARD_CHUNKS,
        executor: Executor | int = 1,
        show_progress: bool | None = None,
        encoding: str | None = None,
        split: str | None = None,
    ) -> RetroDatastore:
        """Build a datastore and open it.

        Rerun it after a crash or an interrupt: it resumes, and the result is byte-identical. Until it is finished, its work
        is kept beside `path` in a hidden folder.

        Args:
            documents: an iterable of texts, of dicts with `text` (and optionally `id`, `title`, `source` and any other
                field) or of `Path`s; or the path of a .txt, .md, .html, .csv, .tsv, .json, .jsonl, .parquet or .pdf file, also
                packed as .gz, or of a folder of such files; or a `datasets.Dataset` or `IterableDataset` with a `text` column.
                Ids must be unique; documents without text (None, NaN or white space) are skipped and counted.
            path (`str` or `Path`): the folder to make. It appears when it is complete; an existing one is an error.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`): of the language model that will read it.
            embedder ([`ChunkEmbedder`] or `str`): the frozen encoder that makes the keys.
            chunk_size (`int`, defaults to 64): tokens per chunk; m in the paper.
            neighbor_size (`int`, defaults to 128): tokens per neighbor, with its continuation; r in the paper.
            index ([`IndexOptions`] or `str`, defaults to `"auto"`): a FAISS factory string, or options with the recall
                and the memory that the index should have.
            batch_size (`int`, defaults to 64): chunks per forward pass of the embedder.
            shard_chunks (`int`, defaults to 67,108,864): most chunks per shard, except for a single longer document. It
                bounds the memory while building; a cluster searches shards on different machines.
            executor (`int` or [`Executor`], defaults to 1): number of processes on this machine, a
                [`RankExecutor`] under torchrun or Slurm, or a [`RayExecutor`].
            show_progress (`bool`, *optional*): show progress bars; by default on a terminal only.
            encoding (`str`, *optional*): of files without a mark (BOM), such as `"cp1252"`; UTF-8 by default.
            split (`str`, *optional*): make several documents of each, by `"line"`, `"paragraph"` (ended by a blank line) or
                `"heading"` (of Markdown, or HTML). The number of a part's first line is added to the id: `notes.md:12`.
        Returns:
            [`RetroDatastore`]: the opened store.
        Raises:
            DatastoreInputError: for documents or options from which no store can be built.
            DatastoreExistsError: if something is at `path`.
        *Determinism*: the same documents, tokenizer, embedder, library versions and thread count give the same bytes.
        *Memory*: a few hundred MB and the encoder, whatever the input; then the index of one shard.
        """
        reader = DocumentReader(documents, encoding=encoding, split=split)
        tokenizer = compatibility.load_tokenizer(tokenizer)
        options = BuildOptions(
            tokenizer=tokenizer,
            embedder=ChunkEmbedder.of(embedder),
            chunk_size=chunk_size,
            neighbor_size=neighbor_size,
            index=IndexOptions.of(index),
            batch_size=batch_size,
            shard_chunks=shard_chunks,
            show_progress=show_progress,
        )
        build_datastore(reader, path, options, as_executor(executor))
        datastore = cls.load(path)
        datastore._tokenizer = tokenizer
        return datastore

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase | str,
        *,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> RetroDatastore:
        """Build a datastore from texts or dicts, by default in a temporary folder that exists as long as the object.

        Args:
            path (`str` or `Path`, *optional*): the folder to make instead of a temporary one.
            options: the other options of [`RetroDatastore.build`]: `embedder`, `chunk_size`, `neighbor_size`, `index`,
                `batch_size`, `shard_chunks`, `executor`, `show_progress`, `encoding`, `split`.
        """
        if path is not None:
            return cls.build(texts, path, tokenizer=tokenizer, **options)
        folder = tempfile.mkdtemp(prefix="retro-datastore-")
        try:
            datastore = cls.build(texts, Path(folder) / "store", tokenizer=tokenizer, **options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(datastore, _remove_own_folder, folder, os.getpid())
        return datastore

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> RetroDatastore:
        """Open a datastore read-only.

        Args:
            path (`str` or `Path`): its folder.
            verify (`bool`, defaults to `False`): also check the sha256 of every file (about 2 GB per second).
        Raises:
            DatastoreNotFoundError: if there is no datastore.
            DatastoreCorruptError: if a file is missing, or has another size or (with `verify`) other content than its
                manifest says.
        """
        datastore = cls(path)
        if arguments.flag("verify", verify, DatastoreInputError):
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

        A downloaded store is read-only: [`save`] makes a copy that can be changed.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository.
            revision (`str`, *optional*): branch, tag or commit; a commit pins the content.
            cache_dir (`str` or `Path`, *optional*): where downloads are kept; by default `$HF_HOME/hub`.
            token (`str`, *optional*): for the Hub; by default the one that `hf auth login` saved.
            verify (`bool`, defaults to `True`): check the sha256 of every downloaded file (about 2 GB per second), also
                of files that were downloaded before.
        Raises:
            DatastoreNotFoundError: if there is no such folder or repository, or it holds no datastore.
            DatastoreCorruptError: if its files are not what its manifest says.
        """
        return cls.load(
            hub.local_folder(name_or_path, revision=revision, cache_dir=cache_dir, token=token, verify=verify)
        )

    def refresh(self) -> None:
        """Open the current generation, with all documents that were appended, deleted or compacted in the meantime.

        Raises:
            DatastoreCorruptError: if the folder is damaged; the opened generation stays open.
        """
        if DatastoreManifest.read(self.path) != self.manifest:
            self._opened = Generation.current(self.path, self.shards)

    def snapshot(self) -> RetroDatastore:
        """The same datastore, which stays at its generation until its own `refresh()`. Nothing is copied or opened.

        Threads may refresh or change a datastore that others read. Calls that belong together are made on one snapshot: chunk
        ids of one generation may name other text in the next.
        """
        snapshot = object.__new__(type(self))
        # The original is kept: a temporary folder exists as long as it does.
        snapshot.__dict__ |= self.__dict__ | {"_original": self}
        return snapshot

    # Each is documented where it is defined, with the datastore as its first argument.
    append = edit.append
    compare = edit.compare
    sync = edit.sync
    delete = edit.delete
    compact = edit.compact
    save = derive.save
    subset = derive.subset
    retokenize = derive.retokenize
    merge = staticmethod(derive.merge)
    push_to_hub = hub.push
    check_compatible = compatibility.check_compatible
    texts_of = text_of_chunks.texts_of
    coverage = key_coverage.coverage

    def verify(self) -> None:
        """Check the size and the sha256 of every file; raises `DatastoreCorruptError` at the first that differs."""
        with_current_files([self], lambda: check_content(self.path, self.manifest.files))

    @property
    def manifest(self) -> DatastoreManifest:
        """What the folder records about itself."""
        return self._opened.manifest

    @property
    def generation(self) -> int:
        """1 when built, one more with every change."""
        return self.manifest.generation

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The opened shards; documents and chunks are numbered in this order."""
        return self._opened.shards

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
        """Chunks in the store, those of deleted documents included: the largest chunk id plus one."""
        return int(self._opened.chunk_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents in the store, deleted ones included; empty documents of the input are not in it."""
        return int(self._opened.document_starts[-1])

    @property
    def num_deleted_documents(self) -> int:
        """Documents that are not returned any more."""
        return len(self._opened.deleted)

    @property
    def deleted_documents(self) -> np.ndarray:
        """Numbers (int64) of the documents that are not returned any more, in order."""
        return self._opened.deleted

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, without padding."""
        return self.manifest.num_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the token stream, from the store's own copy."""
        if self._tokenizer is None:
            original = self._original
            self._tokenizer = compatibility.load_own_tokenizer(self.path) if original is None else original.tokenizer
        return self._tokenizer

    def gather(self, chunk_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """The neighbors of given chunk ids: each chunk and what follows it in the same document.

        Args:
            chunk_ids (`np.ndarray` of integers, any shape `(...)`): -1 stands for no neighbor.
        Returns:
            `(tokens, mask)`, both `np.ndarray` of int64 and shape `(..., neighbor_size)`. The mask is 1 at tokens and
            0 at padding; tokens are 0 where it is 0. Chunks of deleted documents give no neighbor.
        Raises:
            DatastoreInputError: for an id that is not in the store.
        """
        opened = self._opened
        return opened.gather(opened.chunk_ids(chunk_ids))

    def keys_of(self, chunk_ids: Any) -> np.ndarray:
        """The keys of given chunk ids (integers, `(n,)`): float32 of shape `(n, dim)`, rows of length 1; zeros for -1."""
        opened = self._opened
        ids = opened.chunk_ids(chunk_ids)
        keys = np.zeros((*ids.shape, opened.manifest.dim), dtype=np.float32)
        for number, here in opened.by_shard(ids):
            keys[here] = opened.shards[number].keys[ids[here] - opened.chunk_starts[number]]
        return keys

    def document_of(self, chunk_ids: Any) -> np.ndarray:
        """Document numbers (int64, in the shape of `chunk_ids`) of chunks; -1 for -1."""
        opened = self._opened
        return opened.document_of(opened.chunk_ids(chunk_ids))

    def first_chunks(self, documents: Any) -> np.ndarray:
        """The first chunk (int64) of documents by number; for `num_documents` the number of chunks."""
        return self._opened.first_chunks(documents)

    def random_chunks(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Chunk ids (int64) drawn uniformly from the documents that are not deleted; -1 if there are none."""
        opened = self._opened
        num_chunks, num_documents = int(opened.chunk_starts[-1]), int(opened.document_starts[-1])
        sizes = shape if isinstance(shape, tuple) else (shape,)
        for size in sizes:
            arguments.whole("A size of the shape", size, DatastoreInputError, least=0, most=MAX_GATHERED)
        if not isinstance(generator, np.random.Generator) or math.prod(sizes) > MAX_GATHERED:
            raise DatastoreInputError(
                f"The generator is of type {type(generator).__name__} and the shape {shape}. Pass a `np.random.Generator` and at most "
                f"{MAX_GATHERED:,} chunks."
            )
        ids = generator.integers(num_chunks, size=shape)
        # Drawn again until none is hidden, which keeps the others equally likely.
        while len(opened.deleted):
            hidden = np.isin(opened.document_of(ids), opened.deleted)
            if not hidden.any():
                break
            if len(opened.deleted) == num_documents:
                return np.full(shape, -1, dtype=np.int64)
            ids[hidden] = generator.integers(num_chunks, size=np.count_nonzero(hidden))
        return ids

    def document(self, number: int) -> dict[str, Any]:
        """One document: `id`, `title`, `source`, `text`, and all other fields that it was given with.

        Raises:
            DatastoreInputError: if there is no such document, or it has been deleted.
        """
        opened = self._opened
        shard, local = opened.place_of(number)
        if number in opened.deleted:
            raise DatastoreInputError(f"Document {number} has been deleted from {str(self.path)!r}.")
        return shard.documents.document(local)

    def document_id(self, number: int) -> str:
        """The id of a document by its number, without reading its text."""
        shard, local = self._opened.place_of(number)
        return shard.documents.document_id(local)

    def document_number(self, id: str) -> int:
        """The number of the document with a given id.

        Raises:
            DatastoreInputError: if there is none, or it has been deleted.
        """
        number = self.document_numbers([id])[0]
        if number < 0:
            raise DatastoreInputError(
                f"There is no document with the id {id!r} in {str(self.path)!r}. {document_changes.similar_ids(self, id)}".rstrip()
            )
        return int(number)

    def document_numbers(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers (int64, `(n,)`) of documents by id, -1 for ids that are not there or have been deleted."""
        opened, ids = self._opened, arguments.texts("Id", ids, DatastoreInputError)
        hashes = np.array([hash_of(id) for id in ids], dtype=np.uint64)
        numbers = np.full(len(ids), -1, dtype=np.int64)
        deleted = set(opened.deleted.tolist())
        for shard, start in zip(opened.shards, opened.document_starts, strict=False):
            for place, local in shard.find_ids(hashes):
                number = local + int(start)
                # Two ids may have the same hash.
                if number not in deleted and shard.documents.document_id(local) == ids[place]:
                    numbers[place] = number
        return numbers

    def search(
        self, queries: np.ndarray, num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks of each query, best first.

        Args:
            queries (`np.ndarray` of float32 and shape `(num_queries, dim)`): unit vectors of the store's embedder.
            num_neighbors (`int`): chunks per query; k in the paper.
            exclude_documents (`np.ndarray` of integers and shape `(num_queries,)` or `(num_queries, any)`,
                *optional*): document numbers whose chunks a query must not get, -1 for none. In training a chunk must
                not retrieve its own document, from which it could copy the answer. The next best chunks take the place
                of excluded ones.
        Returns:
            `(scores, chunk_ids)` of shape `(num_queries, num_neighbors)`, float32 and int64. A score is the inner
            product of the unit vectors, so a bigger one is nearer; the paper's distance is `d = 2 - 2 * score`. Where
            the store has no more chunks, the id is -1 and the score -inf.
        """
        opened = self._opened
        queries, excluded = checked_search(opened.manifest, queries, num_neighbors, exclude_documents)
        return opened.search(queries, num_neighbors, excluded)

    def restricted_to(self, documents: np.ndarray) -> RestrictedIndex:
        """An index of some documents (bool, `(num_documents,)`), for an [`EmbeddingSearcher`]; nothing is copied."""
        return RestrictedIndex(self, documents)

    def __len__(self) -> int:
        return self.num_chunks

    def __getstate__(self) -> dict[str, Any]:
        return {"path": os.path.abspath(self.path)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]  # opened as by its maker

    def __repr__(self) -> str:
        return (
            f"RetroDatastore({str(self.path)!r}, num_documents={self.num_documents}, num_chunks={self.num_chunks}, "
            f"chunk_size={self.chunk_size}, neighbor_size={self.neighbor_size}, "
            f"index={self.manifest.index['factory']!r}, embedder={self.manifest.embedder['name']!r})"
        )


def _remove_own_folder(folder: str, owner: int) -> None:
    # A forked child has a copy of the object, but must not remove the folder of its parent.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
