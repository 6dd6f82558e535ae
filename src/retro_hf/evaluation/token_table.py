"""The table of scored tokens, from which everything that is reported is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..datastore import RetroDatastore
from ..datastore.atomic_files import complete_file
from .interval import Bootstrap, Interval
from .leakage import common_runs, overlaps
from .neighbors import Chunks
from .result import Bucket, LeakageLevel, Offsets
from .scoring import TokenizedDocument


# Of the leakage filter, section 2.6 of the paper.
LEAKAGE_NEIGHBORS = 10
_ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
_RUN_BUCKETS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))
_BLOCK_CHUNKS = 4096


@dataclass(frozen=True)
class TokenTable:
    """One row per scored token, document after document.

    Attributes:
        document, position, token_id, num_bytes (`np.ndarray` of int32 and shape `(num_tokens,)`): number of the document,
            position in it, token id, and number of UTF-8 bytes.
        chunk (`np.ndarray` of int64): number of the chunk among the chunks of all documents.
        overlap (`np.ndarray` of float32): r(C) of the chunk; NaN if nothing was looked up.
        run (`np.ndarray` of int32): length of the longest run of tokens, ending with this one, that is also in a neighbor
            which the model read; -1 where it read none.
        nats (`dict[str, np.ndarray]` of float32): negative log-likelihood by run of the model.
        chunk_size (`int`): tokens per chunk.
        bootstrap ([`Bootstrap`]): of intervals.
    """

    document: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    num_bytes: np.ndarray
    chunk: np.ndarray
    overlap: np.ndarray
    run: np.ndarray
    nats: dict[str, np.ndarray]
    chunk_size: int
    bootstrap: Bootstrap

    @classmethod
    def of(
        cls,
        documents: Sequence[TokenizedDocument],
        chunks: Chunks,
        nats: dict[str, np.ndarray],
        bootstrap: Bootstrap,
        found: tuple[RetroDatastore, np.ndarray, np.ndarray] | None = None,
    ) -> TokenTable:
        """Make the table.

        Args:
            nats (`dict[str, np.ndarray]`): from [`score_runs`].
            found (`tuple`, *optional*): a datastore and two int64 arrays of its chunk ids of shape `(num_chunks, any)`:
                the nearest neighbors of each chunk, best first, and the neighbors that its tokens read.
        """
        size = chunks.rows.shape[1]
        # The first token of a document is not scored, so positions begin at 1. With chunks of 8, position 8 is the first token
        # of chunk 1; it is predicted by the last token of chunk 0, which already reads the neighbors of chunk 0.
        counts = [document.num_scored for document in documents]
        document = np.repeat(np.arange(len(documents)), counts)
        position = np.concatenate([np.arange(1, count + 1) for count in counts])
        chunk = chunks.starts[document] + position // size
        overlap, run = _compared(chunks, found)
        return cls(
            document=document.astype(np.int32),
            position=position.astype(np.int32),
            token_id=np.concatenate([one.input_ids[1:] for one in documents]).astype(np.int32),
            num_bytes=np.concatenate([np.diff(one.byte_ends) for one in documents]).astype(np.int32),
            chunk=chunk,
            overlap=overlap[chunk].astype(np.float32),
            run=run[chunk, position % size],
            nats=nats,
            chunk_size=size,
            bootstrap=bootstrap,
        )

    @property
    def later(self) -> np.ndarray:
        """Which tokens come after the first chunk of their document: only these can read neighbors."""
        return self.position >= self.chunk_size

    def bits(self, name: str, where: np.ndarray | None = None) -> float:
        """The bits of some tokens; of all by default."""
        nats = self.nats[name] if where is None else self.nats[name][where]
        return float(nats.sum(dtype=np.float64)) / math.log(2)

    def bits_per_byte(self, name: str, where: np.ndarray | None = None) -> float:
        """Bits per byte of some tokens; NaN for none."""
        size = int((self.num_bytes if where is None else self.num_bytes[where]).sum(dtype=np.int64))
        return self.bits(name, where) / size if size else math.nan

    def difference(self, name: str, other: str, where: np.ndarray | None = None) -> Interval:
        """Bits per byte of one run minus those of another, with an interval over documents.

        A document of which no token can read a neighbor is not drawn, but its bytes count.
        """
        bits = (self.nats[name].astype(np.float64) - self.nats[other]) / math.log(2)
        sums, sizes = self.by_document(bits, where), self.by_document(self.num_bytes, where)
        # A document that cannot differ would make the interval narrower without being evidence.
        reads = self.by_document(self.later, where) > 0
        return self.bootstrap.interval(sums[reads], sizes[reads], constant=float(sizes[~reads].sum()))

    def by_document(self, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Sums over the tokens of each document."""
        rows = slice(None) if where is None else where
        return np.bincount(self.document[rows], weights=values[rows], minlength=int(self.document[-1]) + 1)

    def gain(self) -> np.ndarray:
        """Bits that retrieval saves on each token: OFF minus ON."""
        return (self.nats["off"].astype(np.float64) - self.nats["on"]) / math.log(2)

    def leakage(self, modes: Sequence[str]) -> list[LeakageLevel]:
        """Bits per byte of the chunks below each level of overlap, and their differences from OFF."""
        levels = []
        for alpha in _ALPHAS:
            where = self.overlap <= alpha
            values = {name: self.bits_per_byte(name, where) for name in modes}
            levels.append(
                LeakageLevel(
                    alpha=alpha,
                    num_chunks=len(np.unique(self.chunk[where])),
                    num_tokens=int(where.sum()),
                    num_bytes=int(self.num_bytes[where].sum(dtype=np.int64)),
                    bits_per_byte={name: None if math.isnan(value) else value for name, value in values.items()},
                    difference={name: self.difference(name, "off", where) for name in modes if name != "off"},
                )
            )
        return levels

    def gain_by_overlap(self) -> list[Bucket]:
        """What retrieval saves, by the overlap of the chunk."""
        lows = (-1.0, *_ALPHAS[:-1])
        return [
            self._bucket(max(low, 0.0), high, (self.overlap > low) & (self.overlap <= high))
            for low, high in zip(lows, _ALPHAS, strict=True)
        ]

    def gain_by_run(self) -> list[Bucket]:
        """What retrieval saves, by the length of the run that a token ends."""
        return [
            self._bucket(low, high, (self.run >= low) & (self.run <= (math.inf if high is None else high)))
            for low, high in _RUN_BUCKETS
        ]

    def _bucket(self, low: float, high: float | None, where: np.ndarray) -> Bucket:
        gain, count = self.gain(), int(where.sum())
        here, total = float(gain[where].sum()), float(gain.sum())
        return Bucket(low, high, count, here / count if count else None, here / total if total > 0 else None)

    def offsets(self, modes: Sequence[str]) -> Offsets | None:
        """Bits per token by position in the chunk; `None` if no document is longer than a chunk."""
        if not self.later.any():
            return None
        places = (self.position % self.chunk_size)[self.later]
        counts = np.bincount(places, minlength=self.chunk_size).tolist()
        bits = {}
        for name in modes:
            sums = np.bincount(places, weights=self.nats[name][self.later], minlength=self.chunk_size) / math.log(2)
            bits[name] = [total / count if count else None for total, count in zip(sums.tolist(), counts, strict=True)]
        return Offsets(counts, bits)

    def write(self, folder: Path, documents: Sequence[TokenizedDocument]) -> None:
        """Write `tokens.parquet` and `documents.parquet`."""
        names = ("document", "position", "token_id", "num_bytes", "overlap", "run")
        per_token = {name: getattr(self, name) for name in names}
        per_document = {
            "id": pa.array([document.id for document in documents], type=pa.string()),
            "num_tokens": np.array([document.num_scored for document in documents]),
            "num_bytes": np.array([document.num_bytes for document in documents]),
        }
        for name, nats in self.nats.items():
            per_token[f"nats_{name}"] = nats
            per_document[f"nats_{name}"] = self.by_document(nats.astype(np.float64))
        for name, table in (("tokens", per_token), ("documents", per_document)):
            with complete_file(folder / f"{name}.parquet") as partial:
                pq.write_table(pa.table(table), partial, compression="zstd")


def _compared(
    chunks: Chunks, found: tuple[RetroDatastore, np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The overlap of each chunk, and the run that each of its tokens ends: shapes `(num_chunks,)`, `(num_chunks, size)`."""
    overlap = np.full(len(chunks.rows), np.nan)
    runs = np.full(chunks.rows.shape, -1, dtype=np.int32)
    if found is None:
        return overlap, runs
    datastore, nearest, read = found
    size = chunks.rows.shape[1]
    for start in range(0, len(chunks.rows), _BLOCK_CHUNKS):
        block = np.arange(start, min(start + _BLOCK_CHUNKS, len(chunks.rows)))
        neighbors = datastore.gather(nearest[block, :LEAKAGE_NEIGHBORS])
        overlap[block] = overlaps(chunks.rows[block], chunks.mask[block], *neighbors)
        # A run may begin in the chunk before. Chunks without neighbors are left out: -1 says that there was nothing to copy from,
        # and 0 that nothing was copied.
        later = block[(read[block] >= 0).any(axis=1)]
        rows = np.concatenate([chunks.rows[later - 1], chunks.rows[later]], axis=1)
        runs[later] = common_runs(rows, *datastore.gather(read[later]))[:, size:]
    return overlap, runs
