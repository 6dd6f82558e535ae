"""Passages for questions: what a datastore has to say about a text of any length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import arguments
from .datastore import RetroDatastore
from .errors import RetrieverError
from .retriever import RetroRetriever


# The beginning of a word that goes on in the next chunk; not more, because some scripts write no spaces.
_END_OF_WORD = re.compile(r"\w{1,32}\Z")


@dataclass(frozen=True)
class Passage:
    """A part of a stored document.

    Attributes:
        text (`str`): at most `neighbor_size` tokens of the datastore.
        title, source, document_id (`str`): of the document; title and source may be empty.
        score (`float`): of the chunk that was found; bigger is nearer.
    """

    text: str
    title: str
    source: str
    document_id: str
    score: float


def find_passages(
    retriever: RetroRetriever, questions: Sequence[str], num_passages: int | None = None
) -> list[list[Passage]]:
    """Look questions up, and return what to read for each.

    A passage is a chunk that was found and what follows it in its document, `neighbor_size` tokens of the datastore. If the
    document ends sooner, the passage begins earlier, so that a short document is read whole. A chunk may begin inside a word or
    a number; a passage begins with the whole word. A chunk that an earlier passage of the same question contains is skipped;
    for this, twice as many chunks as wanted are looked up.

    Args:
        retriever ([`RetroRetriever`]): where to look.
        questions (`Sequence[str]`): texts with at least one word each.
        num_passages (`int`, *optional*): passages per question; by default the retriever's `num_neighbors`.
    Returns:
        `list[list[Passage]]`: for each question at most `num_passages` passages, best first.
    Raises:
        RetrieverError: for a question without a word.
    """
    if not isinstance(retriever, RetroRetriever):
        raise RetrieverError(f"The retriever is of type {type(retriever).__name__}. Pass a RetroRetriever.")
    num_passages = retriever.num_neighbors if num_passages is None else num_passages
    num_passages = arguments.whole("num_passages", num_passages, RetrieverError)
    datastore = retriever.datastore
    # Not twice as many where the store has not so many chunks: the error names the caller's number if even that is too large.
    found = retriever.search_texts(questions, max(num_passages, min(2 * num_passages, datastore.num_chunks)))
    scores, chunk_ids = found.scores, found.chunk_ids
    starts, found_at = _starts(datastore, chunk_ids, num_passages)
    numbers = datastore.document_of(starts)
    # In order, so that each group of the documents' file is read once.
    documents = {number: datastore.document(number) for number in np.unique(numbers).tolist() if number >= 0}
    texts = iter(_texts(datastore, starts[starts >= 0]))
    passages: list[list[Passage]] = []
    for row in range(len(scores)):
        passages.append([])
        for number, place in zip(numbers[row].tolist(), found_at[row].tolist(), strict=True):
            if number < 0:
                continue
            document = documents[number]
            passages[row].append(
                Passage(
                    text=next(texts),
                    title=document["title"],
                    source=document["source"],
                    document_id=document["id"],
                    score=float(scores[row, place]),
                )
            )
    return passages


def _texts(datastore: RetroDatastore, starts: np.ndarray) -> list[str]:
    """The text of the passages that begin with given chunks (int64, `(n,)`)."""
    is_first = starts == datastore.first_chunks(datastore.document_of(starts))
    texts = datastore.texts_of(np.concatenate([starts, np.where(is_first, -1, starts - 1)]))
    passages = []
    for (chunk, rest), (before, _) in zip(texts[: len(starts)], texts[len(starts) :], strict=True):
        word = _END_OF_WORD.search(before) if chunk[:1].isalnum() else None
        passages.append(((word.group() if word else "") + chunk + rest).strip())
    return passages


def _starts(datastore: RetroDatastore, chunk_ids: np.ndarray, num_passages: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunks that passages begin with, and the places in `chunk_ids` of the chunks that were found.

    Args:
        chunk_ids (`np.ndarray` of int64 and shape `(num_questions, any)`): chunks that were found, best first.
    Returns:
        Two `np.ndarray` of int64 and shape `(num_questions, num_passages)`, -1 for none.
    """
    owners = datastore.document_of(chunk_ids)
    first = datastore.first_chunks(np.maximum(owners, 0))
    room = datastore.neighbor_size - datastore.gather(chunk_ids)[1].sum(axis=-1)
    begins = np.maximum(first, chunk_ids - room // datastore.chunk_size)
    width = datastore.neighbor_size // datastore.chunk_size
    starts = np.full((len(chunk_ids), num_passages), -1, dtype=np.int64)
    found_at = np.full_like(starts, -1)
    for row, found in enumerate(zip(chunk_ids.tolist(), begins.tolist(), owners.tolist(), strict=True)):
        kept: list[tuple[int, int, int]] = []
        for place, (chunk, begin, owner) in enumerate(zip(*found, strict=True)):
            # A passage ends with its document, so the next chunk may be one of another document.
            if chunk >= 0 and not any(own == owner and start <= chunk < start + width for start, _, own in kept):
                kept.append((begin, place, owner))
        for column, (start, place, _) in enumerate(kept[:num_passages]):
            starts[row, column], found_at[row, column] = start, place
    return starts, found_at
