"""LexicalSearcher: BM25 over the texts of a datastore's chunks."""

from __future__ import annotations

import json
import os
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from .. import extras
from ..errors import (
    DatastoreCorruptError,
    DatastoreInputError,
    DatastoreMismatchError,
    DatastoreNotFoundError,
    RetroError,
    counted,
)
from .chunks import chunk_texts, ranges
from .exclusion import checked_exclusion
from .executors import progress_bar
from .storage import map_npy, new_folder, sha256_of, write_file


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .store import RetroDatastore

__all__ = ["LexicalSearcher"]

logger = logging.get_logger(__name__)

_NAME = "lexical.json"
_BLOCK_CHUNKS = 1 << 14
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_COUNT = 1 << 48
# What `bm25s` writes: read in whole when it is opened, or mapped.
_READ = ("params.index.json", "vocab.index.json")
_MAPPED: dict[str, tuple[str, np.dtype[Any]]] = {
    "data": ("data.csc.index.npy", np.dtype(np.float32)),
    "indices": ("indices.csc.index.npy", np.dtype(np.int32)),
    "indptr": ("indptr.csc.index.npy", np.dtype(np.int64)),
}


def _import_bm25s() -> Any:
    return extras.load("bm25s", "Search by words")


def _words(texts: Sequence[str]) -> list[list[str]]:
    """Words of at least two letters or digits, in lower case; the same for chunks and queries."""
    return _import_bm25s().tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)


class LexicalSearcher:
    """Finds the chunks that share words with a text, ranked by BM25 in Lucene's form, through `bm25s`.

    Neighbors found by their words lower RETRO's perplexity where text is to be continued word by word (Doostmohammadi et
    al., 2023). A word is a run of two or more letters or digits, so scripts without spaces are not served. A chunk that
    shares no word with the query is no neighbor: there may be fewer than were asked for. Search is exact.

    Made by [`LexicalSearcher.build`], opened by [`LexicalSearcher.load`]. Documents may be deleted from the datastore
    meanwhile; after documents were appended, or the store compacted, it must be built again.

    *Memory*: 8 bytes per different word of each chunk (about 0.4 GB per million chunks of 64 tokens), in memory or
    memory-mapped from its folder; while building, about five times that.
    *Cost*: a query reads the list of every word it has, in time proportional to the number of chunks.
    """

    metric = "bm25"

    def __init__(self, datastore: RetroDatastore, bm25: Any, path: Path | None = None) -> None:
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
            path (`str` or `Path`, *optional*): a new folder to keep the index in; by default it stays in memory.
            show_progress (`bool`, *optional*): a progress bar; by default on a terminal only.
        Raises:
            DatastoreInputError: if no chunk has a word.
            DatastoreExistsError: if `path` is taken.
        """
        bm25s = _import_bm25s()
        start = time.perf_counter()
        vocabulary: dict[str, int] = {}
        rows = []
        size, count = datastore.chunk_size, datastore.num_chunks
        with progress_bar(show_progress, total=count, unit="chunk", desc="Indexing words") as progress:
            for first in range(0, count, _BLOCK_CHUNKS):
                tokens, mask = datastore.gather(np.arange(first, min(first + _BLOCK_CHUNKS, count)))
                texts = chunk_texts(datastore.tokenizer, tokens[:, :size], mask[:, :size])
                rows += [array("i", [vocabulary.setdefault(w, len(vocabulary)) for w in row]) for row in _words(texts)]
                progress.update(len(texts))
        if datastore.num_deleted_documents == datastore.num_documents:
            raise DatastoreInputError(
                f"All documents of {str(datastore.path)!r} have been deleted, so there is no word to be found. Append some first."
            )
        if not vocabulary:
            raise DatastoreInputError(
                f"No chunk of {str(datastore.path)!r} ({counted(count, 'chunk')}) has a word of two letters or digits to be found by. "
                "Use an EmbeddingSearcher."
            )
        bm25 = bm25s.BM25(backend="numpy")
        bm25.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        searcher = cls(datastore, bm25)
        num_bytes = sum(part.nbytes for part in bm25.scores.values() if isinstance(part, np.ndarray))
        logger.info(
            f"Indexed the words of {counted(count, 'chunk')}: {len(vocabulary):,} different ones, {num_bytes / 1e6:,.1f} MB, in "
            f"{time.perf_counter() - start:,.1f} s."
        )
        if path is None:
            return searcher
        with new_folder(Path(path)) as folder:
            bm25.save(folder, show_progress=False)
            # Last, as the manifest of a datastore.
            write_file(folder / _NAME, (json.dumps(_describe(folder, searcher), indent=2) + "\n").encode())
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
        path = Path(os.path.abspath(path))
        if not (path / _NAME).is_file():
            raise DatastoreNotFoundError(
                f"There is no index of words at {str(path)!r}. Check the path, or build one with "
                "`LexicalSearcher.build(datastore, path)`."
            )
        bm25s = _import_bm25s()
        content = _read_description(path)
        if content["shards"] != _shards_of(datastore):
            raise _mismatch(datastore, path)
        _check_bytes(path, content, _READ)
        num_words, num_entries = content["num_words"], content["num_entries"]
        lengths = {"data": num_entries, "indices": num_entries, "indptr": num_words + 1}
        try:
            arrays = {key: map_npy(path / name, dtype, lengths[key]) for key, (name, dtype) in _MAPPED.items()}
            bm25 = bm25s.BM25.load(path, mmap=True, show_progress=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RetroError) as error:
            raise _damaged(path, str(error)) from error
        starts = arrays["indptr"]
        sound = (starts[0], starts[-1]) == (0, num_entries) and bool((np.diff(starts) >= 0).all())
        if not sound or sorted(bm25.vocab_dict.values()) != list(range(num_words)):
            raise _damaged(path, "its words and their lists contradict each other")
        if bm25.scores["num_docs"] != datastore.num_chunks:
            raise _damaged(path, f"it has {bm25.scores['num_docs']} chunks, and the datastore {datastore.num_chunks}")
        searcher = cls(datastore, bm25, path)
        if verify:
            searcher.verify()
        return searcher

    def verify(self) -> None:
        """Compare every byte of the folder with its checksums; without a folder there is nothing to compare.

        Raises:
            DatastoreCorruptError: if a byte is not as it was written.
        """
        if self.path is not None:
            content = _read_description(self.path)
            _check_bytes(self.path, content, content["files"])

    def search(
        self, texts: Sequence[str], num_neighbors: int, *, exclude_documents: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See [`Searcher.search`]; a score is BM25's, above 0 and without an upper bound.

        Raises:
            DatastoreMismatchError: if the datastore has got other chunks since the index was built.
            DatastoreCorruptError: if its lists name chunks that do not exist.
        """
        store = self.datastore
        if _shards_of(store) != self._shards:
            raise _mismatch(store, self.path)
        if num_neighbors < 1:
            raise DatastoreInputError(f"num_neighbors is {num_neighbors}, but it must be at least 1.")
        excluded = np.empty((len(texts), 0), dtype=np.int64)
        if exclude_documents is not None:
            excluded = checked_exclusion(exclude_documents, len(texts), store.num_documents)
        deleted = _chunks_of(store, store.deleted_documents)
        scores = np.full((len(texts), num_neighbors), -np.inf, dtype=np.float32)
        ids = np.full((len(texts), num_neighbors), -1, dtype=np.int64)
        for row, words in enumerate(_words(texts)):
            try:
                everything = self._bm25.get_scores_from_ids(self._bm25.get_tokens_ids(words))
            except IndexError as error:
                raise _damaged(Path(self.path or ""), f"it names a chunk that does not exist ({error})") from error
            everything[deleted] = 0
            everything[_chunks_of(store, excluded[row][excluded[row] >= 0])] = 0
            found = _best(everything, num_neighbors)
            scores[row, : len(found)], ids[row, : len(found)] = everything[found], found
        return scores, ids

    def __getstate__(self) -> dict[str, Any]:
        # What lies in a folder is opened again by each process.
        return {**self.__dict__, "_bm25": self._bm25 if self.path is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self._bm25 = self.load(self.datastore, self.path)._bm25

    def __repr__(self) -> str:
        return f"LexicalSearcher({self.datastore!r}, path={str(self.path) if self.path else None!r})"


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the best positive scores, best first; the first place wins a tie."""
    least = np.partition(scores, -count)[-count] if count < len(scores) else 0
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]


def _chunks_of(datastore: RetroDatastore, documents: np.ndarray) -> np.ndarray:
    """The chunks (int64) of documents by number."""
    first = datastore.first_chunks(documents)
    return ranges(first, datastore.first_chunks(documents + 1) - first)


def _shards_of(datastore: RetroDatastore) -> list[str]:
    """What the chunks and their numbers hang on: the token streams, in order."""
    return [entry.sha256 for kind in ("tokens", "doc_offsets") for entry in datastore.manifest.entries(kind)]


def _describe(folder: Path, searcher: LexicalSearcher) -> dict[str, Any]:
    """What is written beside the files of an index: what it was built from, and how to know them again."""
    names = [*_READ, *(name for name, _ in _MAPPED.values())]
    return {
        "shards": searcher._shards,
        "num_words": len(searcher._bm25.vocab_dict),
        "num_entries": len(searcher._bm25.scores["data"]),
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names
        },
    }


def _read_description(path: Path) -> dict[str, Any]:
    """What [`_describe`] said, after checking its form and the size of every file."""
    try:
        if (size := (path / _NAME).stat().st_size) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"{_NAME} is {size:,} bytes long, more than {_MAX_MANIFEST_BYTES:,}")
        content = json.loads((path / _NAME).read_bytes())
        if sorted(content) != ["files", "num_entries", "num_words", "shards"]:
            raise ValueError(f"{_NAME} has the fields {sorted(content)}")
        if sorted(content["files"]) != sorted([*_READ, *(name for name, _ in _MAPPED.values())]):
            raise ValueError(f"{_NAME} lists the files {sorted(content['files'])}")
        for name in ("num_words", "num_entries"):
            if type(content[name]) is not int or not 0 < content[name] < _MAX_COUNT:
                raise ValueError(f"{name} is {content[name]!r}, not a positive integer below {_MAX_COUNT}")
        for name, entry in content["files"].items():
            if (found := (path / name).stat().st_size) != entry["size"]:
                raise ValueError(f"{name} has {found:,} bytes, and was written with {entry['size']}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return content


def _check_bytes(path: Path, content: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise _damaged(path, str(error)) from error
        if found != content["files"][name].get("sha256"):
            raise _damaged(path, f"the content of {name} is not what was written")


def _mismatch(datastore: RetroDatastore, path: Path | None) -> DatastoreMismatchError:
    what = "The index of words" if path is None else f"The index of words {str(path)!r}"
    return DatastoreMismatchError(
        f"{what} was built from other chunks than those of the datastore {str(datastore.path)!r} (generation "
        f"{datastore.generation}): its chunk ids would name other text. Build it again: "
        "`LexicalSearcher.build(datastore, new_path)`."
    )


def _damaged(path: Path, reason: str) -> DatastoreCorruptError:
    return DatastoreCorruptError(
        f"The index of words {str(path)!r} is damaged: {reason}. Build it again: `LexicalSearcher.build(datastore, "
        "new_path)`."
    )
