"""
What a batch of requests reads: a text to continue reads what is found for each of its chunks, and a question reads
passages that are found once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retro_hf.answering import passage_inputs
from retro_hf.passages import find_passages

from .source import Source


logger = logging.getLogger(__name__)


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
        passages (`list[dict]`): best first.
    """

    query: str
    first_token: int
    first_character: int
    is_read: bool
    passages: list[dict[str, Any]]


class Reader:
    """
    What one batch reads. A failure gives nothing instead of an error.

    Args:
        source ([`Source`]): where to look.
        model ([`RetroForCausalLM`]): that reads.
        prompts (`Sequence[Prompt]`): of the batch.
        tokenizer (`PreTrainedTokenizerBase`): of the model.

    Attributes:
        error (`str`, *optional*): why nothing, or nothing more, was found.
        num_lookups (`int`): texts that were looked up.
        store (`dict`): the generation of the store, and how many documents can be found.
    """

    def __init__(self, source: Source, model: Any, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        self.num_lookups = 0
        self._retriever, self._model, self._prompts, self._tokenizer = source.retriever, model, prompts, tokenizer
        source.refresh()
        self.error = source.error
        self.store = source.describe()

    def inputs(self, max_new_tokens: int) -> dict[str, Any]:
        """The inputs of the model that make it read, for answers of up to that length."""
        raise NotImplementedError

    def reads(self, row: int, written: list[int], length: int) -> list[ChunkRead]:
        """What the next token of a row is the first to read, when `written` tokens with `length` characters come before it."""
        raise NotImplementedError

    def _failed(self, error: Exception) -> None:
        logger.warning("A lookup failed: %s", error, exc_info=True)
        self.error = f"The lookup failed ({type(error).__name__}); the log of the server says why."


class TextReader(Reader):
    """For texts to continue. Chunks are counted so that each prompt ends a chunk, which is looked up before the first new token."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chunk_size, self.neighbor_size = self._retriever.chunk_size, self._retriever.neighbor_size
        self._found: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def inputs(self, max_new_tokens: int) -> dict[str, Any]:
        """The reader itself is the retriever."""
        # With chunks of 8 tokens, a prompt of 13 counts as 3 + 13: its last chunk is complete.
        offsets = [-len(prompt.tokens) % self.chunk_size for prompt in self._prompts]
        return {"retriever": self, "chunk_offset": torch.tensor(offsets)}

    def __call__(self, chunk_input_ids: torch.Tensor, chunk_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Neighbors of shape `(num_chunks, num_neighbors, neighbor_size)` and their mask, which is 0 after a failure."""
        shape = len(chunk_input_ids), self._retriever.num_neighbors
        tokens = np.zeros((*shape, self.neighbor_size), dtype=np.int64)
        mask = np.zeros_like(tokens)
        if self.error is None:
            try:
                found = self._retriever.trace(chunk_input_ids, chunk_mask)
                chunk_ids = np.full(shape, -1, dtype=np.int64)
                for row, neighbors in zip(chunk_ids, found, strict=True):
                    row[: len(neighbors)] = [neighbor.chunk_id for neighbor in neighbors]
                tokens, mask = self._retriever.gather(chunk_ids)
                keys = map(tuple, chunk_input_ids.masked_fill(chunk_mask == 0, -1).tolist())
                described = ([dataclasses.asdict(neighbor) for neighbor in row] for row in found)
                self._found |= zip(keys, described, strict=True)
                self.num_lookups += len(found)
            except (
                Exception
            ) as error:  # whatever failed, the user still gets an answer, which says that retrieval was not available
                self._failed(error)
        device = chunk_input_ids.device
        return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)

    def reads(self, row: int, written: list[int], length: int) -> list[ChunkRead]:
        """All chunks of the prompt at first, then the chunk that has just been completed."""
        prompt, size = self._prompts[row].tokens, self.chunk_size
        if len(written) % size:
            return []
        cells = [-1] * (-len(prompt) % size) + prompt + written
        chunks = [tuple(cells[start : start + size]) for start in range(0, len(cells), size)]
        reads = []
        for key in chunks if not written else chunks[-1:]:
            if key in self._found:
                query = self._tokenizer.decode([token for token in key if token >= 0])
                is_read = key is chunks[-1]  # the object: an earlier chunk may have the same tokens
                reads.append(ChunkRead(query, len(written), length, is_read, self._found[key]))
        return reads


class QuestionReader(Reader):
    """For questions: each is looked up once, and its passages are read to the end of the answer, as [`answer`] does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found: list[list[Any]] = [[] for _ in self._prompts]
        if self.error is None:
            try:
                queries = [prompt.query or "" for prompt in self._prompts]
                self._found = find_passages(self._retriever, queries, self._retriever.num_neighbors)
                self.num_lookups = len(queries)
            except Exception as error:  # as above: the answer says that retrieval was not available
                self._failed(error)

    def inputs(self, max_new_tokens: int) -> dict[str, Any]:
        """The passages are given as neighbors."""
        rows = [
            passage_inputs(
                self._model.config,
                self._tokenizer,
                found,
                num_tokens=len(prompt.tokens),
                question_start=prompt.query_start,
                max_new_tokens=max_new_tokens,
            )
            for prompt, found in zip(self._prompts, self._found, strict=True)
        ]
        shape = [max(row["neighbor_input_ids"].shape[axis] for row in rows) for axis in (1, 2, 3)]
        joined = {"chunk_offset": torch.cat([row["chunk_offset"] for row in rows]), "retriever": None}
        for name in ("neighbor_input_ids", "neighbor_attention_mask"):
            values = torch.zeros(len(rows), *shape, dtype=torch.long)
            for number, row in enumerate(rows):
                _, num_chunks, num_passages, size = row[name].shape
                values[number, :num_chunks, :num_passages, :size] = row[name]
            joined[name] = values.to(self._model.device)
        return joined

    def reads(self, row: int, written: list[int], length: int) -> list[ChunkRead]:
        """All passages, at the beginning."""
        if written or self.error is not None:
            return []
        metric = self._retriever.searcher.metric
        passages = [dataclasses.asdict(one) | {"continuation": "", "metric": metric} for one in self._found[row]]
        return [ChunkRead(self._prompts[row].query or "", 0, 0, True, passages)]


def reader_for(source: Source, model: Any, prompts: Sequence[Prompt], tokenizer: Any) -> Reader:
    """The reader for prompts, which are either all questions or all texts to continue."""
    kind = TextReader if prompts[0].query is None else QuestionReader
    return kind(source, model, prompts, tokenizer)
