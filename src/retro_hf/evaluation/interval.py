"""95 % intervals of ratios of sums over documents, such as bits per byte: the paired bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..arguments import whole


MOST_RESAMPLES = 10_000_000
_DRAWN_DOCUMENTS = 1 << 20


def checked_resamples(num_resamples: int, seed: int) -> tuple[int, int]:
    """Draws of the bootstrap and its seed, checked before hours of scoring; ValueError for what cannot be drawn."""
    return whole("num_resamples", num_resamples, ValueError, most=MOST_RESAMPLES), whole(
        "seed", seed, ValueError, least=0
    )


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval from `low` to `high`; both ends are NaN for fewer than two documents."""

    value: float
    low: float
    high: float

    def shown(self, form: str = "+.4f") -> str:
        """The interval as text, such as "-0.1744 [-0.4934, -0.0011]"."""
        if math.isnan(self.value):
            return "not known: no document"
        if math.isnan(self.low):
            return f"{self.value:{form}}, no interval: one document"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Bootstrap:
    """Intervals from documents drawn again with replacement, `num_resamples` times, the same for the same `seed`."""

    num_resamples: int
    seed: int | np.random.Generator

    def interval(self, numerators: np.ndarray, denominators: np.ndarray, constant: float = 0.0) -> Interval:
        """The interval of a ratio of sums over documents.

        Args:
            numerators, denominators (`np.ndarray` of shape `(num_documents,)`): for example bits and bytes. A document
                with a denominator of 0 is ignored.
            constant (`float`, defaults to 0): added to every sum of denominators, for documents that count but are not
                drawn.
        """
        # To compare two runs, pass the differences of their scores as numerators: what makes a document easy or hard for
        # both then cancels out. This is the pairing.
        counts = denominators > 0
        numerators, denominators = numerators[counts], denominators[counts]
        if not len(denominators):
            return Interval(math.nan, math.nan, math.nan)
        value = float(numerators.sum() / (denominators.sum() + constant))
        if len(denominators) < 2:
            return Interval(value, math.nan, math.nan)
        # The same draws for every pair of runs, so that two intervals of one evaluation differ by their scores alone.
        generator = np.random.default_rng(self.seed)
        ratios = np.empty(self.num_resamples)
        # Many draws at a time, which gives the same numbers as one after another, but not all: that could be gigabytes.
        step = max(_DRAWN_DOCUMENTS // len(denominators), 1)
        for start in range(0, self.num_resamples, step):
            part = ratios[start : start + step]
            rows = generator.integers(len(denominators), size=(len(part), len(denominators)))
            part[:] = numerators[rows].sum(axis=1) / (denominators[rows].sum(axis=1) + constant)
        low, high = np.quantile(ratios, (0.025, 0.975))
        return Interval(value, float(low), float(high))
