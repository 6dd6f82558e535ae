"""RetroRetriever: completed chunks in, neighbor tokens out; the callable between a datastore and a model."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from . import arguments
from .datastore import ChunkEmbedder, EmbeddingSearcher, RetroDatastore, Searcher, chunk_texts
from .datastore.atomic_files import write_file
from .datastore.compatibility import is_copy, load_tokenizer
from .datastore.documents import without_lone_surrogates
from .datastore.hub import local_folder, push
from .datastore.result_filter import select
from .datastore.search_excluding import check_num_neighbors, checked_exclusion
from .errors import RetrieverError
from .locks import Lock
from .retrieved import SETTINGS_NAME, RetrievalResult, RetrievedNeighbor, saved_settings, token_rows
from .special_tokens import special_ids
from .user_turns import user_turns


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class _Cache:
    """What was found for chunks in one generation of a datastore; the least recently used are dropped first."""

    def __init__(self, datastore: RetroDatastore) -> None:
        self._opened = datastore._opened
        self._found: OrderedDict[bytes, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def is_of(self, datastore: RetroDatastore) -> bool:
        """Whether it belongs to the generation that a datastore has open."""
        return self._opened is datastore._opened

    def __len__(self) -> int:
        return len(self._found)

    def get(self, names: list[bytes], wanted: int) -> dict[bytes, tuple[np.ndarray, np.ndarray]]:
        """Results with at least the wanted number of neighbors."""
        with self._lock:
            results = {}
            for name in names:
                known = self._found.get(name)
                if known is not None and len(known[0]) >= wanted:
                    self._found.move_to_end(name)
                    results[name] = known
            return results

    def put(self, results: dict[bytes, tuple[np.ndarray, np.ndarray]], size: int) -> None:
        """Keep results, `size` of all at most."""
        with self._lock:
            self._found |= results
            while len(self._found) > size:
                self._found.popitem(last=False)


class RetroRetriever:
    """Finds the neighbors of completed chunks: decodes them, looks the text up, gathers tokens.

    A RETRO model only calls `retriever(chunk_input_ids, chunk_attention_mask)`. Results are cached by the tokens of the
    chunk, so beams and repeated prefixes cost one search.

    Args:
        datastore ([`RetroDatastore`]): where to look.
        embedder ([`ChunkEmbedder`] or `str`, *optional*): the encoder that made the datastore's keys. Pass exactly one of
            `embedder` and `searcher`.
        searcher ([`Searcher`], *optional*): finds the chunks for a text instead, such as a [`LexicalSearcher`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*): of the language model; defaults to
            the copy in the datastore.
        num_neighbors (`int`, defaults to 2): neighbors per chunk. It can be set at any time, also beyond the number that a
            model was trained with. Neighbors with the same tokens as a better one are left out.
        min_score (`float`, *optional*): neighbors with a lower score are not read; the searcher's `metric` says what a score
            is. It can be set at any time.
        cache_size (`int`, defaults to 4096): chunks whose results are cached; 0 switches the cache off.

    Raises:
        DatastoreMismatchError: if tokenizer or embedder are not those of the datastore.
        RetrieverError: if both an embedder and a searcher are given, or neither, or the searcher belongs to another
            datastore.
    *Cost*: one embedding and one search per chunk not seen before, which is one per `chunk_size` generated tokens.
    *Processes*: pickling keeps paths and settings; each process loads the encoder and opens the index on first use.
    """

    def __init__(
        self,
        datastore: RetroDatastore,
        *,
        embedder: ChunkEmbedder | str | None = None,
        searcher: Searcher | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        num_neighbors: int = 2,
        min_score: float | None = None,
        cache_size: int = 4096,
    ) -> None:
        if (embedder is None) == (searcher is None):
            raise RetrieverError("Pass exactly one of `embedder` (which made the datastore's keys) and `searcher`.")
        if not isinstance(datastore, RetroDatastore):
            raise RetrieverError(f"The datastore is of type {type(datastore).__name__}. Pass a RetroDatastore.")
        tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        datastore.check_compatible(tokenizer=tokenizer)
        if embedder is not None:
            searcher = EmbeddingSearcher(datastore, ChunkEmbedder.of(embedder))
        if missing := [name for name in ("metric", "search") if not hasattr(searcher, name)]:
            raise RetrieverError(
                f"The searcher is a {type(searcher).__name__} without {' and '.join(missing)}. It needs a text `metric`, and "
                "`search(texts, num_neighbors, *, exclude_documents=None)` that returns scores and chunk ids."
            )
        other = getattr(searcher, "datastore", datastore)
        if other.path != datastore.path:
            raise RetrieverError(
                f"The searcher finds chunks of {str(other.path)!r}, but the retriever reads {str(datastore.path)!r}. Pass both "
                "the same datastore."
            )
        self._datastore = datastore
        self._searcher: Searcher = searcher  # type: ignore[assignment]  # one of the two is given
        self.cache_size = cache_size
        self.num_neighbors = num_neighbors
        self._tokenizer = tokenizer
        self.min_score = min_score

    def _forget(self) -> None:
        self._cache = _Cache(self.datastore)

    def snapshot(self) -> RetroRetriever:
        """This retriever over the generation of the datastore that is open now, with the same cache. Nothing is opened.

        `generate` and the calls below use one, so what is looked up in one generation is never gathered in another, whatever
        other threads and processes do to the datastore.
        """
        cache, datastore = self._cache, self.datastore.snapshot()
        if not cache.is_of(datastore):
            cache = self._cache = _Cache(datastore)
        snapshot = object.__new__(type(self))
        snapshot.__dict__ |= self.__dict__ | {"_datastore": datastore, "_cache": cache}
        if hasattr(self.searcher, "over"):
            snapshot._searcher = self.searcher.over(datastore)
        return snapshot

    @property
    def datastore(self) -> RetroDatastore:
        """Where neighbors come from."""
        return self._datastore

    @property
    def searcher(self) -> Searcher:
        """Finds the chunks for a text."""
        return self._searcher

    @property
    def num_neighbors(self) -> int:
        """Neighbors per chunk; k in the paper."""
        return self._num_neighbors

    @num_neighbors.setter
    def num_neighbors(self, value: int) -> None:
        self._num_neighbors = arguments.whole("num_neighbors", value, RetrieverError)

    @property
    def min_score(self) -> float | None:
        """The score below which a neighbor is not read; None for any."""
        return self._min_score

    @min_score.setter
    def min_score(self, value: float | None) -> None:
        self._min_score = None if value is None else arguments.real("min_score", value, RetrieverError)
        self._forget()

    @property
    def cache_size(self) -> int:
        """Chunks whose results are cached."""
        return self._cache_size

    @cache_size.setter
    def cache_size(self, value: int) -> None:
        self._cache_size = arguments.whole("cache_size", value, RetrieverError, least=0)

    @property
    def embedder(self) -> ChunkEmbedder | None:
        """The encoder of the queries; None if the searcher has none."""
        return getattr(self.searcher, "embedder", None)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer, which decodes query chunks."""
        return self._tokenizer or self.datastore.tokenizer

    @property
    def chunk_size(self) -> int:
        """Tokens per query chunk."""
        return self.datastore.chunk_size

    @property
    def neighbor_size(self) -> int:
        """Tokens per neighbor."""
        return self.datastore.neighbor_size

    def __call__(
        self, chunk_input_ids: torch.Tensor, chunk_attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Retrieve the neighbors of completed chunks.

        Args:
            chunk_input_ids (`torch.LongTensor` of shape `(num_chunks, chunk_size)`): token ids.
            chunk_attention_mask (`torch.LongTensor` of shape `(num_chunks, chunk_size)`, *optional*): 0 at padding. A
                chunk that is all padding gets no neighbors.
        Returns:
            `(neighbor_input_ids, neighbor_attention_mask)`, both `torch.LongTensor` of shape
            `(num_chunks, num_neighbors, neighbor_size)` on the device of `chunk_input_ids`; mask 0 at padding and at
            neighbors that the datastore is too small to have.
        """
        now = self.snapshot()
        found = now._search(chunk_input_ids, chunk_attention_mask)
        tokens, mask = now.gather(found.chunk_ids)
        device = chunk_input_ids.device
        return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)

    def look_up(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Retrieve the neighbors of texts of any length, as tokens: what a model reads for a query.

        Args:
            texts (`list[str]`): queries.
        Returns:
            `(neighbor_input_ids, neighbor_attention_mask)`, both `torch.LongTensor` of shape
            `(len(texts), num_neighbors, neighbor_size)`.
        """
        now = self.snapshot()
        tokens, mask = now.gather(now.search_texts(texts).chunk_ids)
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def gather(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The neighbors of chunk ids, as [`RetroDatastore.gather`] returns them, but each ends before its first special token.

        A datastore of an older version, or of a stranger, may have special tokens among those of its documents.
        """
        tokens, mask = self.datastore.gather(chunk_ids)
        special = np.isin(tokens, list(special_ids(self.tokenizer))) & (mask == 1)
        if special.any():
            gone = np.logical_or.accumulate(special, axis=-1)
            tokens[gone] = mask[gone] = 0
        return tokens, mask

    def last_turns(
        self, prompt_input_ids: torch.Tensor, prompt_attention_mask: torch.Tensor
    ) -> list[tuple[str, int] | None]:
        """The last user turn of each prompt that the tokenizer's chat template has made.

        Args:
            prompt_input_ids, prompt_attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts.
        Returns:
            For each prompt the text of the turn and how many tokens come before it, padding not counted; None for a prompt
            that is not a chat.
        """
        rows, kept = token_rows(prompt_input_ids, prompt_attention_mask)
        prompts = [row[keep].tolist() for row, keep in zip(rows, kept, strict=True)]
        return user_turns(
            self.tokenizer, prompts, is_copy=self._tokenizer is None and is_copy(self.tokenizer, self.datastore)
        )

    def search(
        self,
        chunk_input_ids: torch.Tensor,
        chunk_attention_mask: torch.Tensor | None = None,
        *,
        num_neighbors: int | None = None,
        exclude_documents: Any = None,
    ) -> RetrievalResult:
        """Find the nearest chunks without gathering their tokens.

        Args:
            chunk_input_ids (`torch.LongTensor` of shape `(num_chunks, chunk_size)`): token ids.
            chunk_attention_mask (`torch.LongTensor` of shape `(num_chunks, chunk_size)`, *optional*): 0 at padding.
            num_neighbors (`int`, *optional*): defaults to the retriever's.
            exclude_documents (`np.ndarray` of integers and shape `(num_chunks,)` or `(num_chunks, any)`, *optional*):
                document numbers that a chunk must not get neighbors from, -1 for none. Such searches are not cached.
        """
        return self.snapshot()._search(
            chunk_input_ids, chunk_attention_mask, num_neighbors=num_neighbors, exclude_documents=exclude_documents
        )

    def _search(
        self,
        chunk_input_ids: torch.Tensor,
        chunk_attention_mask: torch.Tensor | None = None,
        *,
        num_neighbors: int | None = None,
        exclude_documents: Any = None,
    ) -> RetrievalResult:
        rows, mask = token_rows(chunk_input_ids, chunk_attention_mask, self.chunk_size)
        wanted = self.num_neighbors if num_neighbors is None else num_neighbors
        check_num_neighbors(wanted, self.datastore.num_chunks)
        scores = np.full((len(rows), wanted), -np.inf, dtype=np.float32)
        chunk_ids = np.full((len(rows), wanted), -1, dtype=np.int64)
        filled = np.flatnonzero(mask.any(axis=1))
        if exclude_documents is not None:
            excluded = checked_exclusion(exclude_documents, len(rows), self.datastore.num_documents)
            if len(filled):
                texts = chunk_texts(self.tokenizer, rows[filled], mask[filled])
                scores[filled], chunk_ids[filled] = self._ask(texts, wanted, exclude_documents=excluded[filled])
            return RetrievalResult(scores, chunk_ids)

        # The bytes of the real tokens: the same chunk with other padding is found again.
        names = [rows[row][mask[row]].tobytes() for row in filled]
        results = self._cache.get(names, wanted)
        missing = {name: row for name, row in zip(names, filled, strict=True) if name not in results}
        if missing:
            places = np.fromiter(missing.values(), dtype=np.int64)
            found = self._ask(chunk_texts(self.tokenizer, rows[places], mask[places]), wanted)
            fresh = {name: (found[0][place], found[1][place]) for place, name in enumerate(missing)}
            self._cache.put(fresh, self.cache_size)
            results |= fresh
        for name, row in zip(names, filled, strict=True):
            scores[row], chunk_ids[row] = (part[:wanted] for part in results[name])
        return RetrievalResult(scores, chunk_ids)

    def trace(
        self,
        chunk_input_ids: torch.Tensor,
        chunk_attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> list[list[RetrievedNeighbor]]:
        """What was retrieved for each chunk, readable, nearest first; a chunk that was just looked up is not searched again.

        Args:
            options: those of [`~RetroRetriever.search`]: `num_neighbors`, `exclude_documents`.

        Returns:
            `list[list[RetrievedNeighbor]]`: for each chunk at most `num_neighbors` neighbors.
        """
        now = self.snapshot()
        return now._describe(now._search(chunk_input_ids, chunk_attention_mask, **options))

    def find(self, texts: str | list[str], *, num_neighbors: int | None = None) -> list[list[RetrievedNeighbor]]:
        """Look up texts of any length instead of chunks of tokens.

        Args:
            texts (`str` or `list[str]`): queries; an encoder reads as much of each as its maximum length allows.
            num_neighbors (`int`, *optional*): defaults to the retriever's.
        Returns:
            `list[list[RetrievedNeighbor]]`: for each text its neighbors, nearest first.
        """
        now = self.snapshot()
        return now._describe(now.search_texts(texts, num_neighbors))

    def search_texts(self, texts: str | Sequence[str], num_neighbors: int | None = None) -> RetrievalResult:
        """As [`RetroRetriever.find`], without reading what was found."""
        wanted = self.num_neighbors if num_neighbors is None else num_neighbors
        check_num_neighbors(wanted, self.datastore.num_chunks)
        queries = arguments.texts("Query", texts, RetrieverError)
        for number, query in enumerate(queries):
            if not query.strip():
                raise RetrieverError(f"Query {number} has no text. Pass texts with at least one word each.")
        readable = [without_lone_surrogates(query) for query in queries]
        return RetrievalResult(*self._ask(readable, wanted))

    def _ask(
        self, texts: list[str], wanted: int, exclude_documents: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and chunk ids, both of shape `(len(texts), wanted)`: what the searcher finds, without what is not read."""

        def search(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
            options = {} if exclude_documents is None else {"exclude_documents": exclude_documents[rows]}
            return self._checked_search([texts[row] for row in rows], count, **options)

        return select(self.datastore, search, len(texts), wanted, min_score=self.min_score)

    def _checked_search(self, texts: list[str], wanted: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """What the searcher finds. A user's own may return anything, and numpy would broadcast what is too small."""
        found = self.searcher.search(texts, wanted, **options)
        parts = [np.asarray(part) for part in found] if isinstance(found, (tuple, list)) else []
        shape = (len(texts), wanted)
        if [part.shape for part in parts] != [shape, shape] or not np.issubdtype(parts[1].dtype, np.integer):
            returned = ", ".join(f"{part.dtype} of shape {part.shape}" for part in parts) or type(found).__name__
            raise RetrieverError(
                f"{type(self.searcher).__name__}.search returned {returned}. It must return scores and integer chunk ids (-1 for "
                f"none), both of shape {shape}."
            )
        return parts[0], parts[1]

    def _describe(self, found: RetrievalResult) -> list[list[RetrievedNeighbor]]:
        owners = self.datastore.document_of(found.chunk_ids)
        texts = iter(self.datastore.texts_of(found.chunk_ids[found.chunk_ids >= 0]))
        traces = []
        for row, ids in enumerate(found.chunk_ids):
            trace = []
            for column in np.flatnonzero(ids >= 0):
                text, continuation = next(texts)
                document = self.datastore.document(int(owners[row, column]))
                chunk_id, score = int(ids[column]), float(found.scores[row, column])
                names = document["id"], document["title"], document["source"]
                trace.append(RetrievedNeighbor(chunk_id, score, *names, text, continuation, self.searcher.metric))
            traces.append(trace)
        return traces

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase | str,
        *,
        embedder: ChunkEmbedder | str,
        num_neighbors: int = 2,
        **options: Any,
    ) -> RetroRetriever:
        """A retriever over texts, dicts or a dataset: builds a datastore, by default a temporary one.

        Args:
            options: those of [`RetroDatastore.from_texts`]: `path`, `chunk_size`, `neighbor_size`, `index`, `batch_size`,
                `shard_chunks`, `executor`, `show_progress`, `encoding`, `split`.
        """
        embedder, tokenizer = ChunkEmbedder.of(embedder), load_tokenizer(tokenizer)
        datastore = RetroDatastore.from_texts(texts, tokenizer, embedder=embedder, **options)
        return cls(datastore, embedder=embedder, tokenizer=tokenizer, num_neighbors=num_neighbors)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        embedder: ChunkEmbedder | str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        num_neighbors: int | None = None,
        min_score: float | None = None,
        **options: Any,
    ) -> RetroRetriever:
        """Open a retriever from a folder, or from a dataset repository on the Hub (downloaded, checksums verified).

        Args:
            embedder ([`ChunkEmbedder`] or `str`, *optional*): defaults to the one that the datastore names. A datastore
                stores only the name of a local embedder; pass its path again.
            num_neighbors (`int`, *optional*), min_score (`float`, *optional*): default to the saved values.
            options: `revision`, `cache_dir`, `token`, `verify`, as for [`RetroDatastore.from_pretrained`].
        """
        path = local_folder(name_or_path, settings=SETTINGS_NAME, **options)
        datastore = RetroDatastore.load(path)
        if embedder is None or isinstance(embedder, (str, os.PathLike)):
            embedder = ChunkEmbedder.of_datastore(datastore.manifest.embedder, embedder)
        saved = saved_settings(path)
        return cls(
            datastore,
            embedder=embedder,
            tokenizer=tokenizer,
            num_neighbors=saved["num_neighbors"] if num_neighbors is None else num_neighbors,
            min_score=saved.get("min_score") if min_score is None else min_score,
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a copy of the datastore and the retriever's settings to a new folder."""
        self.datastore.save(path)
        write_file(Path(path) / SETTINGS_NAME, self._settings())

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the datastore and the retriever's settings to a dataset repository, as one commit.

        Args:
            repo_id (`str`): `"name"` or `"organization/name"`; created if it does not exist.
            options: those of [`RetroDatastore.push_to_hub`]: `private`, `token`, `revision`.
        Returns:
            [`~huggingface_hub.CommitInfo`]: its `oid` is the `revision` that pins what was pushed.
        """
        return push(self.datastore, repo_id, settings={SETTINGS_NAME: self._settings()}, **options)

    def _settings(self) -> bytes:
        settings: dict[str, float] = {"num_neighbors": self.num_neighbors}
        if self.min_score is not None:
            settings["min_score"] = self.min_score
        return (json.dumps(settings, indent=2) + "\n").encode()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        return (
            f"RetroRetriever({self.datastore!r}, metric={self.searcher.metric!r}, num_neighbors={self.num_neighbors})"
        )
