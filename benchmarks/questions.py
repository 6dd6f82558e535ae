"""Who answers questions best? One frozen base and the same passages, and what it costs.

    python benchmarks/questions.py                       # about an hour of CPU time; continues with the next row if it is stopped
    python benchmarks/questions.py --rows "prompt, 5"    # one row, so that several can run side by side
    python benchmarks/questions.py --publish             # what is missing, and then writes benchmarks/results/questions.json

| reader             | how the base, SmolLM2-135M-Instruct, reads the passages                                | trained on      |
| ------------------ | -------------------------------------------------------------------------------------- | --------------- |
| `closed`           | not at all                                                                             | nothing         |
| `prompt`           | in its prompt, the best one last, before the question                                  | nothing         |
| `prompt_lora`      | the same, LoRA in all of its layers                                                    | such questions  |
| `parallel`         | `answer()` with `retrofit(base, reader="parallel_context")`                            | nothing         |
| `parallel_lora`    | the same, LoRA in all of its layers, as many steps on the same questions               | such questions  |
| `retro`            | `answer()` with `hub_configs/retro-smollm2-135m-mixed`, the paper's reader             | text, no questions |
| `rule`             | no model: the first year in the best passage, or its title                             |                 |
| `rule_sentence`    | no model: the first year in the sentence of the best passage that is most like the question |            |

The questions are those of natural_questions.py, asked as a chat turn after the system message `SYSTEM`. What is looked up is the
question (MiniLM), in a datastore of 2,000 articles with chunks of 64 tokens; a passage has up to 128. For `changed` the year that is
asked for was changed in the datastore, and only questions count whose best passage has it.

CPU seconds are those of a question from search to answer, on one thread; `warm` is the same question asked again, when its
passages are known. Every row runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from demo_data import minilm_path  # noqa: E402
from natural_questions import SENTENCE_END, natural_questions  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from retrofit_smollm2 import load_base  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from wiki_questions import YEAR, load_articles  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroForCausalLM, RetroRetriever, __version__, retrofit  # noqa: E402
from retro_hf.answering import passage_inputs, prepare_question  # noqa: E402
from retro_hf.evaluation import score_answers  # noqa: E402
from retro_hf.passages import Passage, find_passages  # noqa: E402


WORK = Path("demo_output/questions")
BASE = WORK / "base"
ADAPTER = ROOT / "hub_configs" / "retro-smollm2-135m-mixed"
SYSTEM = "Answer the question with as few words as possible."
CHUNK_SIZE, NEIGHBOR_SIZE, ARTICLES, MAX_NEW_TOKENS = 64, 128, 2000, 32
STEPS, BATCH, LEARNING_RATE, RANK = 20, 4, 5e-4, 16
# Reader, number of passages, and whether the years were changed; in the order in which they are measured.
ROWS = [
    *[(reader, 1, False) for reader in ("rule", "rule_sentence", "closed", "prompt", "parallel", "retro")],
    *[(reader, 5, False) for reader in ("prompt", "parallel", "retro")],
    *[(reader, 1, True) for reader in ("prompt", "parallel", "retro")],
    *[("prompt_lora", k, False) for k in (1, 5)],
    ("prompt_lora", 1, True),
    *[(reader, 20, False) for reader in ("prompt", "parallel", "retro")],
    *[("parallel_lora", k, False) for k in (1, 5)],
    ("parallel_lora", 1, True),
    *[(reader, 20, False) for reader in ("prompt_lora", "parallel_lora")],
]
NAMES = {f"{reader}, {k}" + (", changed" if changed else ""): (reader, k, changed) for reader, k, changed in ROWS}


# ── questions and the datastore ───────────────────────────────────────────────────────────────────────────────────────


def stored_articles(rows: list[dict]) -> list[dict]:
    """The articles of the datastore: all that a year is asked of, and others."""
    articles = load_articles()
    random.Random(0).shuffle(articles)
    asked = {row["article"] for row in rows if row["kind"] == "year"}
    articles.sort(key=lambda article: article["id"] not in asked)
    return articles[:ARTICLES]


def make_questions() -> tuple[dict[str, list[dict]], list[dict]]:
    """The questions by part, in a fixed order: two years, then a name; and the articles of the datastore."""
    rows = natural_questions()
    articles = stored_articles(rows)
    stored = {article["id"] for article in articles}
    rows = [row for row in rows if row["article"] in stored]
    random.Random(0).shuffle(rows)
    parts = {}
    for part in ("test", "train"):
        years, names = (
            [row for row in rows if row["kind"] == kind and row["part"] == part] for kind in ("year", "name")
        )
        count = len(years) // 2
        triples = zip(years[::2], years[1::2], names, strict=False)
        parts[part] = [row for triple in triples for row in triple] + names[count : count + 200]
    return parts, articles


def make_stores(questions: dict[str, list[dict]], articles: list[dict], embedder: ChunkEmbedder) -> None:
    """The datastore, and one in which every year that the test asks for was changed by 3 to 40."""
    if (WORK / "changed.json").exists():
        return
    if not (WORK / "store").exists():
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        RetroDatastore.build(articles, WORK / "store", tokenizer=tokenizer, embedder=embedder, **sizes)
    draw, by_id, new_years, changed = random.Random(0), {one["id"]: one for one in articles}, {}, []
    for row in questions["test"]:
        if row["kind"] == "year":
            (old,) = row["answers"]
            new_years[row["question"]] = new = str(int(old) + draw.choice([-1, 1]) * draw.randint(3, 40))
            article = by_id[row["article"]]
            changed.append(article | {"text": article["text"].replace(old, new)})
    shutil.rmtree(WORK / "changed_store", ignore_errors=True)
    shutil.copytree(WORK / "store", WORK / "changed_store")
    RetroDatastore.load(WORK / "changed_store").append(changed, embedder=embedder, replace=True)
    (WORK / "changed.json").write_text(json.dumps(new_years, indent=1) + "\n")


# ── readers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def plain(passage: Passage) -> str:
    """A passage as text, with its title."""
    return f"{passage.title}: {passage.text}"


def messages(question: str, passages: list[Passage] = ()) -> list[dict[str, str]]:
    """A chat turn, with passages before the question, the best one last, introduced as in parallel context."""
    introduction = ["Read this text."] if passages else []
    content = "\n\n".join([*introduction, *map(plain, reversed(passages)), question])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def chat(tokenizer, question: str, passages: list[Passage] = ()) -> str:
    return tokenizer.apply_chat_template(messages(question, passages), tokenize=False, add_generation_prompt=True)


def lora_config(prefix: str) -> LoraConfig:
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=rf"{prefix}.*\.({names})")


def load_model(reader: str) -> torch.nn.Module:
    """The model of a reader; with LoRA, which is trained first if need be."""
    if reader == "retro":
        return RetroForCausalLM.from_pretrained(ADAPTER, backbone_name_or_path=BASE, dtype=torch.float32).eval()
    if reader.startswith("parallel"):
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        model = retrofit(BASE, reader="parallel_context", base_kwargs={"dtype": torch.float32}, **sizes).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    if reader.endswith("_lora"):
        folder = WORK / reader
        if not (folder / "adapter_model.safetensors").exists():
            train(model, reader, folder)
        model = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    return model


def train(model: torch.nn.Module, reader: str, folder: Path) -> None:
    """LoRA on training questions, each with the right passage and, for every second one, another that was found."""
    tokenizer, retriever = AutoTokenizer.from_pretrained(BASE), open_retriever(changed=False)
    rows = make_questions()[0]["train"][: STEPS * BATCH]
    draw = random.Random(0)
    found = find_passages(retriever, [row["question"] for row in rows], 5)
    articles = {article["id"]: article for article in load_articles()}
    torch.manual_seed(0)
    tuned = get_peft_model(model, lora_config(r".*backbone" if reader.startswith("parallel") else ""))
    optimizer = torch.optim.AdamW(
        (p for p in tuned.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 4, 1 - step / STEPS))
    tuned.train()
    log, start = [], time.process_time()
    for step in range(STEPS):
        losses = []
        for number in range(step * BATCH, (step + 1) * BATCH):
            row, article = rows[number % len(rows)], articles[rows[number % len(rows)]["article"]]
            others = [one for one in found[number % len(rows)] if one.document_id != article["id"]]
            right = Passage(around(article["text"], row), article["title"], "", article["id"], 1.0)
            passages = [right, *others[: number % 2]]
            draw.shuffle(passages)
            inputs = training_inputs(model, tokenizer, reader, row, passages)
            loss = tuned(**inputs).loss
            (loss / BATCH).backward()
            losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append(sum(losses) / BATCH)
        if step % 5 == 4:
            print(f"{reader}, step {step + 1}: {np.mean(log[-5:]):.2f} nats per answer token", flush=True)
    partial = folder.with_suffix(".partial")
    tuned.save_pretrained(partial)
    record = {"loss": log, "cpu_seconds": time.process_time() - start, "questions": len(rows)}
    (partial / "log.json").write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(folder)


def around(text: str, row: dict) -> str:
    """An article, from shortly before the year that is asked for on if that stands late."""
    place = text.find(row["answers"][0]) if row["kind"] == "year" else 0
    return text if place < 300 else text[place - 200 :]


def training_inputs(model, tokenizer, reader: str, row: dict, passages: list[Passage]) -> dict[str, torch.Tensor]:
    """One question with its answer, as the reader gets it; only the answer and its end have labels."""
    question = row["question"]
    in_prompt = not reader.startswith("parallel")
    short = [Passage(cut(tokenizer, one.text), one.title, "", "", 1.0) for one in passages]
    text = chat(tokenizer, question, short if in_prompt else ())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(row["answers"][0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    inputs = {"input_ids": torch.tensor([ids + answer]), "labels": torch.tensor([[-100] * len(ids) + answer])}
    if not in_prompt:
        before = len(tokenizer(text[: text.rfind(question)], add_special_tokens=False)["input_ids"])
        given = passage_inputs(
            model.config, tokenizer, short, num_tokens=len(ids), question_start=before, max_new_tokens=len(answer)
        )
        # Here no tokens follow, so the last chunk, which is not complete, takes no neighbors.
        complete = int(given["chunk_offset"] + inputs["input_ids"].shape[1]) // CHUNK_SIZE
        inputs |= {name: values[:, :complete] if values.ndim > 1 else values for name, values in given.items()}
    return inputs


def cut(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: NEIGHBOR_SIZE - 16])


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class FirstToken(BaseStreamer):
    """When the first token was generated, in CPU seconds of the process."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(time.process_time())

    def end(self) -> None:
        pass

    @property
    def time(self) -> float:
        return self.calls[1]  # the first call has the prompt


def open_retriever(changed: bool) -> RetroRetriever:
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    datastore = RetroDatastore.load(WORK / ("changed_store" if changed else "store"))
    tokenizer = AutoTokenizer.from_pretrained(BASE)  # that of a datastore has no chat template
    return RetroRetriever(datastore, embedder=embedder, tokenizer=tokenizer, num_neighbors=1, cache_size=0)


def asker(
    reader: str, num_passages: int, retriever: RetroRetriever
) -> Callable[[str, FirstToken], tuple[str, list[Passage]]]:
    """A function that answers a question, and tells what it read."""
    if reader.startswith("rule"):
        return lambda question, clock: rule(reader, question, retriever)
    model, tokenizer = load_model(reader), retriever.tokenizer

    def ask(question: str, clock: FirstToken) -> tuple[str, list[Passage]]:
        if isinstance(model, RetroForCausalLM):
            asked = prepare_question(
                model,
                retriever,
                messages(question) if reader.startswith("parallel") else question,
                query=question,
                num_passages=num_passages,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            inputs, sources = asked.inputs, asked.sources
        else:
            sources = [] if reader == "closed" else find_passages(retriever, [question], num_passages)[0]
            inputs = dict(tokenizer(chat(tokenizer, question, sources), add_special_tokens=False, return_tensors="pt"))
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "streamer": clock}
        written = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(written, skip_special_tokens=True).strip().split("\n")[0].strip(), sources

    return ask


def rule(reader: str, question: str, retriever: RetroRetriever) -> tuple[str, list[Passage]]:
    """What needs no model."""
    (sources,) = find_passages(retriever, [question], 1)
    best = sources[0]
    if question.startswith("Who or what"):
        return best.title.split(" (")[0], sources
    text = best.text
    if reader == "rule_sentence":
        sentences = SENTENCE_END.split(text)
        keys = retriever.embedder.embed([question, *sentences])
        similarity = keys[1:] @ keys[0]
        order = np.argsort(-similarity)
        text = next((sentences[place] for place in order if YEAR.search(sentences[place])), text)
    found = YEAR.search(text)
    return (found[0] if found else ""), sources


def peak_mb() -> float:
    """Peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@torch.inference_mode()
def measure_row(reader: str, num_passages: int, changed: bool, rows: list[dict]) -> dict:
    """Ask all questions; the answers, what was read, and CPU seconds of each."""
    torch.set_num_threads(1)
    retriever = open_retriever(changed)
    with torch.inference_mode(False), torch.enable_grad():
        ask = asker(reader, num_passages, retriever)
    result: dict = {"answers": [], "found": [], "first_token": [], "seconds": [], "warm_first_token": [], "warm": []}
    new_years = json.loads((WORK / "changed.json").read_text())
    for row in rows:
        for again in (False, True) if reader.startswith("parallel") else (False,):
            clock, start = FirstToken(), time.process_time()
            text, sources = ask(row["question"], clock)
            seconds = time.process_time() - start
            first = clock.time - start if clock.calls else seconds
            result["warm_first_token" if again else "first_token"].append(first)
            result["warm" if again else "seconds"].append(seconds)
        wanted = new_years[row["question"]] if changed else row["answers"][0]
        ranks = [place for place, one in enumerate(sources) if is_right(one, row, wanted)]
        result["answers"].append(text)
        result["found"].append(ranks[0] if ranks else None)
    return result | {"peak_mb": peak_mb()}


def is_right(passage: Passage, row: dict, answer: str) -> bool:
    """Whether a passage is of the article asked about, and has the answer."""
    return passage.document_id == row["article"] and (row["kind"] == "name" or answer in passage.text)


# ── scores ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def interval(values: np.ndarray) -> list[float]:
    """The mean and the ends of its 95 % interval over questions drawn again."""
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return [round(float(value), 1) for value in (values.mean(), low, high)]


def first_year(text: str) -> str:
    found = YEAR.search(text)
    return found[0] if found else ""


def score(row: dict, rows: list[dict], changed: bool) -> dict:
    """What the table shows of a row."""
    costs = {
        name: round(float(np.mean(row[name])), 3)
        for name in ("first_token", "seconds", "warm_first_token", "warm")
        if row[name]
    } | {"peak_mb": round(row["peak_mb"])}
    if changed:
        new_years = json.loads((WORK / "changed.json").read_text())
        chosen = [place for place, found in enumerate(row["found"]) if found == 0]
        told = [first_year(row["answers"][place]) for place in chosen]
        new = np.array([told[i] == new_years[rows[place]["question"]] for i, place in enumerate(chosen)])
        old = np.array([told[i] == rows[place]["answers"][0] for i, place in enumerate(chosen)])
        return {"count": len(chosen), "new": interval(100.0 * new), "old": interval(100.0 * old)} | costs
    scores = {}
    for kind in ("year", "name", "all"):
        places = [place for place, one in enumerate(rows) if kind in (one["kind"], "all")]
        answers, right = [row["answers"][place] for place in places], [rows[place]["answers"] for place in places]
        exact, f1 = score_answers(answers, right)
        contained = [
            any(one.lower() in text.lower() for one in accepted) for text, accepted in zip(answers, right, strict=True)
        ]
        hits = [row["found"][place] is not None for place in places]
        scores[kind] = {
            "count": len(places),
            "exact_match": interval(exact),
            "f1": interval(f1),
            "contains": interval(100.0 * np.array(contained)),
            "found": round(100 * float(np.mean(hits)), 1),
        }
    return scores | costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", type=int, default=28, help="questions for years")
    parser.add_argument("--names", type=int, default=12, help="questions for names")
    parser.add_argument("--few", type=int, default=12, help="of all of them, with more than one passage")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=list(NAMES), help="what to measure")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results/questions.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = WORK / f"rows-{args.years}-{args.names}-{args.few}"
    folder.mkdir(parents=True, exist_ok=True)
    load_base(BASE)
    questions, articles = make_questions()
    make_stores(questions, articles, ChunkEmbedder.from_pretrained(minilm_path()))
    years, names = ([row for row in questions["test"] if row["kind"] == kind] for kind in ("year", "name"))
    years, names = years[: args.years], names[: args.names]
    few = [*years[: 2 * args.few // 3], *names[: args.few - 2 * args.few // 3]]
    table = {}
    for name in args.rows:
        reader, num_passages, changed = NAMES[name]
        rows = years if changed else few if num_passages > 1 else [*years, *names]
        path = folder / f"{name}.json"
        if not path.exists():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row = pool.submit(measure_row, reader, num_passages, changed, rows).result()
            path.write_text(json.dumps(row, indent=1) + "\n")
        table[name] = score(json.loads(path.read_text()), rows, changed)
        print(name, json.dumps(table[name]), flush=True)
    if args.publish:
        published = {
            "command": " ".join(["python benchmarks/questions.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, 1 thread, float32",
            "versions": {"retro-hf": __version__}
            | {name: version(name) for name in ("torch", "transformers", "peft")},
            "training": {
                path.parent.name: json.loads(path.read_text()) for path in sorted(WORK.glob("*_lora/log.json"))
            },
            "rows": table,
        }
        (ROOT / "benchmarks" / "results" / "questions.json").write_text(json.dumps(published, indent=1) + "\n")


if __name__ == "__main__":
    main()
