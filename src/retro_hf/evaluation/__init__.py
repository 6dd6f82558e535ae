"""Evaluation: whether retrieval helps, measured on the same tokens with and without it."""

from .bits_per_byte import BitsPerByte, bits_per_byte


__all__ = ["BitsPerByte", "bits_per_byte"]
