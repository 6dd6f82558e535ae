"""`Trainer` on questions: it learns, evaluates by generating, and draws no random passages when it evaluates."""

import pytest
import torch
from tiny_questions import make_questions, tokenized
from tiny_training import CHUNK_SIZE, make_model
from transformers import Trainer, TrainingArguments

from retro_hf.errors import DatasetError
from retro_hf.evaluation import answer_metrics, score_answers
from retro_hf.training import QuestionCollator, QuestionTrainer, generate_answers


ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def tokenizer(world):
    return world.tokenizer


@pytest.fixture(scope="module")
def questions(tokenizer):
    return tokenized(tokenizer, make_questions(7))


def make(folder, tokenizer, questions, cls=QuestionTrainer, model=None, collator=None, metrics=True, **arguments):
    own = {}
    if cls is QuestionTrainer:
        own = {"max_new_tokens": 5, "compute_metrics": answer_metrics(tokenizer, questions) if metrics else None}
    return cls(
        model=make_model(scale=0.2) if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **arguments}),
        train_dataset=questions,
        eval_dataset=questions,
        data_collator=collator or QuestionCollator(tokenizer, chunk_size=CHUNK_SIZE),
        processing_class=tokenizer,
        **own,
    )


def test_plain_trainer_trains(tmp_path, tokenizer, questions):
    """The collator is all it needs."""
    trainer = make(tmp_path, tokenizer, questions, cls=Trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_evaluation_scores_what_is_generated(tmp_path, tokenizer, questions):
    """Over several batches, the last one smaller; the metrics are those of each question answered alone."""
    trainer = make(tmp_path, tokenizer, questions)
    model, collator = trainer.model, trainer.data_collator
    alone = [generate_answers(model.eval(), collator([row]), tokenizer, max_new_tokens=5)[0] for row in questions]
    exact_match, f1 = score_answers(alone, questions["answers"])
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] == pytest.approx(exact_match.mean())
    assert metrics["eval_f1"] == pytest.approx(f1.mean())
    assert torch.isfinite(torch.tensor(metrics["eval_loss"]))

    # The right answers, as if they had been generated.
    predictions = trainer.predict(questions)
    perfect = trainer.compute_metrics(
        type("P", (), {"predictions": predictions.label_ids, "label_ids": predictions.label_ids})
    )
    assert perfect == {"exact_match": 100.0, "f1": 100.0}


def test_without_metrics_only_the_loss_is_evaluated(tmp_path, tokenizer, questions):
    """Nothing is generated in vain."""
    trainer = make(tmp_path, tokenizer, questions, metrics=False)
    trainer.max_new_tokens = None
    assert "eval_loss" in trainer.evaluate()


def test_evaluation_draws_no_random_passages(tmp_path, tokenizer, questions):
    """Though the collator does in training; afterwards it does so again."""
    drawing = QuestionCollator(tokenizer, chunk_size=CHUNK_SIZE, no_passage_probability=1.0)
    with_drawing = make(tmp_path, tokenizer, questions, collator=drawing)
    without = make(tmp_path, tokenizer, questions)
    assert with_drawing.evaluate()["eval_loss"] == without.evaluate()["eval_loss"]
    batch = next(iter(with_drawing.get_train_dataloader()))
    assert with_drawing.data_collator is drawing and not batch["neighbor_attention_mask"].any()
    assert next(iter(with_drawing.get_test_dataloader(questions)))["neighbor_attention_mask"].any()


def test_questions_whose_answers_are_not_known_are_predicted(tmp_path, tokenizer, questions):
    """`predict` returns tokens, and no metrics."""
    trainer = make(tmp_path, tokenizer, questions)
    unknown = tokenized(tokenizer, make_questions(7).remove_columns("answers"), with_answers=False)
    assert (trainer.predict(unknown).predictions == trainer.predict(questions).predictions).all()


def test_other_order_of_questions_is_an_error(tmp_path, tokenizer, questions):
    """Scores would compare each answer with another question's."""
    backwards = questions.select(range(6, -1, -1))
    with pytest.raises(DatasetError):
        make(tmp_path, tokenizer, questions).evaluate(backwards)


def test_collator_tokenizer_and_columns_are_required(tmp_path, tokenizer, questions):
    """The tokenizer, the collator, columns that Trainer dropped."""
    with pytest.raises(ValueError):
        QuestionTrainer(
            model=make_model(),
            args=TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS),
            data_collator=QuestionCollator(tokenizer, chunk_size=CHUNK_SIZE),
        )
    with pytest.raises(ValueError):
        make(tmp_path, tokenizer, questions, collator=lambda rows: rows)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make(tmp_path, tokenizer, questions, remove_unused_columns=True).train()
