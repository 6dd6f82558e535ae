"""LexicalSearcher: BM25 over the texts of a datastore's chunks."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from .. import arguments, extras
from ..errors import (
    DatastoreInputError,
    DatastoreMismatchError,
    DatastoreNotFoundError,
    counted,
)
from ..outside import read_json
from ..progress import progress_bar
from .atomic_files import damaged, map_npy, new_folder, reading, write_file
from .chunks import ranges
from .compatibility import check_datastore
from .manifest import FileEntry, check_content, check_sizes, checked_path, describe_file
from .search_excluding import check_num_neighbors, checked_exclusion
from .store_generation import MAX_GATHERED
from .words import WORDS_VERSION, words_function


if TYPE_CHECKING:
    from .store import RetroDatastore

logger = logging.get_logger(__name__)

_NAME = "lexical.json"
_REMEDY = "Build it again: `LexicalSearcher.build(datastore, new_path)`."
_BLOCK_CHUNKS = 1 << 14
_MAX_COUNT = 1 << 48
# The files of `bm25s`: those it reads into memory, and those that are mapped.
_READ = ("params.index.json", "vocab.index.json")
_MAPPED: dict[str, tuple[str, Any]] = {
    "data": ("data.csc.index.npy", np.float32),
    "indices": ("indices.csc.index.npy", np.int32),
    "indptr": ("indptr.csc.index.npy", np.int64),
}
# An index without the field `words` is of the first rule for words.
_FIELDS = {"shards", "num_words", "num_entries", "files", "words"}
_FILES = (*_READ, *(name for name, _ in _MAPPED.values()))


def _bm25s() -> Any:
    return extras.load("bm25s", "Search by words")


class LexicalSearcher:
    """Finds the chunks that share words with a text, ranked by BM25 in Lucene's form, through `bm25s`.

    Neighbors found by their words lower RETRO's perplexity where text is continued word by word (Doostmohammadi et al.,
    2023). A word is a run of two or more letters or digits; where a script has no spaces between words, the characters and the
    pairs of characters are taken for words (of Thai and its like, two and three letters in a row). A chunk without a word of
    the query is not a neighbor, so there may be fewer neighbors than asked for. Search is exact.

    Made by [`LexicalSearcher.build`], opened by [`LexicalSearcher.load`]. Documents may be deleted from the datastore
    afterwards. After documents were appended, or the store compacted, build it again.

    Attributes:
        words (`Callable`): for a list of texts, the words of each that are looked up.

    *Memory*: 8 bytes per different word of each chunk (about 0.4 GB per million chunks of 64 tokens), in memory or
    memory-mapped from its folder; while building, about five times that.
    *Cost*: a query reads the list of every word it has, in time proportional to the number of chunks.
    """

    metric = "bm25"

    def __init__(
        self, datastore: RetroDatastore, bm25: Any, path: Path | None = None, words_version: int = WORDS_VERSION
    ) -> None:
        self.words = words_function(words_version)
        self.datastore = datastore
        self.path = path
        self._bm25 = bm25
        self._shards = _shards_of(datastore)

    @classmethod
    def build(
        cls,
        datastore: RetroDatastore,
        path: str | os.PathLike[str] | None = None,
        *,
        show_progress: bool | None = None,
    ) -> LexicalSearcher:
        """Index the words of every chunk of a datastore.

        Args:
            datastore ([`RetroDatastore`]): whose chunks are to be found.
            path (`str` or `Path`, *optional*): a new folder for the index; by default it stays in memory.
            show_progress (`bool`, *optional*): show a progress bar; by default on a terminal only.
        Raises:
            DatastoreInputError: if no chunk has a word.
            DatastoreExistsError: if something is at `path`.
        """
        bm25s = _bm25s()
        check_datastore(datastore)
        path = None if path is None else checked_path(path)
        start = time.perf_counter()
        vocabulary: dict[str, int] = {}
        words = words_function(WORDS_VERSION)
        rows = []
        count = datastore.num_chunks
        with progress_bar(show_progress, total=count, unit="chunk", desc="Indexing words") as progress:
            step = max(1, min(_BLOCK_CHUNKS, MAX_GATHERED // datastore.neighbor_size))
            for first in range(0, count, step):
                texts = [text for text, _ in datastore.texts_of(np.arange(first, min(first + step, count)))]
                # Word ids in compact arrays: lists of Python integers would take ten times the memory.
                rows += [array("i", [vocabulary.setdefault(w, len(vocabulary)) for w in row]) for row in words(texts)]
                progress.update(len(texts))
        if not vocabulary:
            gone = datastore.num_deleted_documents == datastore.num_documents
            what = "has documents that are not deleted" if gone else "has a word of two letters or digits"
            raise DatastoreInputError(
                f"No chunk of {str(datastore.path)!r} {what}. {'Append some first' if gone else 'Use an EmbeddingSearcher'}."
            )
        bm25 = bm25s.BM25(backend="numpy")
        bm25.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        num_bytes = sum(part.nbytes for part in bm25.scores.values() if isinstance(part, np.ndarray))
        logger.info(
            f"Indexed the words of {counted(count, 'chunk')}: {len(vocabulary):,} different ones, {num_bytes / 1e6:,.1f} MB, in "
            f"{time.perf_counter() - start:,.1f} s."
        )
        if path is None:
            return cls(datastore, bm25)
        with new_folder(path) as folder:
            bm25.save(folder, show_progress=False)
            entries = [describe_file(folder / name, "words") for name in _FILES]
            content = {
                "words": WORDS_VERSION,
                "shards": _shards_of(datastore),
                "num_words": len(bm25.vocab_dict),
                "num_entries": len(bm25.scores["data"]),
                "files": {entry.name: {"size": entry.size, "sha256": entry.sha256} for entry in entries},
            }
            # Last, as the manifest of a datastore.
            write_file(folder / _NAME, (json.dumps(content, indent=2) + "\n").encode())
        return cls.load(datastore, path)

    @classmethod
    def load(cls, datastore: RetroDatastore, path: str | os.PathLike[str], *, verify: bool = False) -> LexicalSearcher:
        """Open an index that [`LexicalSearcher.build`] has written, through memory maps.

        Args:
            datastore ([`RetroDatastore`]): that it was built from.
            path (`str` or `Path`): its folder.
            verify (`bool`, defaults to `False`): also [`verify`](LexicalSearcher.verify) it.
        Raises:
            DatastoreNotFoundError: if there is none.
            DatastoreMismatchError: if it was built from other chunks than the datastore's.
            DatastoreCorruptError: if its files are damaged.
        """
        check_datastore(datastore)
        path = Path(os.path.abspath(checked_path(path)))
        verify = arguments.flag("verify", verify, DatastoreInputError)
        if not os.path.isfile(path / _NAME):
            raise DatastoreNotFoundError(
                f"There is no index of words at {str(path)!r}. Check the path, or build one with "
                "`LexicalSearcher.build(datastore, path)`."
            )
        bm25s = _bm25s()
        content, files = _read_description(path)
        if content["shards"] != _shards_of(datastore):
            raise _mismatch(datastore, path)
        check_sizes(path, files, _REMEDY)
        # The two small files are parsed by bm25s, which trusts them, so they are verified every time.
        check_content(path, [file for file in files if file.name in _READ], _REMEDY)
        num_words, num_entries = content["num_words"], content["num_entries"]
        lengths = {"data": num_entries, "indices": num_entries, "indptr": num_words + 1}
        with reading(path, _REMEDY):
            arrays = {key: map_npy(path / name, np.dtype(kind), lengths[key]) for key, (name, kind) in _MAPPED.items()}
            # Read and mapped by bm25s from files that were just checked.
            bm25 = bm25s.BM25.load(path, mmap=True, show_progress=False)
            starts = arrays["indptr"]
            sound = (starts[0], starts[-1]) == (0, num_entries) and bool((np.diff(starts) >= 0).all())
            if not sound or sorted(bm25.vocab_dict.values()) != list(range(num_words)):
                raise ValueError("its words and their lists contradict each other")
            if bm25.scores["num_docs"] != datastore.num_chunks:
                raise ValueError(f"it has {bm25.scores['num_docs']} instead of {datastore.num_chunks} chunks")
            # Of the same arrays without open files, which bm25s would keep.
            bm25.scores |= arrays
        searcher = cls(datastore, bm25, path, content["words"])
        if verify:
            searcher.verify()
        return searcher

    def over(self, datastore: RetroDatastore) -> LexicalSearcher:
        """The same searcher over a snapshot of its datastore."""
        check_datastore(datastore)
        searcher = object.__new__(type(self))
        searcher.__dict__ |= self.__dict__ | {"datastore": datastore}
        return searcher

    def verify(self) -> None:
        """Check the sha256 of every file of the folder; an index in memory has nothing to check.

        Raises:
            DatastoreCorruptError: if a file differs.
        """
        if self.path is not None:
            check_content(self.path, _read_description(self.path)[1], _REMEDY)

    def search(
        self, texts: Sequence[str], num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See [`Searcher.search`]; a score is BM25's, above 0 and without an upper bound.

        Raises:
            DatastoreMismatchError: if the datastore has got other chunks since the index was built.
            DatastoreCorruptError: if its lists name chunks that do not exist.
        """
        store, texts = self.datastore, arguments.texts("Text", texts, DatastoreInputError)
        if _shards_of(store) != self._shards:
            raise _mismatch(store, self.path)
        check_num_neighbors(num_neighbors, store.num_chunks)
        excluded = np.empty((len(texts), 0), dtype=np.int64)
        if exclude_documents is not None:
            excluded = checked_exclusion(exclude_documents, len(texts), store.num_documents)
        deleted = _chunks_of(store, store.deleted_documents)
        scores = np.full((len(texts), num_neighbors), -np.inf, dtype=np.float32)
        ids = np.full((len(texts), num_neighbors), -1, dtype=np.int64)
        for row, words in enumerate(self.words(texts)):
            try:
                everything = self._bm25.get_scores_from_ids(self._bm25.get_tokens_ids(words))
            except IndexError as error:
                raise damaged(
                    Path(self.path or ""), f"it names a chunk that does not exist ({error})", _REMEDY
                ) from error
            # BM25 scores every chunk at once, so hidden chunks need no second search: a score of 0 is no neighbor.
            everything[deleted] = 0
            everything[_chunks_of(store, excluded[row][excluded[row] >= 0])] = 0
            found = _best(everything, num_neighbors)
            scores[row, : len(found)], ids[row, : len(found)] = everything[found], found
        return scores, ids

    def __getstate__(self) -> dict[str, Any]:
        # An index in a folder is opened again by each process.
        return {**self.__dict__, "_bm25": self._bm25 if self.path is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self._bm25 = self.load(self.datastore, self.path)._bm25

    def __repr__(self) -> str:
        return f"LexicalSearcher({self.datastore!r}, path={str(self.path) if self.path else None!r})"


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the best positive scores, best first; the first place wins a tie."""
    # Only candidates that reach the last wanted score are sorted, which is much less than all chunks.
    least = np.partition(scores, -count)[-count] if count < len(scores) else 0
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]


def _chunks_of(datastore: RetroDatastore, documents: np.ndarray) -> np.ndarray:
    """The chunks (int64) of documents by number."""
    first = datastore.first_chunks(documents)
    return ranges(first, datastore.first_chunks(documents + 1) - first)


def _shards_of(datastore: RetroDatastore) -> list[str]:
    """What the chunks and their numbers depend on: the token streams, in order."""
    return [entry.sha256 for kind in ("tokens", "doc_offsets") for entry in datastore.manifest.entries(kind)]


def _read_description(path: Path) -> tuple[dict[str, Any], list[FileEntry]]:
    """The content of `lexical.json` after validation, and the files that it names."""
    with reading(path, _REMEDY):
        content = read_json(path, _NAME)
        content.setdefault("words", 1)
        counts = content["num_words"], content["num_entries"]
        sound = set(content) == _FIELDS and set(content["files"]) == set(_FILES)
        if content["words"] not in (1, WORDS_VERSION):
            raise ValueError(f"its words are of version {content['words']!r:.20}, which this library does not know")
        if not sound or not all(type(number) is int and 0 < number < _MAX_COUNT for number in counts):
            raise ValueError(f"{_NAME} has other fields, files or counts than this library writes")
        return content, [FileEntry(name=name, kind="words", **entry) for name, entry in content["files"].items()]


def _mismatch(datastore: RetroDatastore, path: Path | None) -> DatastoreMismatchError:
    what = "The index of words" if path is None else f"The index of words {str(path)!r}"
    return DatastoreMismatchError(
        f"{what} was built from other chunks than those of {str(datastore.path)!r} (generation {datastore.generation}), so its "
        f"chunk ids would name other text. {_REMEDY}"
    )
