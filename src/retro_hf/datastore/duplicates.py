"""Near-duplicate documents by the paper's rule: Jaccard similarity of 13-gram sets, found through MinHash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import arguments, extras
from ..errors import DatastoreInputError
from ..model.values_retro import MOST_NUMBERS, check_plain
from ..progress import progress_bar
from ..special_tokens import tokenize_texts
from .chunks import ranges
from .compatibility import check_datastore
from .documents import without_lone_surrogates


if TYPE_CHECKING:
    from .store import RetroDatastore

# The paper's 13 consecutive tokens.
_NGRAM = 13
_MAX_ID = (1 << 32) - 1
_PERMUTATIONS = 128
_BLOCK_DOCUMENTS = 512
# Shingles permuted at once: 4 MB.
_BATCH_SHINGLES = 1 << 13
# Share of the pairs exactly at the threshold that may be missed.
_MISSED = 1e-3


def near_duplicates(
    documents: Sequence[Any],
    datastore: RetroDatastore,
    *,
    threshold: float = 0.8,
    show_progress: bool | None = None,
) -> list[list[str]]:
    """The near-duplicates of documents in a datastore, including those documents themselves if they are there.

    Section 2.1 of Borgeaud et al. (2022) removes from the training set all documents with a Jaccard similarity of 0.8 or
    more to a document of the evaluation set, over sets of 13 consecutive tokens. Candidates come from MinHash with
    locality-sensitive hashing; then their similarity is counted exactly. So nothing below the threshold is returned, and
    at most 0.1 % of the pairs exactly at the threshold are missed, far fewer above it.

    Args:
        documents (`Sequence`): each a text, or its token ids as the datastore's tokenizer makes them. A document with fewer
            than 13 tokens is compared as a whole.
        datastore ([`RetroDatastore`]): where to look; deleted documents are ignored.
        threshold (`float`, defaults to 0.8): least Jaccard similarity, above 0 and at most 1.
        show_progress (`bool`, *optional*): show a progress bar; by default on a terminal only.
    Returns:
        `list[list[str]]`: for each document the ids of its near-duplicates, in the order of the datastore.
    Raises:
        DatastoreInputError: for a threshold out of range.
    *Memory*: 4 bytes per token of `documents`, and a few KB for each; the datastore is read block by block.
    *Determinism*: the same input gives the same output.
    """
    datasketch = extras.load("datasketch", "Finding near-duplicates")
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 < threshold <= 1:
        raise DatastoreInputError(f"threshold is {arguments.shown(threshold)}. Pass a number above 0 and at most 1.")
    check_datastore(datastore)
    check_plain("The documents", documents)
    if (
        not hasattr(documents, "__getitem__")
        or isinstance(documents, (str, bytes, dict))
        or getattr(documents, "shape", None) == ()
        or (isinstance(documents, np.ndarray) and documents.size > MOST_NUMBERS)
    ):
        raise DatastoreInputError(f"The documents are of type {type(documents).__name__}. Pass a list of texts.")
    blank = datasketch.MinHash(num_perm=_PERMUTATIONS, hashfunc=int)

    def minhash(shingles: np.ndarray) -> Any:
        result = blank.copy()
        for start in range(0, len(shingles), _BATCH_SHINGLES):
            result.update_batch(shingles[start : start + _BATCH_SHINGLES].tolist())
        return result

    lsh = datasketch.MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
    sets: list[np.ndarray] = []
    found: list[list[str]] = [[] for _ in documents]
    total = len(documents) + datastore.num_documents
    with progress_bar(show_progress, total=total, unit="doc", desc="Finding near-duplicates") as progress:
        for start in range(0, len(documents), _BLOCK_DOCUMENTS):
            block = _tokens_of(documents[start : start + _BLOCK_DOCUMENTS], datastore)
            for shingles in shingles_of(block):
                if len(shingles):
                    lsh.insert(len(sets), minhash(shingles))
                sets.append(shingles)
            progress.update(len(block))
        for ids, tokens in stored_documents(datastore):
            for document_id, shingles in zip(ids, shingles_of(tokens), strict=True):
                for row in lsh.query(minhash(shingles)):
                    if _jaccard(sets[row], shingles) >= threshold:
                        found[row].append(document_id)
            progress.update(len(ids))
    return found


def document_tokens(datastore: RetroDatastore, numbers: np.ndarray) -> list[np.ndarray]:
    """The token ids (uint16 or uint32, without padding) of documents by number (int64, `(n,)`, none of them -1)."""
    results: list[Any] = [None] * len(numbers)
    start = 0
    for shard in datastore.shards:
        here = np.flatnonzero((numbers >= start) & (numbers < start + shard.num_documents))
        local = numbers[here] - start
        begins, lengths = shard.token_starts(shard.doc_offsets[local]), shard.doc_lengths[local]
        parts = np.split(shard.tokens[ranges(begins, lengths)], np.cumsum(lengths)[:-1])
        for place, tokens in zip(here, parts, strict=False):
            results[place] = tokens
        start += shard.num_documents
    return results


def stored_documents(datastore: RetroDatastore) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Ids and tokens of the documents of a datastore that are not deleted, block by block."""
    live = np.ones(datastore.num_documents, dtype=bool)
    live[datastore.deleted_documents] = False
    start = 0
    for shard in datastore.shards:
        for first in range(0, shard.num_documents, _BLOCK_DOCUMENTS):
            end = min(first + _BLOCK_DOCUMENTS, shard.num_documents)
            numbers = start + first + np.flatnonzero(live[start + first : start + end])
            ids = [shard.documents.document_id(int(number) - start) for number in numbers]
            yield ids, document_tokens(datastore, numbers)
        start += shard.num_documents


def _tokens_of(documents: Sequence[Any], datastore: RetroDatastore) -> list[np.ndarray]:
    texts = [without_lone_surrogates(document) for document in documents if isinstance(document, str)]
    encoded = iter(tokenize_texts(datastore.tokenizer, texts)[0])
    rows = [next(encoded) if isinstance(one, str) else one for one in documents]
    found = [arguments.numbers("Token ids", row, DatastoreInputError, 0, _MAX_ID) for row in rows]
    if strange := [row for row in found if row.ndim != 1]:
        raise DatastoreInputError(
            f"A document is an array of shape {strange[0].shape}. Pass texts, or lists of token ids."
        )
    return found


def shingles_of(documents: Sequence[np.ndarray], ngram: int = _NGRAM) -> list[np.ndarray]:
    """The set of n-grams of each document, hashed: sorted uint32; empty for a document without tokens."""
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    # A short document is padded with zeros to one n-gram; tokens are shifted by one, so that token 0 is not padding.
    widths = np.where(lengths, np.maximum(lengths, ngram), 0)
    starts = np.cumsum(widths) - widths
    stream = np.zeros(int(widths.sum()) + ngram, dtype=np.uint64)
    stream[ranges(starts, lengths)] = np.concatenate([*documents, np.empty(0, dtype=np.int64)]).astype(np.uint64) + 1
    # Mix the bits of each token (two rounds of multiply and shift), then hash each window by a random linear function.
    for multiplier in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        stream *= np.uint64(multiplier)
        stream ^= stream >> np.uint64(32)
    multipliers = np.random.default_rng(0).integers(1 << 64, size=ngram, dtype=np.uint64) | np.uint64(1)
    hashes = np.zeros(len(stream) - ngram, dtype=np.uint64)
    for place, multiplier in enumerate(multipliers):
        hashes += stream[place : place + len(hashes)] * multiplier
    hashes = (hashes >> np.uint64(32)).astype(np.uint32)
    counts = np.where(widths, widths - ngram + 1, 0)
    return [np.unique(hashes[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def _bands(threshold: float) -> tuple[int, int]:
    """Number and width of the bands: the widest, so the fewest candidates, that miss few pairs at the threshold."""
    widths = range(1, _PERMUTATIONS // 2 + 1)
    enough = [width for width in widths if (1 - threshold**width) ** (_PERMUTATIONS // width) <= _MISSED]
    width = max(enough, default=1)
    return _PERMUTATIONS // width, width
