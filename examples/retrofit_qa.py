"""RETROfit a frozen SmolLM2-135M so that it answers real questions from a datastore.

    python examples/retrofit_qa.py                                            # about 20 minutes on a core with bfloat16
    python examples/retrofit_qa.py --device cuda --steps 6000 --batch-size 32

SmolLM2-135M-Instruct (4-bit GGUF, dequantized) stays as it is. The added weights learn to copy answers from the passages that are
retrieved for a question. The questions and articles of the test are never in training (`wiki_questions.py`). At the end, the same
weights answer some test questions: with the retrieved passages, with those of another question, and with none.
`benchmarks/real_questions.py` measures all of it.

A stopped run resumes: what is in `--output` is not computed again, and training continues from its last checkpoint. A finished model in
`model` is not trained again. `--minutes` stops after so many minutes; run the same command again to continue.
"""

import argparse
import json
import random
import time
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from demo_data import minilm_path
from retrofit_smollm2 import load_base, load_reader
from train_demo import train_on
from transformers import AutoTokenizer, DynamicCache, Trainer, TrainerCallback, TrainingArguments
from wiki_questions import gaps, load_articles, part_of, questions

from retro_hf import ChunkEmbedder, RetroDatastore, RetroForCausalLM, RetroRetriever
from retro_hf.evaluation import QuestionAnswers, answer_questions
from retro_hf.retrofit import parameter_report
from retro_hf.training import QuestionCollator, retrieve_passages, tokenize_questions


CHUNK_SIZE, NEIGHBOR_SIZE = 64, 128
CROSS_ATTENTION_LAYERS = [0, 14, 28]
MODES = ("on", "off", "random")
MAX_NEW_TOKENS = 12
WATCHED = 16  # validation questions of each kind whose loss is watched


class Clock:
    """How long this command may still work; None for as long as it takes."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def check(self) -> None:
        """Leave if the time is over; everything so far has been kept."""
        if self.is_over():
            raise SystemExit("The time is over. Run the same command again to continue.")


# ── questions and their passages ──────────────────────────────────────────────────────────────────────────────────────


def gold_passage(article: dict, answer: str) -> dict[str, str]:
    """The article itself, from shortly before the answer on if that stands late."""
    place = article["text"].find(answer)
    return {"title": article["title"], "text": article["text"] if place < 300 else article["text"][place - 200 :]}


def make_rows(articles: list[dict], part: str, args: argparse.Namespace) -> list[dict]:
    """The questions of a part, in a fixed order, each with its `gold` passage."""
    by_id = {article["id"]: article for article in articles}
    asked = [row for row in questions(articles) if row["part"] == part]
    random.Random(args.seed).shuffle(asked)
    limit = {"train": args.descriptions, "validation": WATCHED, "test": args.test_descriptions}[part]
    rows = [row for row in asked if row["kind"] == "year"] + [row for row in asked if row["kind"] == "desc"][:limit]
    count = {"train": args.gaps, "validation": WATCHED, "test": 0}[part]
    made = gaps([article for article in articles if part_of(article) == part], args.seed, args.gap_kinds)
    rows += [next(made) for _ in range(count)]
    return [row | {"gold": gold_passage(by_id[row["article"]], row["answers"][0])} for row in rows]


def with_gold(row: dict) -> dict:
    """For training: the right passage first, as if it had always been found."""
    others = [passage for passage in row.get("passages", []) if passage["title"] != row["gold"]["title"]]
    return {"passages": [row["gold"], *others]}


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_loss(model: RetroForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Nats per token of the answers, their ends among them: the loss of `model(**batch)`, for less work.

    What comes before the last token of a prompt reads no passage, and the base is frozen: nothing there needs a gradient.
    """
    start = int((batch["labels"] != -100).any(dim=0).nonzero()[0]) - 1
    before, after = (
        {name: batch[name][:, part] for name in ("input_ids", "position_ids")}
        for part in (slice(None, start), slice(start, None))
    )
    names = ("neighbor_input_ids", "neighbor_attention_mask")
    neighbors = {name: batch[name] for name in names if name in batch}
    none = {name: value[:, :0] for name, value in neighbors.items()}
    common = {"chunk_offset": batch.get("chunk_offset"), "use_cache": True}
    with torch.no_grad():  # and no head
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model.model(**before, attention_mask=batch["attention_mask"][:, :start], cache=cache, **none, **common)
    after["labels"] = batch["labels"][:, start:]
    return model(**after, attention_mask=batch["attention_mask"], cache=cache, **neighbors, **common).loss


class AnswerTrainer(Trainer):
    """Plain Trainer, whose loss is [`answer_loss`]."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return answer_loss(model, inputs)


class Watch(TrainerCallback):
    """Every so many steps the loss on validation questions by kind and mode; and the end when the time is over."""

    def __init__(self, batches: dict[str, dict[str, torch.Tensor]], every: int, clock: Clock) -> None:
        self.batches, self.every, self.clock = batches, every, clock
        self.off: dict[str, float] = {}

    def losses(self, model: RetroForCausalLM, mode: str) -> dict[str, float]:
        with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16):
            return {
                f"{kind}/{mode}": float(answer_loss(model, in_mode(batch, mode)))
                for kind, batch in self.batches.items()
            }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.off = self.off or self.losses(model, "off")  # that of the base: it stays what it is
            losses = {**self.losses(model, "on"), **self.off, **self.losses(model, "random")}
            state.log_history.append({"step": state.global_step, **losses})
            print(
                f"  {state.global_step}: " + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()),
                flush=True,
            )
        if self.clock.is_over():
            control.should_save = control.should_training_stop = True


def in_mode(batch: dict[str, torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
    """A batch with its own passages, with those of the row before, or with none."""
    if mode == "off":
        return {name: value for name, value in batch.items() if not name.startswith(("neighbor_", "chunk_"))}
    shift = int(mode == "random")
    return {name: v.roll(shift, 0) if name.startswith("neighbor_") else v for name, v in batch.items()}


def train(run: "Run") -> list[dict]:
    """Train what was added, with the right passage and the best others; returns the log."""
    model, tokenizer, args = run.model, run.tokenizer, run.args
    rows, watched = (run.tokenized(run.questions(part).map(with_gold)) for part in ("train", "validation"))
    rows = rows.filter(
        lambda row: len(row["prompt_input_ids"]) <= CHUNK_SIZE and len(row["answer_input_ids"]) <= MAX_NEW_TOKENS
    )
    collator = QuestionCollator(
        tokenizer,
        chunk_size=CHUNK_SIZE,
        num_passages=args.read_passages,
        random_passage_probability=args.random_passages,
        random_passages=rows,
        seed=args.seed,
    )
    batches = {
        kind: collator.for_evaluation()([row for row in watched if row["kind"] == kind][:WATCHED])
        for kind in ("year", "desc", "gap")
    }
    batches = {kind: {name: v.to(args.device) for name, v in batch.items()} for kind, batch in batches.items()}
    print(f"{parameter_report(model)}\n{len(rows):,} questions to train on", flush=True)
    training = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=30,
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=args.device == "cpu",
        logging_steps=10,
        save_steps=100,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        seed=args.seed,
    )
    watch = Watch(batches, args.watch_steps, run.clock)
    trainer = AnswerTrainer(model=model, args=training, train_dataset=rows, data_collator=collator, callbacks=[watch])
    train_on(trainer)
    return trainer.state.log_history


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options, also those of the benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_output/retrofit_qa"), help="folder for all results")
    add("--device", default="cpu")
    add("--minutes", type=float, help="stop after so many minutes")
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=4)
    add("--learning-rate", type=float, default=5e-4)
    add("--num-passages", type=int, default=5, help="passages to retrieve")
    add("--read-passages", type=int, default=1, help="of these, passages to train with and to answer from")
    add("--random-passages", type=float, default=0.1, help="share of questions trained with another's passages")
    add("--gaps", type=int, default=1200, help="gap questions to train on")
    add("--gap-kinds", nargs="+", default=["year"], help="kinds of gaps: year, name, any")
    add("--descriptions", type=int, default=1200, help="description questions to train on, at most")
    add("--test-descriptions", type=int, default=64, help="description questions to test on, at most")
    add("--watch-steps", type=int, default=100)
    add("--eval-batch-size", type=int, default=16)
    add("--start", type=Path, help="a trained model to continue from: the `model` of another output folder")
    add("--seed", type=int, default=0)
    return parser


class Run:
    """Everything that training and measuring need, made or found in the output folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.clock = Clock(args.minutes)
        torch.manual_seed(args.seed)
        self.articles = load_articles()
        base_folder = load_base(args.output / "base")
        self.tokenizer = AutoTokenizer.from_pretrained(base_folder)
        self.model = load_reader(
            base_folder,
            chunk_size=CHUNK_SIZE,
            neighbor_size=NEIGHBOR_SIZE,
            cross_attention_layers=CROSS_ATTENTION_LAYERS,
        )
        self.parameters = parameter_report(self.model)
        trained = args.output / "model"
        start = trained if trained.exists() else args.start
        if start:
            before = RetroForCausalLM.from_pretrained(start, backbone_name_or_path=base_folder)
            self.model.model.retro.load_state_dict(before.model.retro.state_dict())
        self.model.to(args.device)
        if not trained.exists():
            log = train(self)
            self.clock.check()
            partial = trained.with_suffix(".partial")
            self.model.save_pretrained(partial, save_backbone=False)
            (partial / "training.json").write_text(json.dumps(log, indent=1) + "\n")
            partial.replace(trained)
        self.log = json.loads((trained / "training.json").read_text())
        # From here on nothing is trained. PyTorch copies a frozen head once per row when `generate` begins (`matmul` folds
        # rows only if the weight requires a gradient), 100 times slower than need be.
        self.model.model.retro.to(torch.bfloat16)
        self.model.eval().requires_grad_(True)

    @cached_property
    def retriever(self) -> RetroRetriever:
        """Over all articles; the datastore is built once."""
        folder, args = self.args.output / "store", self.args
        embedder = ChunkEmbedder.from_pretrained(minilm_path(), device=args.device)
        if not folder.exists():
            sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
            RetroDatastore.build(self.articles, folder, tokenizer=self.tokenizer, embedder=embedder, **sizes)
        return RetroRetriever(RetroDatastore.load(folder), embedder=embedder)

    def questions(self, part: str) -> Dataset:
        """The questions of a part with their `gold` passage and `passages`: those of the test as they are found."""
        path = self.args.output / "questions" / part
        if not path.exists():
            rows = Dataset.from_list(make_rows(self.articles, part, self.args))
            # In training the right passage is put before them, see `with_gold`.
            wanted = self.args.num_passages if part == "test" else self.args.read_passages - 1
            if wanted:
                rows = retrieve_passages(rows, self.retriever, num_passages=wanted)
            partial = path.with_suffix(".partial")
            rows.save_to_disk(partial)
            partial.replace(path)
        return Dataset.load_from_disk(str(path))

    def tokenized(self, rows: Dataset) -> Dataset:
        """Questions as the model reads them."""
        return tokenize_questions(rows, self.tokenizer, neighbor_size=NEIGHBOR_SIZE)

    def answers(self, rows: Dataset, *modes: str, num_passages: int | None = None) -> QuestionAnswers:
        """What the model answers, in some modes, from as many passages as it was trained with or from others."""
        options = {"batch_size": self.args.eval_batch_size, "max_new_tokens": MAX_NEW_TOKENS, "seed": self.args.seed}
        options["num_passages"] = num_passages or self.args.read_passages
        return answer_questions(self.model, self.tokenized(rows), self.tokenizer, modes=modes, **options)


def main() -> None:
    """Prepare, train, save, and answer."""
    run = Run(arguments(__doc__).parse_args())
    rows = run.questions("test").shuffle(seed=0).select(range(32))
    result = run.answers(rows, *MODES)
    for row, on, off in zip(rows, result.predictions["on"], result.predictions["off"], strict=True):
        print(f"{row['question']}\n  on: {on} | off: {off} | right: {row['answers'][0]}")
    print(result)


if __name__ == "__main__":
    main()
