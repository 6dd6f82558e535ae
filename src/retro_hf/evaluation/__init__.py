"""Evaluation: whether retrieval helps, measured on the same tokens and questions with and without it."""

from .bits_per_byte import BitsPerByte, bits_per_byte
from .questions import QuestionAnswers, answer_metrics, answer_questions, score_answers


__all__ = [
    "BitsPerByte",
    "QuestionAnswers",
    "answer_metrics",
    "answer_questions",
    "bits_per_byte",
    "score_answers",
]
