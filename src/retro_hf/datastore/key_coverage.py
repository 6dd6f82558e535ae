"""How much of their chunks the keys have seen: one check for building, appending, retokenizing and inspecting."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers.utils import logging

from ..errors import DatastoreInputError, counted
from ..outside import printable


if TYPE_CHECKING:
    from .embedder import ChunkEmbedder
    from .store import RetroDatastore

logger = logging.get_logger(__name__)

# So many chunks are looked at, from all parts of a store; what matters is a share of them.
_MOST_CHUNKS = 2048
# A key has not seen its chunk if it misses more than a tenth of the characters. If that is true of more than a fifth of the
# chunks, search finds other text than what is looked up.
_MISSED = 0.1
_REFUSED_SHARE = 0.2
# Up to a hundredth it is only mentioned.
_LOUD_SHARE = 0.01
# Words that an encoder does not know are what some texts are made of, and words can be searched by BM25, too: a few texts
# say nothing about a store.
_MANY_CHUNKS = 32
# The scores of equal texts, whose keys were rounded in other batches.
_SAME_SCORE = 1 - 1e-5
_LOST = "\ufffd"


@dataclass(frozen=True)
class Coverage:
    """What was found in the chunks that were looked at.

    Attributes:
        num_chunks (`int`): chunks that were looked at.
        cut (`int`): chunks of which the encoder's maximum length cuts off more than a tenth; None if the encoder is unknown.
        unknown (`int`): chunks of which more than a tenth is in words that the encoder does not know; None likewise.
        lost (`int`): chunks of which more than a tenth is U+FFFD, which stands for bytes that are no character.
        equal (`int`): chunks with the key of a chunk with another text; None if there are no keys yet.
        examples (`dict[str, str]`): the first chunk of each kind.
        max_length (`int`, *optional*): tokens that the encoder reads.
        reached (`float`): the least share of a chunk's characters that is before the cut.
    """

    num_chunks: int
    cut: int | None
    unknown: int | None
    lost: int
    equal: int | None
    examples: dict[str, str]
    max_length: int | None = None
    reached: float = 1.0

    def findings(self) -> list[tuple[str, int, str]]:
        """What is wrong: its kind, how many chunks it concerns, and in words."""
        words = {
            "cut": f"are longer than the {self.max_length} tokens that the encoder reads",
            "lost": "have characters that were lost before (U+FFFD)",
            "unknown": "consist of words that the encoder does not know ([UNK])",
            "equal": "have the key of a chunk with another text",
        }
        found = ((kind, getattr(self, kind)) for kind in words)
        return [(kind, number, words[kind]) for kind, number in found if number]

    def __str__(self) -> str:
        looked = f"{counted(self.num_chunks, 'chunk')} looked at"
        parts = [
            f"{number:,} ({_percent(number / self.num_chunks)}) {what}, such as {self.examples[kind]!r}"
            for kind, number, what in self.findings()
        ]
        return f"of {looked}, {'; '.join(parts)}" if parts else f"nothing missed in {looked}"


def _percent(share: float) -> str:
    return "under 1%" if share < 0.005 else f"{share:.0%}"


def looked_at(num_chunks: int) -> np.ndarray:
    """The chunks that are looked at (int64, in order): all of a small store, else some of every part."""
    return np.unique(np.linspace(0, num_chunks - 1, min(num_chunks, _MOST_CHUNKS)).astype(np.int64))


def coverage_of(
    texts: Sequence[str], embedder: ChunkEmbedder | None = None, keys: np.ndarray | None = None
) -> Coverage:
    """Look at the texts of chunks, and at their keys.

    Args:
        texts (`Sequence[str]`): the chunks.
        embedder ([`ChunkEmbedder`], *optional*): that makes or made the keys.
        keys (`np.ndarray` of float32 and shape `(len(texts), dim)`, *optional*): the keys.
    """
    found: dict[str, np.ndarray] = {}
    reached = np.ones(1)
    if embedder is not None:
        reached, known = embedder.seen(texts)
        found["cut"] = reached < 1 - _MISSED
        found["unknown"] = known < 1 - _MISSED
    found["lost"] = np.array([text.count(_LOST) > _MISSED * len(text) for text in texts], dtype=bool)
    if keys is not None:
        found["equal"] = _equal_keys(texts, np.asarray(keys, dtype=np.float32))
    numbers = {kind: int(chunks.sum()) for kind, chunks in found.items()}
    return Coverage(
        num_chunks=len(texts),
        cut=numbers.get("cut"),
        unknown=numbers.get("unknown"),
        lost=numbers["lost"],
        equal=numbers.get("equal"),
        examples={kind: _shown(texts[int(np.argmax(chunks))]) for kind, chunks in found.items() if chunks.any()},
        max_length=None if embedder is None else embedder.max_length,
        reached=float(reached.min(initial=1)),
    )


def check_coverage(coverage: Coverage, chunk_size: int, *, is_final: bool = True) -> None:
    """Tell what the keys miss.

    Args:
        chunk_size (`int`): of the datastore.
        is_final (`bool`, defaults to `True`): `False` before the keys are made, when only what is refused matters.
    Raises:
        DatastoreInputError: if more than a fifth of the chunks is concerned.
    """
    found = coverage.findings()
    if not found:
        return
    worst, number, _ = max(found, key=lambda one: one[1])
    share = number / coverage.num_chunks
    which = "The" if share > _LOUD_SHARE else "A few"
    message = f"{which} keys do not see their whole chunks: {coverage}."
    fitting = 1 << max(int(chunk_size * coverage.reached).bit_length() - 1, 0)
    remedy = {
        "cut": f"Use chunk_size={fitting} or less, or an encoder that reads more than {coverage.max_length} tokens.",
        "unknown": "Use an encoder that knows this script and these words, such as a multilingual one.",
        "lost": "Read the files with their own encoding, or build the datastore again from the documents.",
        "equal": f"Use chunk_size={max(chunk_size // 2, 1)} or less, or another encoder, which tells these texts apart.",
    }[worst]
    # Equal keys of unknown words are judged as unknown words; without the encoder, nobody can say why they are equal.
    is_certain = worst == "cut" or (worst == "equal" and coverage.unknown is not None)
    if share > _REFUSED_SHARE and (is_certain or coverage.num_chunks >= _MANY_CHUNKS):
        raise DatastoreInputError(f"{message} {remedy}")
    if not is_final:
        return
    if share > _LOUD_SHARE:
        logger.warning(f"{message} {remedy}")
    else:
        logger.info(message)


def coverage(datastore: RetroDatastore, embedder: ChunkEmbedder | None = None) -> Coverage:
    """Look at chunks and keys from all parts of a datastore.

    Args:
        datastore ([`RetroDatastore`]): the store.
        embedder ([`ChunkEmbedder`], *optional*): that made its keys; without it, what it cuts off and does not know is not
            looked for.
    Returns:
        [`Coverage`]: what was found; its text says it.
    Raises:
        DatastoreMismatchError: for another embedder than the store's.
    """
    datastore.check_compatible(embedder=embedder)
    ids = looked_at(datastore.num_chunks)
    texts = [text for text, _ in datastore.texts_of(ids)]
    kept = np.array([bool(text) for text in texts], dtype=bool)
    return coverage_of([text for text in texts if text], embedder, datastore.keys_of(ids[kept]))


def _equal_keys(texts: Sequence[str], keys: np.ndarray) -> np.ndarray:
    """Which chunks have the key of a chunk with another text (bool, `(len(texts),)`).

    Case, accents, spaces and punctuation are left out: many encoders leave them out, too.
    """
    letters = ["".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold())) for text in texts]
    numbers = np.unique(letters, return_inverse=True)[1]
    return ((keys @ keys.T > _SAME_SCORE) & (numbers[:, None] != numbers)).any(axis=1)


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return printable(text if len(text) <= 60 else f"{text[:60]}…")
