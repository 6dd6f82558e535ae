"""Knowledge lives in the store: a small RETRO answers questions about people whom it never met, and follows their cards.

    python benchmarks/knowledge.py                    # about eight minutes of one core
    python benchmarks/knowledge.py --entities 20000 --steps 20000 --hidden-size 320 --device cuda

The world (`knowledge_world.py`) is made up: each person has a card of about 64 tokens with four values, each one of 400.
A model is trained from scratch to answer questions about three quarters of the people, with passages that a frozen MiniLM
finds in a datastore of their cards; some questions get the passages of another, some none. The training cards come in
editions that contradict each other, so that nobody can be learned by heart. Then the weights stay as they are, and the
store changes:

1. the cards of the other people are not there yet;
2. they are appended, and every question is looked up anew, as after each of the changes that follow;
3. half of these cards are deleted, and new ones with other values appended;
4. all of them are deleted;
5. the first cards are appended again.

An interrupted run resumes: with its datastore, with the passages of the training questions, and with the last
checkpoint. Writes docs/results/knowledge.png and benchmarks/results/knowledge.json, and prints the tables of
docs/results/knowledge.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from knowledge_reader import CHUNK, NEIGHBOR, make_reader, reader_config
from knowledge_report import MODES, PER_PERSON, judge, plot, share, tables
from knowledge_world import (
    Person,
    answer,
    make_card,
    make_people,
    make_questions,
    make_summaries,
    make_tokenizer,
    rewrite,
)
from transformers import TrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from demo_data import minilm_path  # noqa: E402
from train_demo import train_on  # noqa: E402

from retro_hf import (  # noqa: E402
    ChunkEmbedder,
    RetroDatastore,
    RetroForCausalLM,
    RetroRetriever,
)
from retro_hf.datastore.atomic_files import new_folder, write_file  # noqa: E402
from retro_hf.evaluation import answer_questions, score_answers  # noqa: E402
from retro_hf.training import (  # noqa: E402
    QuestionCollator,
    QuestionTrainer,
    retrieve_passages,
    tokenize_questions,
)


NOT_FOUND = 10**6
HITS = (1, 2, 4, 8)  # ranks to report
BATCH = 64  # questions at once when answering


class CurveTrainer(QuestionTrainer):
    """A trainer whose evaluation logs loss and exact match with the passages found, with none, and with others."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._clock = time.process_time()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        questions, tokenizer = self.eval_dataset, self.processing_class
        result = answer_questions(self.model, questions, tokenizer, batch_size=BATCH, max_new_tokens=4)
        values = {f"exact_match_{mode}": float(result.exact_match[mode].mean()) for mode in MODES}
        values |= {f"loss_{mode}": self._loss(mode) for mode in MODES}
        # Logs are part of a checkpoint, so the clock of a run that was broken off goes on, too.
        earlier = [entry["cpu_seconds"] for entry in self.state.log_history if "cpu_seconds" in entry]
        now = time.process_time()
        self.log(values | {"cpu_seconds": (earlier[-1] if earlier else 0.0) + now - self._clock})
        self._clock = now
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    @torch.no_grad()
    def _loss(self, mode: str) -> float:
        collator = self.data_collator.for_evaluation()
        collator.num_passages = 0 if mode == "off" else collator.num_passages
        rows = list(self.eval_dataset)
        for row, other in zip(rows, np.roll(rows, PER_PERSON), strict=True):
            row["passages"] = (other if mode == "random" else row)["passage_input_ids"]
        batch = collator([row | {"passage_input_ids": row["passages"]} for row in rows])
        self.model.eval()
        return float(self.model(**self._prepare_inputs(batch), retriever=None).loss)


def kept(path: Path, make: Callable[[], Dataset]) -> Dataset:
    """A dataset that is made once and then read from `path`."""
    if not path.exists():
        with new_folder(path) as folder:
            make().save_to_disk(folder)
    return Dataset.load_from_disk(path)


def in_editions(found: Dataset, people: Sequence[Person], editions: int) -> Dataset:
    """Questions with their passages, once for each edition of the cards, in which everybody has other values.

    A person of whom everything changes cannot be learned by heart, only read. Cards are found by their names, so what
    was found for a question stays, with the values of the edition.
    """
    rows = []
    for edition in range(editions):
        named = {person.name: person for person in (rewrite(people, seed=edition) if edition else people)}
        cards = {name: make_card(person) for name, person in named.items()}
        for row in found:
            titles = [passage["title"] for passage in row["passages"]]
            passages = [{"title": title, "text": cards[title]["text"]} for title in titles]
            rows.append(row | {"answers": [answer(named[row["name"]], row["attribute"])], "passages": passages})
    return Dataset.from_list(rows)


def train(
    args: argparse.Namespace,
    known: Sequence[Person],
    held_out: Sequence[Person],
    store: RetroDatastore,
    embedder: ChunkEmbedder,
) -> QuestionTrainer:
    """Train on questions about people, with what is found in the store for each; those held out serve the curves."""
    tokenizer = store.tokenizer
    retriever = RetroRetriever(store, embedder=embedder)

    def look_up(asked: list[dict]) -> Dataset:
        return retrieve_passages(Dataset.from_list(asked), retriever, num_passages=args.passages)

    def tokenized(rows: Dataset) -> Dataset:
        return tokenize_questions(rows, tokenizer, neighbor_size=NEIGHBOR)

    asked = make_questions(known, args.seed, args.wordings) + make_summaries(
        known, args.seed, min(5, 4 * args.wordings)
    )
    questions = kept(
        args.work / "train", lambda: tokenized(in_editions(look_up(asked), [*known, *held_out], args.editions))
    )
    curve = kept(args.work / "held_out", lambda: tokenized(look_up(make_questions(held_out, args.seed))))
    config = reader_config(len(tokenizer), args.hidden_size, tokenizer.pad_token_id, tokenizer.eos_token_id)
    training = TrainingArguments(
        output_dir=str(args.work / "model"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps * 3 // 10},
        warmup_steps=min(50, args.steps // 10),
        adam_beta2=0.95,
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        save_steps=args.eval_steps,
        save_total_limit=2,
        logging_steps=args.eval_steps,
        use_cpu=args.device == "cpu",
        bf16=args.bf16,
        remove_unused_columns=False,
        report_to=[],
        seed=args.seed,
    )
    trainer = CurveTrainer(
        model=make_reader(config, args.seed),
        args=training,
        data_collator=QuestionCollator(
            tokenizer,
            chunk_size=CHUNK,
            num_passages=args.passages,
            random_passage_probability=0.1,
            no_passage_probability=0.1,
            random_passages=questions,
            seed=args.seed,
        ),
        train_dataset=questions,
        eval_dataset=curve,
        processing_class=tokenizer,
    )
    train_on(trainer)
    return trainer


@dataclass
class Answers:
    """What was answered about some people, four questions each, in the order of `make_questions`.

    Attributes:
        ranks (`np.ndarray` of int64 and shape `(num_questions,)`): place of the person's own card among the passages, from
            0; `NOT_FOUND` where it is not among them.
        late (`np.ndarray` of bool and shape `(num_questions,)`): whether the answer stands in the second half of that card's
            neighbor.
        predictions (`dict[str, list[str]]`): per mode.
        right (`dict[str, np.ndarray]` of bool and shape `(num_questions,)`): per mode, exact match.
    """

    ranks: np.ndarray
    late: np.ndarray
    predictions: dict[str, list[str]]
    right: dict[str, np.ndarray]


class Examiner:
    """Asks a model the same questions about the same people, whatever the store holds."""

    def __init__(self, model: RetroForCausalLM, retriever: RetroRetriever, num_passages: int, seed: int) -> None:
        self.model, self.retriever, self.num_passages, self.seed = model, retriever, num_passages, seed

    def __call__(
        self,
        people: Sequence[Person],
        modes: Sequence[str] = ("on",),
        *,
        passages: list[list[dict]] | None = None,
        look_up: int = 1,
    ) -> Answers:
        """Look every question up, or give each its `passages`; answer; compare with what the people's values are now.

        Args:
            look_up: passages to find at least, for the ranks; the model reads its number.
        """
        tokenizer = self.retriever.tokenizer
        asked = Dataset.from_list(make_questions(people, self.seed))
        if passages is None:
            wanted = max(self.num_passages, look_up)
            asked = retrieve_passages(asked, self.retriever, num_passages=wanted)
        else:
            asked = asked.add_column("passages", passages)
        questions = tokenize_questions(asked, tokenizer, neighbor_size=NEIGHBOR, num_passages=self.num_passages)
        result = answer_questions(self.model, questions, tokenizer, modes=modes, batch_size=BATCH, max_new_tokens=4)
        ranks, late = [], []
        for row, tokens in zip(asked, questions["passage_input_ids"], strict=True):
            titles = [passage["title"] for passage in row["passages"]]
            ranks.append(titles.index(row["name"]) if row["name"] in titles else NOT_FOUND)
            words = tokenizer.decode(tokens[ranks[-1]][: NEIGHBOR // 2]) if ranks[-1] < len(tokens) else ""
            late.append(row["answers"][0] not in words)
        right = {mode: values == 100 for mode, values in result.exact_match.items()}
        return Answers(np.array(ranks), np.array(late), result.predictions, right)


def swap(ask: Examiner, people: Sequence[Person], embedder: ChunkEmbedder, seed: int) -> dict:
    """Change the store step by step, with the weights as they are, and ask after each step."""
    store = ask.retriever.datastore
    cards, names = [make_card(person) for person in people], [person.name for person in people]
    before = ask(people, MODES)
    store.append(cards, embedder=embedder)
    first = ask(people, MODES, look_up=max(HITS))
    own = ask(people, passages=[[{"title": c["title"], "text": c["text"]}] for c in cards for _ in range(PER_PERSON)])

    rewritten = rewrite(people, seed, share=0.5)
    changed = [new for new, old in zip(rewritten, people, strict=True) if new != old]
    store.delete([person.name for person in changed])
    store.append([make_card(person) for person in changed], embedder=embedder)
    second = ask(rewritten)
    is_new = np.repeat([new != old for new, old in zip(rewritten, people, strict=True)], PER_PERSON)
    old_values = [question["answers"] for question in make_questions(people, ask.seed)]
    says_old = score_answers(second.predictions["on"], old_values)[0] == 100

    store.delete(names)
    gone = ask(people)
    store.append(cards, embedder=embedder)
    again = ask(people)
    found = first.ranks < ask.num_passages

    def row(answers: Answers, counted: np.ndarray | None = None, right: np.ndarray | None = None) -> dict:
        values = answers.right if right is None else {"on": right}
        shares = {mode: share(value, counted) for mode, value in values.items()}
        return {"found": share(answers.ranks < ask.num_passages, counted), **shares}

    return {
        "num_people": len(people),
        "num_questions": len(found),
        "hit_at": {str(k): share(first.ranks < k) for k in HITS},
        "rows": {
            "their cards are not in the store": row(before),
            "their cards are appended": row(first),
            "- where the card was found": row(first, found),
            "- and the answer is in its first half": row(first, found & ~first.late),
            "- and the answer is in its second half": row(first, found & first.late),
            "- the person's own card alone": row(own),
            "half of the cards are rewritten: new values of these": row(second, is_new),
            "- old values of these": row(second, is_new, says_old),
            "- the other half, before": row(first, ~is_new),
            "- the other half, now": row(second, ~is_new),
            "their cards are deleted": row(gone),
            "the first cards are restored": row(again),
        },
        "answers_changed_by_restoring": sum(
            a != b for a, b in zip(first.predictions["on"], again.predictions["on"], strict=True)
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, swap, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=1600, help="people; a quarter is only asked about in the end")
    parser.add_argument("--held-out", type=int, default=50, help="people for the curves, of the other three quarters")
    parser.add_argument("--wordings", type=int, default=1, help="training questions per person and attribute, up to 5")
    parser.add_argument("--editions", type=int, default=4, help="of the training cards, each with other values")
    parser.add_argument("--passages", type=int, default=1, help="passages per question, k")
    parser.add_argument("--hidden-size", type=int, default=64, help="width of the decoder")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--eval-steps", type=int, default=100, help="steps between checkpoints, and points of the curves"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedder", help="a folder or a name on the Hub instead of the demo's MiniLM")
    parser.add_argument("--work", type=Path, default=Path("demo_output/knowledge"), help="datastores and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/knowledge.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/results/knowledge.png"))
    args = parser.parse_args(arguments)

    people = make_people(args.entities, args.seed)
    tested, known = people[: args.entities // 4], people[args.entities // 4 :]
    embedder = ChunkEmbedder.from_pretrained(args.embedder or minilm_path(), dtype=torch.float32, device=args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "store").exists():
        RetroDatastore.build(
            [make_card(person) for person in known],
            args.work / "store",
            tokenizer=make_tokenizer(),
            embedder=embedder,
            chunk_size=CHUNK,
            neighbor_size=NEIGHBOR,
        )
    store = RetroDatastore.load(args.work / "store")
    trainer = train(args, known[args.held_out :], known[: args.held_out], store, embedder)

    # Whatever an earlier run has done to its copy of the store is done again.
    shutil.rmtree(args.work / "swapped", ignore_errors=True)
    store.save(args.work / "swapped")
    retriever = RetroRetriever(RetroDatastore.load(args.work / "swapped"), embedder=embedder)
    swapped = swap(Examiner(trainer.model, retriever, args.passages, args.seed + 1), tested, embedder, args.seed)

    judged, log = judge(swapped), trainer.state.log_history
    print(tables(swapped, judged))
    plot(log, args.plot)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "parameters": trainer.model.num_parameters(),
        "training_questions": len(trainer.train_dataset),
        "cpu_seconds": {
            "training": next((entry["cpu_seconds"] for entry in reversed(log) if "cpu_seconds" in entry), None),
            "this run": time.process_time(),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()}",
        "predictions": judged,
        **swapped,
        "log": log,
    }
    write_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
