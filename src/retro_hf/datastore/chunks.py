"""
Chunk arithmetic, with numpy only.

A datastore has one flat token stream. Every document starts at a multiple of `chunk_size` and is padded with zeros up to
the next one, so chunk `i` is `tokens[i * chunk_size : (i + 1) * chunk_size]`. `doc_offsets[d]` is the first chunk of
document `d`, and `doc_lengths[d]` is its number of real tokens. With `chunk_size=4`, two documents of 5 and 3 tokens:

    tokens       a a a a | a 0 0 0 | b b b 0        chunks 0, 1, 2
    doc_offsets  0, 2, 3                            doc_lengths  5, 3
    neighbor of chunk 0 with neighbor_size=8:       a a a a a 0 0 0, mask 1 1 1 1 1 0 0 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..arguments import check_tokenizer, numbers
from ..errors import DatastoreInputError
from ..model.values_retro import check_plain


# What decoders write for bytes that are no character, and the most bytes that a character has in UTF-8.
_LOST = "\ufffd"
_CHARACTER_BYTES = 4


def num_chunks_of(num_tokens: int | np.ndarray, chunk_size: int) -> Any:
    """Number of chunks that `num_tokens` tokens of one document fill; the last one may be short."""
    return -(-num_tokens // chunk_size)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Several ranges of integers in a row: `starts[i]` to `starts[i] + counts[i] - 1` for each `i`."""
    return np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def padded(rows: Sequence[Any], width: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of several lengths, filled up or cut on the right, and their mask: int64 of the shapes `(len(rows), width, ...)` and
    `(len(rows), width)`. Rows with more than one dimension are arrays.
    """
    inner = rows[0].shape[1:] if len(rows) and isinstance(rows[0], np.ndarray) else ()
    ids = np.full((len(rows), width, *inner), fill, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in enumerate(rows):
        kept = tokens[:width]
        ids[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    return ids, mask


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of a token stream: uint16 up to 65,536 token ids, uint32 above."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def document_of(chunk_ids: np.ndarray, doc_offsets: np.ndarray) -> np.ndarray:
    """Document numbers of chunks.

    Args:
        chunk_ids (`np.ndarray` of int64, any shape): -1 stands for no chunk.
        doc_offsets (`np.ndarray` of int64 and shape `(num_documents + 1,)`): first chunk of each document, then the
            number of chunks.
    Returns:
        `np.ndarray` of int64 in the shape of `chunk_ids`; -1 for -1.
    """
    documents = np.searchsorted(doc_offsets, chunk_ids, side="right") - 1
    return np.where(chunk_ids < 0, -1, documents)


def gather_tokens(
    chunk_ids: np.ndarray,
    tokens: np.ndarray,
    doc_offsets: np.ndarray,
    doc_lengths: np.ndarray,
    *,
    chunk_size: int,
    neighbor_size: int,
    chunk_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors by chunk id: each chunk and what follows it in the same document, at most `neighbor_size` tokens.

    Args:
        chunk_ids (`np.ndarray` of int64, any shape): below `num_chunks`; -1 gives zeros with mask 0.
        tokens (`np.ndarray` of uint16 or uint32 and shape `(stream_length,)`): the token stream.
        doc_offsets (`np.ndarray` of int64 and shape `(num_documents + 1,)`): first chunk of each document.
        doc_lengths (`np.ndarray` of int64 and shape `(num_documents,)`): real tokens of each document.
        chunk_size (`int`): tokens per chunk.
        neighbor_size (`int`): tokens per neighbor.
        chunk_starts (`np.ndarray` of int64 and shape `(num_chunks,)`, *optional*): where in the stream each chunk begins,
            if not at `chunk_id * chunk_size`.
    Returns:
        `(tokens, mask)`, both int64 of shape `(*chunk_ids.shape, neighbor_size)`; tokens are 0 where the mask is 0.
    """
    flat = chunk_ids.reshape(-1)
    known = flat >= 0
    chunks = np.where(known, flat, 0)
    first = doc_offsets[documents := np.searchsorted(doc_offsets, chunks, side="right") - 1]
    # Tokens from the first one of the chunk to the end of its document.
    if chunk_starts is None:
        left = doc_lengths[documents] - (chunks - first) * chunk_size
    else:
        left = doc_lengths[documents] - (chunk_starts[chunks] - chunk_starts[first])
    left = np.where(known, np.minimum(left, neighbor_size), 0).astype(np.int32)
    # What is longer than the longest neighbor is not made: a store may say that neighbors have a million tokens.
    longest = max(int(left.max(initial=0)), 1)
    mask = np.arange(longest, dtype=np.int32) < left[:, None]
    if chunk_starts is None:
        # Copy whole chunks, also those behind the end of the document, and mask them: cheaper than selecting tokens. The
        # last chunk of the stream stands in for chunks behind its end.
        width, rows = num_chunks_of(longest, chunk_size), tokens.reshape(-1, chunk_size)
        following = np.minimum(chunks[:, None] + np.arange(width), len(rows) - 1)
        found = np.take(rows, following, axis=0).reshape(len(flat), width * chunk_size)[:, :longest]
    else:
        following = np.minimum(chunk_starts[chunks][:, None] + np.arange(longest), len(tokens) - 1)
        found = np.take(tokens, following)
    # Masked in the narrow dtype of the stream, which is twice as fast as after the conversion.
    np.multiply(found, mask, out=found)
    return _widened(found, chunk_ids.shape, neighbor_size), _widened(mask, chunk_ids.shape, neighbor_size)


def _widened(rows: np.ndarray, shape: tuple[int, ...], width: int) -> np.ndarray:
    """Rows as int64 of shape `(*shape, width)`, filled up with zeros."""
    if rows.shape[1] == width:
        return rows.astype(np.int64).reshape(*shape, width)
    wide = np.zeros((len(rows), width), dtype=np.int64)
    wide[:, : rows.shape[1]] = rows
    return wide.reshape(*shape, width)


def text_starts(spans: list[tuple[int, int]], first_tokens: np.ndarray) -> np.ndarray:
    """Where in its document the text of each chunk begins, so that every character belongs to one chunk.

    A chunk's text begins where the token before it ends. A character that a chunk border cuts, because its bytes are several
    tokens, belongs to the chunk that has its last byte: a model that reads the tokens in order does not know it sooner.

    Args:
        spans (`list[tuple[int, int]]`): the characters of each token of a document, as a fast tokenizer tells them.
        first_tokens (`np.ndarray` of int64 and shape `(num_chunks,)`): positions of the chunks' first tokens, in order.
    Returns:
        `np.ndarray` of int64 and shape `(num_chunks,)`: positions in the text, in order, the first 0.
    """
    begins, ends = np.maximum.accumulate(np.array(spans, dtype=np.int64)).T
    return np.where(first_tokens > 0, np.minimum(ends[first_tokens - 1], begins[first_tokens]), 0)


def chunk_texts(tokenizer: PreTrainedTokenizerBase, rows: np.ndarray, mask: np.ndarray | None = None) -> list[str]:
    """The text of token rows that are to be looked up, and of which nothing but the tokens is known.

    Keys are made of the documents' own characters ([`RetroDatastore.texts_of`]). Special tokens (padding, begin of text) are
    left out, and so is a character that a border of the row cuts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the language model's tokenizer.
        rows (`np.ndarray` of int64 and shape `(num_rows, num_tokens)`): token ids.
        mask (`np.ndarray` of the same shape, *optional*): 0 at padding.
    Returns:
        `list[str]`: one text per row.
    """
    check_plain("The rows", rows)
    check_plain("The mask", mask)
    shapes = [getattr(part, "shape", ()) for part in (rows, rows if mask is None else mask)]
    check_tokenizer(tokenizer, DatastoreInputError)
    if (
        not isinstance(rows, np.ndarray)
        or len(shapes[0]) != 2
        or shapes[0] != shapes[1]
        or rows.dtype.kind not in "iu"
    ):
        raise DatastoreInputError(
            f"The rows are of type {type(rows).__name__} and shape {shapes[0]}, the mask has shape {shapes[1]}. Pass arrays of "
            "integers of shape (num_rows, num_tokens)."
        )
    # Tokenizers know no larger ids; what is masked may be anything, such as -100.
    real = rows if mask is None else rows[np.asarray(mask, dtype=bool)]
    numbers("The token ids", real, DatastoreInputError, 0, (1 << 32) - 1)
    if not len(rows):
        return []
    if mask is None:
        ids = rows.tolist()
    else:
        ids = [row[keep].tolist() for row, keep in zip(rows, np.asarray(mask, dtype=bool), strict=True)]
    return [
        _whole_characters(tokenizer, row, text) if text.startswith(_LOST) or text.endswith(_LOST) else text
        for row, text in zip(ids, _decoded(tokenizer, ids), strict=True)
    ]


def _decoded(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _whole_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> str:
    """The text of tokens without characters that are cut at either end."""
    whole = text.strip(_LOST)
    if len(text) - len(whole) < _CHARACTER_BYTES:
        return whole
    # Where a token is a byte, one cut character makes a decoder give up all bytes beside it. It reads them without the rest
    # of that character, of at most three tokens.
    cuts = [(first, last) for first in range(_CHARACTER_BYTES) for last in range(_CHARACTER_BYTES)]
    texts = _decoded(tokenizer, [ids[first : len(ids) - last] for first, last in cuts])
    return max((one.strip(_LOST) for one in texts), key=lambda one: len(one) - one.count(_LOST))
