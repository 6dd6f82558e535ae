"""Intervals for ratios of sums over documents, such as bits per byte: the paired bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


__all__ = ["Interval", "paired_interval"]


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval; NaN ends for fewer than two documents."""

    value: float
    low: float
    high: float

    def shown(self, form: str = "+.4f") -> str:
        """In words, such as "-0.1744 [-0.4934, -0.0011]"."""
        if math.isnan(self.value):
            return "not known: no document"
        if math.isnan(self.low):
            return f"{self.value:{form}}, no interval: one document"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def paired_interval(
    numerators: np.ndarray, denominators: np.ndarray, num_resamples: int, seed: int, constant: float = 0.0
) -> Interval:
    """A ratio of sums over documents, and its 95 % interval over documents drawn again with replacement.

    The pairing lies in the numerators: the difference of two ways to score the same document, so that what makes a document
    easy or hard for both cancels.

    Args:
        numerators, denominators (`np.ndarray` of shape `(num_documents,)`): such as bits and bytes. Documents whose
            denominator is 0 do not count.
        num_resamples (`int`): draws.
        seed (`int`): of the draws.
        constant (`float`, defaults to 0): added to every sum of denominators: of documents that are not drawn.
    Returns:
        [`Interval`]: NaN throughout if no document counts.
    *Determinism*: the same arguments give the same interval.
    """
    counts = denominators > 0
    numerators, denominators = numerators[counts], denominators[counts]
    if not len(denominators):
        return Interval(math.nan, math.nan, math.nan)
    value = float(numerators.sum() / (denominators.sum() + constant))
    if len(denominators) < 2:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    ratios = np.empty(num_resamples)
    for draw in range(num_resamples):
        rows = generator.integers(len(denominators), size=len(denominators))
        ratios[draw] = numerators[rows].sum() / (denominators[rows].sum() + constant)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(value, float(low), float(high))
