"""Training RETRO with plain `transformers.Trainer`: neighbors computed once beforehand, gathered batch by batch."""

from .collator import RetroDataCollator
from .neighbors import precompute_neighbors, tokenize_documents


__all__ = ["RetroDataCollator", "precompute_neighbors", "tokenize_documents"]
