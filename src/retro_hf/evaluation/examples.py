"""A few chunks to look at: where retrieval gained most, where least, and what is typical."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..datastore import RetroDatastore, chunk_texts
from .modes import Chunks
from .result import Example, ExampleNeighbor
from .scoring import Document
from .tokens import TokenTable


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["choose_examples"]

_PER_KIND = 3


def choose_examples(
    table: TokenTable,
    documents: Sequence[Document],
    chunks: Chunks,
    neighbors: np.ndarray,
    datastore: RetroDatastore,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    """Chunks with the most, a typical and the least gain, at most three of each.

    Args:
        neighbors (`np.ndarray` of int64 and shape `(num_chunks, num_neighbors)`): what was given for the tokens of each
            chunk.
    """
    read = np.flatnonzero(table.run >= 0)
    numbers, inverse = np.unique(table.chunk[read], return_inverse=True)
    order = np.argsort(-np.bincount(inverse, weights=table.gain()[read]), kind="stable")
    middle = max(len(order) // 2 - _PER_KIND // 2, 0)
    kinds = {
        "gain": order[:_PER_KIND],
        "typical": order[middle : middle + _PER_KIND],
        "loss": order[::-1][:_PER_KIND],
    }
    examples, seen = [], set()
    for kind, places in kinds.items():
        for number in numbers[places].tolist():
            if number not in seen:
                examples.append(
                    _example(kind, number, table, documents, chunks, neighbors[number], datastore, tokenizer)
                )
                seen.add(number)
    return examples


def _example(
    kind: str,
    number: int,
    table: TokenTable,
    documents: Sequence[Document],
    chunks: Chunks,
    neighbors: np.ndarray,
    datastore: RetroDatastore,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    rows = np.flatnonzero(table.chunk == number)
    place = int(table.document[rows[0]])
    document = documents[place]
    # Pieces of the text itself: a token on its own may be a part of a letter, or lose its space.
    starts = np.append(0, document.char_ends)
    tokens = [document.text[starts[position] : starts[position + 1]] for position in table.position[rows].tolist()]
    known = neighbors[neighbors >= 0]
    found, mask = datastore.gather(known)
    size = datastore.chunk_size
    parts = zip(
        (datastore.document(int(owner)) for owner in datastore.document_of(known)),
        chunk_texts(tokenizer, found[:, :size], mask[:, :size]),
        chunk_texts(tokenizer, found[:, size:], mask[:, size:]),
        strict=True,
    )
    return Example(
        document_id=document.id,
        document=place,
        chunk=number - int(chunks.counts[:place].sum()),
        kind=kind,
        context=chunk_texts(tokenizer, chunks.rows[number - 1 : number], chunks.mask[number - 1 : number])[0],
        tokens=tokens,
        gain=[round(value, 4) for value in table.gain()[rows].tolist()],
        run=table.run[rows].tolist(),
        neighbors=[
            ExampleNeighbor(owner["id"], owner["title"] or "", text, continuation)
            for owner, text, continuation in parts
        ],
    )
