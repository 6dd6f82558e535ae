"""Does knowledge live in the datastore? Real questions, answered by a retrofitted SmolLM2 from several sources.

    python benchmarks/real_questions.py                  # trains first, if `examples/retrofit_qa.py` has not run
    python benchmarks/real_questions.py --device cuda --steps 6000 --batch-size 32 --minutes 7   # until it is finished

The weights stay the same, the source changes: passages retrieved (on), the right passage alone, those of another question
(random), none (off: the base itself, bit for bit). Beside them the base with a passage in its prompt, and a rule without
any model. Then years, and titles, of half of the test articles are changed in the datastore, and the questions asked again.

Writes benchmarks/results/real_questions.json (or `--results`) and docs/results/real_questions.png. Options and resuming as in
`examples/retrofit_qa.py`.
"""

import json
import platform
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from retrofit_qa import MAX_NEW_TOKENS, MODES, Clock, Run, arguments  # noqa: E402
from wiki_questions import YEAR  # noqa: E402

from retro_hf import RetroDatastore, RetroRetriever  # noqa: E402
from retro_hf.evaluation import score_answers  # noqa: E402
from retro_hf.training import retrieve_passages  # noqa: E402


RESULTS = Path("benchmarks/results/real_questions.json")
PICTURES = Path("docs/results")


def kept(path: Path, clock: Clock, make: Callable[[], list[str]]) -> list[str]:
    """The answers in `path`, made now if they are not there. What follows a line break is no part of an answer.

    A base that was never taught to stop goes on in the next line.
    """
    if not path.exists():
        clock.check()
        answers = [answer.strip().split("\n")[0].strip() for answer in make()]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(answers, ensure_ascii=False, indent=0) + "\n")
        partial.replace(path)
    return json.loads(path.read_text())


def base_answers(run: Run, prompts: list[str]) -> list[str]:
    """What the base, an ordinary causal language model, writes after some prompts."""
    base, tokenizer, batch_size = run.model.model.backbone, run.tokenizer, run.args.eval_batch_size
    tokenizer.padding_side = "left"
    ends = [tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        inputs = tokenizer([prompts[row] for row in places], return_tensors="pt", padding=True).to(base.device)
        output = base.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=ends)
        written = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for row, answer in zip(places, written, strict=True):
            answers[row] = answer
    return answers


def in_context(rows: Dataset, shots: list[dict], with_passage: bool) -> list[str]:
    """Prompts for the base: some examples, then the question, each with the best passage before it or without."""

    def block(row: dict, passage: dict, answer: str = "") -> str:
        before = f"title: {passage['title']}, source: {passage['text']}\n" if with_passage else ""
        return f"{before}question: {row['question']}\nanswer:{answer}"

    prompts = []
    for row in rows:
        examples = [shot for shot in shots if shot["kind"] == row["kind"]]
        examples = [block(shot, shot["gold"], f" {shot['answers'][0]}\n\n") for shot in examples]
        prompts.append("".join(examples) + block(row, row["passages"][0]))
    return prompts


def rule(row: dict) -> str:
    """What needs no model: the first year in the best passage, or its title."""
    best = row["passages"][0]
    if row["kind"] == "desc":
        return best["title"].split(" (")[0]
    found = YEAR.search(best["text"])
    return found[0] if found else ""


def answers_of(run: Run) -> dict[str, list[str]]:
    """The answers to the test questions, by whom and from what, in the order of the questions."""
    rows = run.questions("test")
    # Examples with short passages, so that the prompts stay short.
    by_length = sorted(run.questions("train"), key=lambda row: len(row["gold"]["text"]))
    shots = [row for kind in ("year", "desc") for row in [row for row in by_length if row["kind"] == kind][:2]]

    def read(mode: str, dataset: Dataset = rows) -> list[str]:
        return run.answers(dataset, mode).predictions[mode]

    def write(examples: list[dict], with_passage: bool) -> list[str]:
        return base_answers(run, in_context(rows, examples, with_passage))

    makers: dict[str, Callable[[], list[str]]] = {
        "on": lambda: read("on"),
        "on, gold passage": lambda: read("on", rows.map(lambda row: {"passages": [row["gold"]]})),
        "on, 5 passages": lambda: run.answers(rows, "on", num_passages=5).predictions["on"],
        "random": lambda: read("random"),
        "off (the base, closed book)": lambda: read("off"),
        "base, closed book, 2 examples": lambda: write(shots, with_passage=False),
        "base, best passage in prompt": lambda: write([], with_passage=True),
        "rule: first year or title of best passage": lambda: [rule(row) for row in rows],
    }
    folder = run.args.output / "answers"
    return {name: kept(folder / f"{name}.json", run.clock, make) for name, make in makers.items()}


def summary(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """EM and F1 in percent, with 95 % bootstrap intervals over the questions."""
    scores = np.stack(score_answers(list(predictions), list(answers)))
    draws = np.random.default_rng(0).integers(scores.shape[1], size=(2000, scores.shape[1]))
    low, high = np.percentile(scores[:, draws].mean(axis=-1), [2.5, 97.5], axis=-1)
    return {
        name: {"mean": round(float(mean), 1), "interval": [round(float(a), 1), round(float(b), 1)]}
        for name, mean, a, b in zip(("exact_match", "f1"), scores.mean(axis=-1), low, high, strict=True)
    }


# ── other answers in the datastore ─────────────────────────────────────────────────────────────────────────────────────


def swap(run: Run, kind: str) -> dict[str, Any]:
    """Change what every second test article says, in a copy of the datastore; ask again with the same weights.

    Years move by 3 to 40; titles are passed on from one changed article to the next.
    """
    rows = run.questions("test").filter(lambda row: row["kind"] == kind).sort("id")
    chosen = list(rows)[::2]
    draw = random.Random(run.args.seed)
    truth = [row["answers"][0] for row in chosen]
    if kind == "year":
        new_truth = [str(int(year) + draw.choice([-1, 1]) * draw.randint(3, 40)) for year in truth]
    else:
        new_truth = [*truth[1:], truth[0]]
    changes = {row["article"]: change for row, change in zip(chosen, zip(truth, new_truth, strict=True), strict=True)}
    other = {article: new for article, (_, new) in changes.items()}
    folder, before = run.args.output / "swap" / kind, run.retriever
    if not (folder / "store").exists():
        folder.mkdir(parents=True, exist_ok=True)
        before.datastore.save(folder / "store")
    store = RetroDatastore.load(folder / "store")
    if store.generation == before.datastore.generation:
        store.delete(changes)
    if store.num_documents == before.datastore.num_documents:
        changed = [
            article | {field: article[field].replace(*changes[article["id"]]) for field in ("title", "text")}
            for article in run.articles
            if article["id"] in changes
        ]
        store.append(changed, embedder=before.embedder)
    after = RetroRetriever(store, embedder=before.embedder, num_neighbors=run.args.num_passages)

    def ask(source: RetroRetriever) -> list[str]:
        found = retrieve_passages(rows.remove_columns("passages"), source, num_passages=run.args.num_passages)
        return run.answers(found, "on").predictions["on"]

    def changed_gold(row: dict) -> dict:
        change = changes.get(row["article"], ("", ""))
        return {
            "passages": [{field: text.replace(*change) if change[0] else text for field, text in row["gold"].items()}]
        }

    makers: dict[str, Callable[[], list[str]]] = {
        "before": lambda: ask(before),
        "after": lambda: ask(after),
        # Apart from whether the changed article is still found.
        "after, right passage": lambda: run.answers(rows.map(changed_gold), "on").predictions["on"],
    }
    said = {name: kept(folder / f"{name}.json", run.clock, make) for name, make in makers.items()}
    is_changed = [row["article"] in other for row in rows]
    old = [row["answers"] for row in rows]
    new = [[other.get(row["article"], "")] for row in rows]

    def score(name: str, truth: list[list[str]], changed: bool) -> dict[str, Any]:
        kept_rows = [place for place, flag in enumerate(is_changed) if flag == changed]
        return summary([said[name][p] for p in kept_rows], [truth[p] for p in kept_rows])["exact_match"]

    same = [a == b for a, b, flag in zip(said["before"], said["after"], is_changed, strict=True) if not flag]
    return {
        "changed articles": sum(is_changed),
        "other articles": len(same),
        **{
            name: {
                "changed articles, old answer": score(name, old, True),
                "changed articles, new answer": score(name, new, True),
                "other articles": score(name, old, False),
            }
            for name in said
        },
        "answers about other articles that stayed the same": sum(same),
    }


def hits(rows: Dataset) -> dict[str, float]:
    """Percentage of questions whose answer stands in one of the first k passages, for all k."""
    found = [
        [row["answers"][0].lower() in f"{passage['title']} {passage['text']}".lower() for passage in row["passages"]]
        for row in rows
    ]
    most = max(map(len, found))
    return {f"hit@{k}": round(100 * float(np.mean([any(row[:k]) for row in found])), 1) for k in range(1, most + 1)}


def draw_curves(log: list[dict], path: Path) -> None:
    """Loss on validation questions over the steps, one picture per kind."""
    from matplotlib.figure import Figure

    points = [entry for entry in log if "year/on" in entry]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    kinds = {"year": "years", "desc": "descriptions", "gap": "gaps"}
    for axes, (kind, title) in zip(figure.subplots(1, 3), kinds.items(), strict=True):
        for mode, color in zip(MODES, ("tab:blue", "tab:gray", "tab:orange"), strict=True):
            axes.plot([p["step"] for p in points], [p[f"{kind}/{mode}"] for p in points], color=color, label=mode)
        axes.set(title=title, xlabel="steps", ylim=0)
    figure.axes[0].set_ylabel("nats per answer token")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Answer, swap, and write the results."""
    parser = arguments(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    run = Run(args)
    rows = run.questions("test")
    answers = answers_of(run)
    swaps = {kind: swap(run, kind) for kind in ("year", "desc")}
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "base": "SmolLM2-135M-Instruct, Q4_1 dequantized to bfloat16, frozen",
        "parameters": run.parameters,
        "machine": f"{platform.machine()}, {args.device}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for kind in ("year", "desc"):
        places = [place for place, row in enumerate(rows) if row["kind"] == kind]
        part = rows.select(places)
        table = {name: summary([said[place] for place in places], part["answers"]) for name, said in answers.items()}
        results[kind] = {"questions": len(part), "retrieval": hits(part), "answers": table}
        print(f"\n{kind}, {len(part)} questions; {hits(part)}\n{'':42}   EM  95 % interval     F1")
        for name, row in table.items():
            (em, f1), (low, high) = (row[score]["mean"] for score in row), row["exact_match"]["interval"]
            print(f"{name:42}{em:5.1f}  [{low:5.1f}, {high:5.1f}]  {f1:5.1f}")
    print(json.dumps(swaps, indent=1))
    args.results.write_text(json.dumps(results | {"swap": swaps, "log": run.log}, indent=1) + "\n")
    draw_curves(run.log, PICTURES / args.results.with_suffix(".png").name)


if __name__ == "__main__":
    main()
