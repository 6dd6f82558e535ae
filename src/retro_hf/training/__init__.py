"""Training RETRO with plain `transformers.Trainer`: neighbors computed once beforehand, gathered batch by batch."""

from .collator import RetroDataCollator
from .neighbors import precompute_neighbors, tokenize_documents
from .passages import retrieve_passages
from .question_trainer import QuestionTrainer, generate_answers
from .questions import QuestionCollator, tokenize_questions


__all__ = [
    "QuestionCollator",
    "QuestionTrainer",
    "RetroDataCollator",
    "generate_answers",
    "precompute_neighbors",
    "retrieve_passages",
    "tokenize_documents",
    "tokenize_questions",
]
