"""The text of chunks: the documents' own characters, as keys, searches by words, passages and readers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..special_tokens import tokenize_texts
from .chunks import chunk_texts, text_starts


if TYPE_CHECKING:
    from .shard import Shard
    from .store import RetroDatastore


def texts_of(datastore: RetroDatastore, chunk_ids: Any) -> list[tuple[str, str]]:
    """The text of given chunk ids, and of what follows each of them in its neighbor.

    The texts of a document's chunks, one after the other, are the document. Stores of format 2, and those of a tokenizer
    that is not a fast one, do not know where a chunk begins in the text: there the tokens are decoded.

    Args:
        datastore ([`RetroDatastore`]): the store.
        chunk_ids (`np.ndarray` of integers and shape `(n,)`): -1 stands for no chunk.
    Returns:
        `list[tuple[str, str]]`: for each id the text of its chunk and of its continuation; both are empty for no chunk and
        for chunks of deleted documents.
    Raises:
        DatastoreInputError: for an id that is not in the store.
    """
    opened = datastore._opened
    ids = opened.chunk_ids(chunk_ids).reshape(-1)
    texts = [("", "")] * len(ids)
    decoded = []
    hidden = np.isin(opened.document_of(ids), opened.deleted)
    # In order, so that each group of the documents' file is read once.
    for place in np.argsort(ids, kind="stable").tolist():
        if ids[place] < 0 or hidden[place]:
            continue
        number = int(np.searchsorted(opened.chunk_starts, ids[place], side="right") - 1)
        shard = opened.shards[number]
        if shard.text_starts is None:
            decoded.append(place)
        else:
            texts[place] = _own_text(datastore, shard, int(ids[place] - opened.chunk_starts[number]))
    if decoded:
        size = datastore.chunk_size
        tokens, mask = opened.gather(ids[decoded])
        parts = (
            chunk_texts(datastore.tokenizer, tokens[:, part], mask[:, part])
            for part in (slice(size), slice(size, None))
        )
        for place, pair in zip(decoded, zip(*parts, strict=True), strict=True):
            texts[place] = pair
    return texts


def _own_text(datastore: RetroDatastore, shard: Shard, chunk: int) -> tuple[str, str]:
    """The text of a chunk and of its continuation, cut from its document."""
    document = int(shard.document_of(np.array([chunk]))[0])
    text, last = shard.documents.text(document), int(shard.doc_offsets[document + 1])
    first = int(shard.doc_offsets[document])
    begin, end = _start(shard, text, chunk, last), _start(shard, text, chunk + 1, last)
    # The neighbor ends `neighbor_size` tokens after its first: in which chunk, and after how many tokens of that?
    begins = shard.token_starts(np.arange(chunk, min(chunk + shard.neighbor_size + 1, last)))
    stop = int(begins[0]) + shard.neighbor_size
    if stop >= int(shard.token_starts(np.array([first]))[0]) + int(shard.doc_lengths[document]):
        return text[begin:end], text[end:]
    inside = int(np.searchsorted(begins, stop, side="right")) - 1
    place, left = _start(shard, text, chunk + inside, last), stop - int(begins[inside])
    if left:
        part = text[place : _start(shard, text, chunk + inside + 1, last)]
        spans = (tokenize_texts(datastore.tokenizer, [part])[1] or [[]])[0]
        place += int(text_starts(spans, np.array([left]))[0]) if left < len(spans) else len(part)
    return text[begin:end], text[end:place]


def _start(shard: Shard, text: str, chunk: int, last: int) -> int:
    """Where a chunk begins in the text of its document, whose chunks end before `last`."""
    return int(shard.text_starts[chunk]) if chunk < last and shard.text_starts is not None else len(text)
