"""
What a request reads: a text to continue reads what is found for each of its chunks, and a question reads passages that are
found once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from retro_hf.answering import passage_inputs
from retro_hf.datastore.chunks import padded
from retro_hf.model.retriever_protocol_retro import RetroLookup, check_neighbors, stacked
from retro_hf.passages import Passage, find_passages
from retro_hf.retrieved import RetrievedNeighbor

from .source import Source


logger = logging.getLogger(__name__)

Neighbors = tuple[torch.Tensor, torch.Tensor]
"""Ids of dtype long and boolean mask, of one shape."""


@dataclass(frozen=True)
class Prompt:
    """
    What an answer follows.

    Attributes:
        tokens (`list[int]`): all of it.
        query (`str`, *optional*): the question in it, which is looked up; None for a text to continue.
        query_start (`int`): the token that the question begins with.
    """

    tokens: list[int]
    query: str | None = None
    query_start: int = 0


@dataclass(frozen=True)
class ChunkRead:
    """
    What was found for one query, and the part of the answer that was written while it was read.

    Attributes:
        query (`str`): the text that was looked up.
        first_token (`int`): the first token of the answer that was written while these passages were read.
        first_character (`int`): where that token begins in the text of the answer.
        is_read (`bool`): whether the answer's tokens read them. Passages of earlier chunks of the prompt are read by the prompt.
        passages (`list[dict]`): best first, all with the same fields.
    """

    query: str
    first_token: int
    first_character: int
    is_read: bool
    passages: list[dict[str, Any]]


class Reader:
    """
    What one request reads, in one state of the store. A failure gives nothing instead of an error.

    Args:
        source ([`Source`]): where to look.

    Attributes:
        error (`str`, *optional*): why nothing, or nothing more, was found.
        store (`dict`): the generation of the store, and how many documents can be found.
        chunk_offset (`int`): chunk position of the first token of the prompt.
        neighbor_size (`int`): tokens of each neighbor.
    """

    chunk_offset: int
    neighbor_size: int

    def __init__(self, source: Source) -> None:
        self.source = source
        source.refresh()
        self.error = source.error
        self.store = source.describe()

    def neighbors(self, chunk: int) -> Neighbors | None:
        """What is read for a chunk, of shape `(num_neighbors, neighbor_size)`; None if the chunk is to be looked up."""
        raise NotImplementedError

    def reads(self, num_written: int, length: int) -> list[ChunkRead]:
        """What the next token is the first to read, after `num_written` tokens of the answer, with `length` characters."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Look nothing up any more. The answer says that retrieval was not available, and the log says why."""
        logger.warning("A lookup failed: %s", error, exc_info=error)
        self.error = f"The lookup failed ({type(error).__name__}); the log of the server says why."


class TextReader(Reader):
    """
    For a text to continue. Chunks are counted so that the prompt ends a chunk, which is looked up before the first new token.

    Args:
        source ([`Source`]): where to look.
        prompt ([`Prompt`]): the text.
        tokenizer (`PreTrainedTokenizerBase`): of the model.

    Attributes:
        retriever ([`RetroRetriever`]): over one state of the store; the same object for all who read that state.
    """

    def __init__(self, source: Source, prompt: Prompt, tokenizer: Any) -> None:
        super().__init__(source)
        self.retriever = source.snapshot()
        self.neighbor_size = self.retriever.neighbor_size
        # With chunks of 8 tokens, a prompt of 13 counts as 3 + 13: its last chunk is complete.
        self.chunk_offset = -len(prompt.tokens) % self.retriever.chunk_size
        self._last_of_prompt = (self.chunk_offset + len(prompt.tokens)) // self.retriever.chunk_size - 1
        self._tokenizer = tokenizer
        self._new: dict[int, tuple[str, list[dict[str, Any]]]] = {}

    def neighbors(self, chunk: int) -> Neighbors | None:
        """Nothing after a failure; before, each chunk is looked up."""
        if self.error is None:
            return None
        ids = torch.zeros(1, self.neighbor_size, dtype=torch.long)
        return ids, ids.bool()

    def note(self, chunk: int, tokens: list[int], found: Sequence[Any]) -> None:
        """Remember what was found for a chunk of these tokens, until `reads` tells it."""
        self._new[chunk] = self._tokenizer.decode(tokens), [_told(one, one.continuation, one.metric) for one in found]

    def reads(self, num_written: int, length: int) -> list[ChunkRead]:
        """All chunks of the prompt at first, then the chunk that has just been completed."""
        last = self._last_of_prompt + num_written // self.retriever.chunk_size
        told = []
        for chunk in sorted(chunk for chunk in self._new if chunk <= last):
            query, passages = self._new.pop(chunk)
            told.append(ChunkRead(query, num_written, length, chunk == last, passages))
        return told


class QuestionReader(Reader):
    """
    For a question: it is looked up once, and its passages are read to the end of the answer, as [`answer`] does.

    Args:
        source ([`Source`]): where to look.
        prompt ([`Prompt`]): with the question.
        tokenizer (`PreTrainedTokenizerBase`), config ([`RetroConfig`]): of the model.
        max_new_tokens (`int`): longest answer, in tokens.
    """

    def __init__(self, source: Source, prompt: Prompt, tokenizer: Any, config: Any, max_new_tokens: int) -> None:
        super().__init__(source)
        self._query = prompt.query or ""
        self._metric = source.retriever.searcher.metric
        self._found: list[Any] = []
        if self.error is None:
            try:
                (self._found,) = find_passages(source.retriever, [self._query], source.retriever.num_neighbors)
                source.num_lookups += 1
            # Whatever failed, the user still gets an answer, which says that nothing was read.
            except Exception as error:
                self.fail(error)
        inputs = passage_inputs(
            config,
            tokenizer,
            self._found,
            num_tokens=len(prompt.tokens),
            question_start=prompt.query_start,
            max_new_tokens=max_new_tokens,
        )
        self._ids, self._mask = inputs["neighbor_input_ids"][0], inputs["neighbor_attention_mask"][0].bool()
        self.neighbor_size, self.chunk_offset = self._ids.shape[-1], int(inputs["chunk_offset"])

    def neighbors(self, chunk: int) -> Neighbors | None:
        """The passages from the question on, nothing before it."""
        return self._ids[chunk], self._mask[chunk]

    def reads(self, num_written: int, length: int) -> list[ChunkRead]:
        """All passages, at the beginning."""
        if num_written or self.error is not None:
            return []
        passages = [_told(one, "", self._metric) for one in self._found]
        return [ChunkRead(self._query, 0, 0, True, passages)]


def _told(found: Passage | RetrievedNeighbor, continuation: str, metric: str) -> dict[str, Any]:
    """What a client is told of a passage, in a chat and in a completion alike."""
    names = ("document_id", "title", "source", "text")
    told: dict[str, Any] = {name: getattr(found, name) for name in names}
    return told | {"continuation": continuation, "score": found.score, "metric": metric}


def reader_for(source: Source, model: Any, prompt: Prompt, tokenizer: Any, max_new_tokens: int) -> Reader:
    """The reader for a question or for a text to continue, whose answer has at most `max_new_tokens` tokens."""
    if prompt.query is None:
        return TextReader(source, prompt, tokenizer)
    return QuestionReader(source, prompt, tokenizer, model.config, max_new_tokens)


@dataclass
class _Asked:
    """A chunk whose neighbors are asked for, and the answer."""

    reader: Any
    chunk: int
    ids: torch.Tensor
    mask: torch.Tensor
    answer: Neighbors | None = None


class RowLookup(RetroLookup):
    """
    Asks the reader of each row for the neighbors of its chunks.

    Chunks that are to be looked up in one state of the store are looked up together. If that fails, those of each row are
    looked up by themselves, so that only a row whose own chunk fails goes without neighbors.

    Args:
        readers (`Sequence[Reader]`): one per row, for neighbors of one size.
        vocab_size (`int`): of the model.
    """

    def __init__(self, readers: Sequence[Reader], vocab_size: int) -> None:
        super().__init__(cast("Any", self), vocab_size)  # it is its own retriever
        self._readers = readers

    def __call__(
        self, chunk_input_ids: torch.Tensor, chunk_mask: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor
    ) -> Neighbors:
        """Neighbors of N chunks, of shape `(N, num_neighbors, neighbor_size)`; arguments as in [`RetroLookup`]."""
        cells = chunk_input_ids.cpu(), chunk_mask.cpu().long()
        asked = [
            _Asked(self._readers[row], chunk, ids, mask)
            for row, chunk, ids, mask in zip(rows.tolist(), chunks.tolist(), *cells, strict=True)
        ]
        for one in asked:
            one.answer = one.reader.neighbors(one.chunk)
        for alike in _grouped([one for one in asked if one.answer is None], lambda one: one.reader.retriever):
            self._look_up(alike)
        return stacked([one.answer for one in asked if one.answer is not None], chunk_input_ids.device)

    def _look_up(self, asked: list[_Asked]) -> None:
        """Answer what is asked in one state of the store."""
        reader = asked[0].reader
        try:
            found, answers = self._found(reader.retriever, asked)
        except Exception as error:  # as above
            alone = _grouped(asked, lambda one: one.reader)
            if len(alone) > 1:
                for own in alone:
                    self._look_up(own)
                return
            reader.fail(error)
            for one in asked:
                one.answer = reader.neighbors(one.chunk)
            return
        for one, neighbors, ids, mask in zip(asked, found, *answers, strict=True):
            one.answer = ids, mask
            one.reader.note(one.chunk, one.ids[one.mask.bool()].tolist(), neighbors)
        reader.source.num_lookups += len(asked)

    def _found(self, retriever: Any, asked: list[_Asked]) -> tuple[list[list[Any]], Neighbors]:
        """What is found for each chunk, readable, and as ids and mask of shape `(N, num_neighbors, neighbor_size)`."""
        found = retriever.trace(torch.stack([one.ids for one in asked]), torch.stack([one.mask for one in asked]))
        rows = [[neighbor.chunk_id for neighbor in neighbors] for neighbors in found]
        chunk_ids, _ = padded(rows, retriever.num_neighbors, fill=-1)
        ids, mask = map(torch.from_numpy, retriever.gather(chunk_ids))
        return found, check_neighbors(ids, mask, (len(asked),), self.vocab_size, "What the store holds")


def _grouped(asked: list[_Asked], key: Callable[[_Asked], Any]) -> list[list[_Asked]]:
    """What is asked, by the identity of an object."""
    groups: dict[int, list[_Asked]] = defaultdict(list)
    for one in asked:
        groups[id(key(one))].append(one)
    return list(groups.values())
