"""Made-up questions, answers and passages that the tests of question answering share."""

import numpy as np
from datasets import Dataset
from datastore.fixtures import WORDS

from retro_hf.training import tokenize_questions


def make_questions(
    num_questions: int = 6, num_passages: int = 3, seed: int = 0, num_words: tuple[int, int] = (1, 12)
) -> Dataset:
    """Questions of 1 to 11 words with two right answers each; one passage fewer with each question, down to none.

    Args:
        num_words: least number of words in a question, and one more than the most.
    """
    generator = np.random.default_rng(seed)

    def text(count: int) -> str:
        return " ".join(generator.choice(WORDS, size=count))

    return Dataset.from_list(
        [
            {
                "id": f"question-{number}",
                "question": text(int(generator.integers(*num_words))),
                "answers": [text(int(generator.integers(1, 4))), text(1)],
                "passages": [
                    {"title": text(1), "text": text(int(generator.integers(1, 9)))}
                    for _ in range(max(0, num_passages - number % (num_passages + 1)))
                ],
            }
            for number in range(num_questions)
        ],
    )


def tokenized(tokenizer, questions: Dataset | None = None, **options) -> Dataset:
    """Those questions, or others, tokenized with passages of at most 16 tokens."""
    return tokenize_questions(
        make_questions() if questions is None else questions, tokenizer, **{"neighbor_size": 16, **options}
    )
