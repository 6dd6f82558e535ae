"""The table of scored tokens, from which everything that is reported is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..datastore.storage import complete_file
from .bootstrap import Interval, paired_interval
from .result import Bucket, LeakageLevel, Offsets
from .scoring import Document


__all__ = ["RUN_BUCKETS", "TokenTable"]

_ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
RUN_BUCKETS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))


@dataclass(frozen=True)
class TokenTable:
    """One row per scored token, document after document.

    Attributes:
        document, position, token_id, num_bytes (`np.ndarray` of int32 and shape `(num_tokens,)`): its document, its place
            there, its id, and the bytes of text it stands for.
        chunk (`np.ndarray` of int64): its chunk among the chunks of all documents.
        overlap (`np.ndarray` of float32): r(C) of its chunk; NaN if nothing was looked up.
        run (`np.ndarray` of int32): tokens in a row, up to this one, that a neighbor has which the model was given for its
            chunk; -1 where it was given none.
        nats (`dict[str, np.ndarray]` of float32): negative log-likelihood by run of the model.
        chunk_size (`int`): tokens per chunk.
        num_resamples, seed (`int`): of intervals.
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
    num_resamples: int
    seed: int

    @property
    def later(self) -> np.ndarray:
        """Which tokens come after the first chunk of their document."""
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
        """Bits per byte that one run takes more than another, with its interval over documents.

        A document none of whose tokens can read a neighbor is the same in all runs and tells nothing about them: it is not
        drawn, or its zero would pass for evidence. Its bytes count.
        """
        bits = (self.nats[name].astype(np.float64) - self.nats[other]) / math.log(2)
        sums, sizes = self.by_document(bits, where), self.bytes_by_document(where)
        reads = self.by_document(self.later, where) > 0
        constant = float(sizes[~reads].sum())
        return paired_interval(sums[reads], sizes[reads], self.num_resamples, self.seed, constant)

    def by_document(self, values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Sums over the tokens of each document."""
        rows = slice(None) if where is None else where
        return np.bincount(self.document[rows], weights=values[rows], minlength=int(self.document[-1]) + 1)

    def bytes_by_document(self, where: np.ndarray | None = None) -> np.ndarray:
        """Bytes of each document."""
        return self.by_document(self.num_bytes, where)

    def gain(self) -> np.ndarray:
        """What retrieval gains on each token, in bits: OFF minus ON."""
        return (self.nats["off"].astype(np.float64) - self.nats["on"]) / math.log(2)

    def leakage(self, modes: Sequence[str]) -> list[LeakageLevel]:
        """Bits per byte of the chunks below each level of overlap, and how much they differ from OFF."""
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
        """What retrieval gains in chunks with more and more overlap."""
        lows = (-1.0, *_ALPHAS[:-1])
        return [
            self._bucket(max(low, 0.0), high, (self.overlap > low) & (self.overlap <= high))
            for low, high in zip(lows, _ALPHAS, strict=True)
        ]

    def gain_by_run(self) -> list[Bucket]:
        """What retrieval gains on tokens with longer and longer runs."""
        return [
            self._bucket(low, high, (self.run >= low) & (self.run <= (math.inf if high is None else high)))
            for low, high in RUN_BUCKETS
        ]

    def _bucket(self, low: float, high: float | None, where: np.ndarray) -> Bucket:
        gain, count = self.gain(), int(where.sum())
        here, total = float(gain[where].sum()), float(gain.sum())
        return Bucket(low, high, count, here / count if count else None, here / total if total > 0 else None)

    def offsets(self, modes: Sequence[str]) -> Offsets | None:
        """Bits per token by the place in the chunk; `None` if no document goes beyond its first chunk."""
        if not self.later.any():
            return None
        places = (self.position % self.chunk_size)[self.later]
        counts = np.bincount(places, minlength=self.chunk_size)
        bits = {}
        for name in modes:
            sums = np.bincount(places, weights=self.nats[name][self.later], minlength=self.chunk_size) / math.log(2)
            bits[name] = [
                total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
            ]
        return Offsets(counts.tolist(), bits)

    def write(self, folder: Path, documents: Sequence[Document]) -> None:
        """Write `tokens.parquet` and `documents.parquet`."""
        columns = {
            name: getattr(self, name) for name in ("document", "position", "token_id", "num_bytes", "overlap", "run")
        }
        per_document = {
            "id": pa.array([document.id for document in documents], type=pa.string()),
            "num_tokens": np.array([document.num_scored for document in documents]),
            "num_bytes": np.array([document.num_bytes for document in documents]),
        }
        for name, nats in self.nats.items():
            columns[f"nats_{name}"] = nats
            per_document[f"nats_{name}"] = self.by_document(nats.astype(np.float64))
        for name, table in (("tokens", columns), ("documents", per_document)):
            with complete_file(folder / f"{name}.parquet") as partial:
                pq.write_table(pa.table(table), partial, compression="zstd")
