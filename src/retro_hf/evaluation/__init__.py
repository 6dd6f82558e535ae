"""Evaluation: whether retrieval helps, measured with and without it on the same tokens and questions."""

from .bits_per_byte import BitsPerByte, bits_per_byte
from .evaluate import evaluate
from .interval import Interval
from .neighbors import MODES
from .profile import Profile, profile
from .questions import QuestionAnswers, answer_metrics, answer_questions, score_answers
from .report import write_report
from .result import Evaluation
from .trace import Trace, trace


__all__ = [
    "MODES",
    "BitsPerByte",
    "Evaluation",
    "Interval",
    "Profile",
    "QuestionAnswers",
    "Trace",
    "answer_metrics",
    "answer_questions",
    "bits_per_byte",
    "evaluate",
    "profile",
    "score_answers",
    "trace",
    "write_report",
]
