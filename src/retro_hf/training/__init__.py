"""Training RETRO with plain `transformers.Trainer`: neighbors are computed once, and read batch by batch."""

from .collator import RetroDataCollator
from .copy_start import start_by_copying
from .neighbors import precompute_neighbors
from .passages import retrieve_passages
from .pointer import train_pointer
from .question_trainer import QuestionTrainer, generate_answers
from .questions import QuestionCollator, tokenize_questions
from .windows import tokenize_documents


__all__ = [
    "QuestionCollator",
    "QuestionTrainer",
    "RetroDataCollator",
    "generate_answers",
    "precompute_neighbors",
    "retrieve_passages",
    "start_by_copying",
    "tokenize_documents",
    "tokenize_questions",
    "train_pointer",
]
