"""Fine-tune a RETRO to answer questions from passages, with the flags of transformers' own examples.

    python examples/finetune_qa.py --output_dir demo_output/qa --do_train --do_eval --max_steps 200 --learning_rate 1e-3

By default it uses the demo's model of 6 million parameters and the data of `wiki_questions.py`: fill in the year in a sentence of
Wikipedia, with the articles that have it.

For your own data, pass `--train_file` and `--validation_file`. They are JSONL with `question`, `answers` (a list) and, if you have
them, `passages` (a list of `{"title": ..., "text": ...}`, best first). Without passages, `--store` names a datastore in which the questions
are looked up. `--passages_in_prompt 1` is RETRO++. `docs/questions.md` has the paper's recipe (table 5) as arguments.

At the end it prints a table: exact match and F1 with the question's passages, with none, and with those of other questions. A trial run
of the command above, with `--max_train_questions 800 --num_passages 2 --per_device_train_batch_size 8` (3 minutes of one
core, with the datastore built before; seed 42, torch 2.13), learned that the answer is a year, but not which one:

    passages     EM  95 % interval      F1  95 % interval  EM minus off
    on          2.2  [0.5, 4.3]        2.2  [0.5, 4.3]     +1.6 [+0.0, +3.8]
    off         0.5  [0.0, 1.6]        0.5  [0.0, 1.6]
    random      1.6  [0.0, 3.8]        1.6  [0.0, 3.8]     +1.1 [+0.0, +2.7]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from datasets import Dataset, load_dataset
from demo_data import minilm_path
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from retro_hf import RetroDatastore, RetroRetriever
from retro_hf.errors import RetroError
from retro_hf.evaluation import answer_metrics, answer_questions
from retro_hf.training import QuestionCollator, QuestionTrainer, retrieve_passages, tokenize_questions


@dataclass
class ModelArguments:
    """Which model answers."""

    model_name_or_path: str = field(
        default=str(Path(__file__).resolve().parents[1] / "hub_configs" / "retro-bible"),
        metadata={"help": "a RETRO model: a folder, or a name on the Hub"},
    )
    train_backbone: bool = field(
        default=True, metadata={"help": "tune all weights, as the paper does; otherwise only what RETRO adds"}
    )


@dataclass
class QuestionArguments:
    """Which questions, and what is read to answer them."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSONL with `question`, `answers` and perhaps `passages`"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "the same, held out"})
    store: str | None = field(
        default=None, metadata={"help": "datastore to look questions up in that have no passages"}
    )
    embedder: str | None = field(default=None, metadata={"help": "encoder of the datastore, if it was a local folder"})
    num_passages: int = field(default=4, metadata={"help": "passages per question, k; 20 in the paper"})
    passages_in_prompt: int = field(default=0, metadata={"help": "of these, read by the decoder, too; 1 is RETRO++"})
    random_passage_probability: float = field(default=0.1, metadata={"help": "share of questions with wrong passages"})
    no_passage_probability: float = field(default=0.1, metadata={"help": "share of questions without passages"})
    max_new_tokens: int = field(default=16, metadata={"help": "length of an answer"})
    max_train_questions: int = field(default=2000, metadata={"help": "use only so many"})
    max_validation_questions: int = field(default=200, metadata={"help": "use only so many"})
    max_articles: int = field(default=1000, metadata={"help": "of the packaged data, use only so many"})


def packaged_questions(data: QuestionArguments) -> tuple[list[dict], dict[str, Dataset]]:
    """Articles of Wikipedia, and sentences in which a year is to be filled in: the test's articles are not trained on."""
    from wiki_questions import gaps, load_articles, part_of, questions

    articles = load_articles()
    held_out = [row for row in questions(articles) if row["kind"] == "year" and row["part"] == "test"]
    asked = {row["article"] for row in held_out}
    articles = sorted(articles, key=lambda article: article["id"] not in asked)[: data.max_articles]
    made = gaps([article for article in articles if part_of(article) == "train"], seed=0)
    years = (row for row in made if row["question"].startswith("Fill in the year"))
    return articles, {
        "train": Dataset.from_list(list(islice(years, data.max_train_questions))),
        "validation": Dataset.from_list(held_out),
    }


def load_questions(data: QuestionArguments, output: Path, tokenizer, chunk_size: int, neighbor_size: int):
    """Questions by split; those of the packaged data with passages from a datastore built in `output`."""
    files = {"train": data.train_file, "validation": data.validation_file}
    files = {split: file for split, file in files.items() if file}
    store, embedder = data.store, data.embedder
    if files:
        # One by one: together, every split would get the columns of the first.
        questions = {split: load_dataset("json", data_files=file, split="train") for split, file in files.items()}
    else:
        articles, questions = packaged_questions(data)
        if store is None:
            store, embedder = str(output / "store"), str(minilm_path())
            if not Path(store).exists():
                sizes = {"chunk_size": chunk_size, "neighbor_size": neighbor_size}
                RetroDatastore.build(articles, store, tokenizer=tokenizer, embedder=embedder, **sizes)
    limits = {"train": data.max_train_questions, "validation": data.max_validation_questions}
    questions = {
        split: dataset.select(range(min(limits[split], len(dataset)))) for split, dataset in questions.items()
    }
    if store is not None and data.num_passages:
        retriever = RetroRetriever.from_pretrained(store, embedder=embedder)
        for split, dataset in questions.items():
            if "passages" not in dataset.column_names:
                questions[split] = retrieve_passages(dataset, retriever, num_passages=data.num_passages)
    return questions


def main(arguments: list[str] | None = None) -> None:
    """All of it; an error that can be explained is one line, as with the command `retro`."""
    try:
        finetune(arguments)
    except (RetroError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def finetune(arguments: list[str] | None = None) -> None:
    """Train, evaluate, print and save the table."""
    parser = HfArgumentParser((ModelArguments, QuestionArguments, TrainingArguments), description=__doc__)
    model_args, data, args = parser.parse_args_into_dataclasses(arguments)
    args.remove_unused_columns = False  # passages are no argument of the model
    set_seed(args.seed)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="float32")
    config = model.config
    if model_args.train_backbone:
        model.requires_grad_(True)
    questions = {
        split: tokenize_questions(
            dataset, tokenizer, neighbor_size=config.neighbor_size, num_passages=data.num_passages
        )
        for split, dataset in load_questions(
            data, Path(args.output_dir), tokenizer, config.chunk_size, config.neighbor_size
        ).items()
    }
    train, held_out = questions.get("train"), questions.get("validation")
    collator = QuestionCollator(
        tokenizer,
        chunk_size=config.chunk_size,
        num_passages=data.num_passages,
        passages_in_prompt=data.passages_in_prompt,
        random_passage_probability=data.random_passage_probability if train else 0.0,
        no_passage_probability=data.no_passage_probability,
        random_passages=train,
        seed=args.seed,
    )
    trainer = QuestionTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=answer_metrics(tokenizer, held_out) if held_out else None,
        max_new_tokens=data.max_new_tokens,
    )
    if args.do_train:
        last = args.resume_from_checkpoint or get_last_checkpoint(args.output_dir)
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model()
    if args.do_eval:
        result = answer_questions(
            model,
            held_out,
            tokenizer,
            num_passages=data.num_passages,
            passages_in_prompt=data.passages_in_prompt,
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=data.max_new_tokens,
            seed=args.seed,
        )
        print(result)
        for row, answer in list(zip(held_out, next(iter(result.predictions.values())), strict=True))[:5]:
            print(f"{row['question']} → {answer!r}, right: {', '.join(row['answers'])}")
        (Path(args.output_dir) / "results.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
