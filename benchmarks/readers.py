"""Who reads best? One frozen base and the same passages: in its prompt, in parallel context, and through the shipped adapter.

    python benchmarks/readers.py                  # about half an hour of CPU time on one core; continues if it is stopped
    python benchmarks/readers.py --texts java     # one text, so that several can run side by side
    python benchmarks/readers.py --publish        # what is missing, and then writes benchmarks/results/readers.json
    python benchmarks/readers.py --readers off --publish    # one reader; the others keep their published values

| reader             | how the base reads the two neighbors of the last complete chunk                             | trained on       |
| ------------------ | ------------------------------------------------------------------------------------------- | ---------------- |
| `off`              | not at all                                                                                  | nothing          |
| `in_context`       | as the beginning of its prompt, which is computed again for every chunk                     | nothing          |
| `parallel_context` | `retrofit(base, reader="parallel_context")`                                                 | nothing          |
| `retro`            | `hub_configs/retro-smollm2-135m-mixed`: neighbor encoder and chunked cross-attention        | 18 kinds of text |
| `retro_bible`      | `hub_configs/retro-smollm2-135m`, the same                                                  | other books of the Bible, Wikipedia |
| `retro_no_null`    | `retro`, whose null key is never attended to                                                | 18 kinds of text |

The base is SmolLM2-135M-Instruct (4 bits, dequantized to float32). The Bible's text and datastore are those of `smollm2.py`: books that
were never trained on. The other texts are kinds that the adapter has never seen (`examples/text_kinds.py`); their datastores hold the
first 1,500 characters of 800 documents (licences: of all), without near-duplicates of the held-out ones. Documents are cut at 256
tokens, and every token but the first is scored. `random` is the same with random chunks of the datastore, `neighbors_20` with twenty
neighbors, `store_1_percent` with neighbors from a datastore of one document in a hundred. CPU time is that of scoring, without the
search; `speed` is that of decoding with neighbors that were encoded before.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from demo_data import minilm_path  # noqa: E402
from retrofit_smollm2 import load_base  # noqa: E402
from smollm2 import DOCUMENTS, MODEL, load_texts, near_duplicates  # noqa: E402
from text_kinds import HELDOUT, in_random_order  # noqa: E402
from text_kinds import load_documents as load_kind  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroForCausalLM, RetroRetriever, __version__, retrofit  # noqa: E402


CHUNK_SIZE, NUM_NEIGHBORS, NEIGHBOR_SIZE, TOKENS = 32, 2, 128, 256
BASE = Path("demo_output/smollm2/base")
TEXTS = ("bible", *HELDOUT)
CHARACTERS, STORED = 1500, 800  # of each document, and documents, in the datastore of a text
MANY = 20
ADAPTERS = {"retro": MODEL.with_name("retro-smollm2-135m-mixed"), "retro_bible": MODEL}
Document = dict


def load_parts(name: str, count: int) -> tuple[list[dict], list[dict]]:
    """Held-out documents of a text, and those of its datastore."""
    if name in DOCUMENTS:
        heldout, store = load_texts(name, DOCUMENTS[name])
        heldout = heldout[:count]
    else:
        documents = [one for one in in_random_order(load_kind(name)) if len(one["text"]) >= 1000]
        heldout, store = documents[:count], documents[count : count + STORED]
    if name != "bible":
        store = [one | {"text": one["text"][:CHARACTERS]} for one in store]
        heldout = [one | {"text": one["text"][:CHARACTERS]} for one in heldout]
        dropped = near_duplicates(store, heldout)
        store = [one for one in store if one["id"] not in dropped]
    return heldout, store


def open_retriever(name: str, store: list[dict], tokenizer, embedder: ChunkEmbedder) -> RetroRetriever:
    """Search in the datastore of some documents, built first if there is none."""
    path = Path("demo_output/readers") / f"{name}_store"
    if not path.exists():
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        RetroDatastore.build(store, path, tokenizer=tokenizer, embedder=embedder, **sizes)
    return RetroRetriever(RetroDatastore.load(path), embedder=embedder, num_neighbors=NUM_NEIGHBORS)


def load_documents(name: str, count: int, skip: int, tokenizer, embedder: ChunkEmbedder) -> list[Document]:
    """Documents with `input_ids` (1, T), `num_bytes`, and neighbors (1, chunks, K, R) of each mode."""
    heldout, store = load_parts(name, skip + count)
    retriever = open_retriever(name, store, tokenizer, embedder)
    few = open_retriever(f"{name}_1_percent", store[::100], tokenizer, embedder)
    generator, documents = np.random.default_rng(0), []
    for one in heldout[skip:]:
        ids = tokenizer(one["text"], return_tensors="pt").input_ids[:, :TOKENS]
        chunks = ids[0, : ids.shape[1] // CHUNK_SIZE * CHUNK_SIZE].view(-1, CHUNK_SIZE)
        mask = torch.ones_like(chunks)
        datastore = retriever.datastore
        drawn = datastore.gather(generator.integers(len(datastore), size=(len(chunks), NUM_NEIGHBORS)))
        first = tokenizer.decode(ids[0, :1])
        found = {}
        for mode, wanted in (("bits_per_byte", NUM_NEIGHBORS), ("neighbors_20", MANY)):
            retriever.num_neighbors = wanted
            found[mode] = _named(*retriever(chunks, mask))
        documents.append(
            {
                "input_ids": ids,
                "num_bytes": len(tokenizer.decode(ids[0]).encode()) - len(first.encode()),
                **found,
                "random": _named(*(torch.as_tensor(part) for part in drawn)),
                "store_1_percent": _named(*few(chunks, mask)),
            }
        )
    return documents


def _named(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    ids, mask = (part.long().view(1, len(ids), -1, NEIGHBOR_SIZE) for part in (ids, mask))
    return {"neighbor_input_ids": ids, "neighbor_attention_mask": mask}


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return float(cross_entropy(logits[: len(targets)].float(), targets, reduction="sum"))


def read_off(model: PreTrainedModel, document: Document, neighbors: str) -> float:
    """Nats of a document, without neighbors."""
    ids = document["input_ids"]
    return _nats(model(ids, use_cache=False).logits[0], ids[0, 1:])


def read_retro(model: PreTrainedModel, document: Document, neighbors: str) -> float:
    """Nats of a document, by any model of this package."""
    ids = document["input_ids"]
    return _nats(model(ids, use_cache=False, **document[neighbors]).logits[0], ids[0, 1:])


def read_in_context(model: PreTrainedModel, document: Document, neighbors: str) -> float:
    """Nats of a document, for each chunk with the passages of the chunk before it in front of the text, the best one last."""
    ids = document["input_ids"][0]
    passages, mask = (part[0] for part in document[neighbors].values())
    total = 0.0
    for chunk in range(-1, len(passages)):
        first, last = max((chunk + 1) * CHUNK_SIZE - 1, 0), min((chunk + 2) * CHUNK_SIZE - 1, len(ids) - 1)
        if first >= last:
            continue
        given = (
            [passages[chunk, k][mask[chunk, k].bool()] for k in reversed(range(NUM_NEIGHBORS))] if chunk >= 0 else []
        )
        prompt = torch.cat([*given, ids[:last]])
        logits = model(prompt.unsqueeze(0), use_cache=False).logits[0, len(prompt) - last + first :]
        total += _nats(logits, ids[first + 1 : last + 1])
    return total


def load(name: str) -> PreTrainedModel:
    """The model of a reader."""
    if name == "retro_no_null":
        model = load("retro")
        for layer in model.model.retro.cross_attention.values():
            layer.null_logits.fill_(-1e4)
        return model
    if name in ADAPTERS:
        return RetroForCausalLM.from_pretrained(ADAPTERS[name], backbone_name_or_path=BASE, dtype=torch.float32)
    if name == "parallel_context":
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        return retrofit(BASE, reader="parallel_context", base_kwargs={"dtype": torch.float32}, **sizes)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


READERS = {
    "off": read_off,
    "in_context": read_in_context,
    "parallel_context": read_retro,
    "retro": read_retro,
    "retro_bible": read_retro,
    "retro_no_null": read_retro,
}
MODES = {
    "off": ("bits_per_byte",),
    "in_context": ("bits_per_byte", "random"),
    "parallel_context": ("bits_per_byte", "random"),
    "retro": ("bits_per_byte", "random", "neighbors_20", "store_1_percent"),
    "retro_bible": ("bits_per_byte", "random"),
    "retro_no_null": ("bits_per_byte", "random"),
}


@torch.no_grad()
def measure_text(documents: list[Document], kept: dict, save: Callable[[], None]) -> None:
    """Fill `kept`, by reader; what is there is not measured again."""
    num_bytes = sum(document["num_bytes"] for document in documents)
    num_tokens = sum(document["input_ids"].shape[1] - 1 for document in documents)
    kept["count"], kept["tokens"] = len(documents), num_tokens
    for name, read in READERS.items():
        row = kept.setdefault("readers", {}).setdefault(name, {})
        missing = [mode for mode in MODES[name] if mode not in row]
        model = load(name) if missing else None
        for mode in missing:
            start = time.process_time()
            bits = sum(read(model, document, mode) for document in documents) / math.log(2)
            if mode == "bits_per_byte":
                row["cpu_ms_per_token"] = 1000 * (time.process_time() - start) / num_tokens
            row[mode] = bits / num_bytes
            if name == "off":
                row["random"] = row[mode]
            save()
            print(f"{name:17} {mode:15} {row[mode]:.4f}", flush=True)


@torch.no_grad()
def measure_speed(documents: list[Document], num_tokens: int = 64, repeats: int = 3) -> dict[str, dict]:
    """Tokens per second of CPU time, by batch size: the base, and the same with neighbors that were encoded before."""
    model = load("parallel_context")
    known = documents[0]["bits_per_byte"]["neighbor_input_ids"][0]

    def retriever(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One of the first document's chunks for each, as the search would give."""
        found = known[ids.sum(dim=-1) % len(known)]
        return found, torch.ones_like(found)

    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": num_tokens}
    results = {}
    for batch_size in (1, 8):
        prompts = torch.cat([document["input_ids"][:, :CHUNK_SIZE] for document in documents[:batch_size]])
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        model.generate(prompts, retriever=retriever, **settings)  # encodes the neighbors
        for _ in range(repeats):
            for mode, source in (("off", None), ("on", retriever)):
                start = time.process_time()
                model.generate(prompts, retriever=source, **settings)
                seconds[mode].append(time.process_time() - start)
        rates = {mode: batch_size * num_tokens / min(values) for mode, values in seconds.items()}
        results[f"batch_{batch_size}"] = {
            **{f"{mode}_tokens_per_cpu_second": rate for mode, rate in rates.items()},
            "on_by_off": rates["on"] / rates["off"],
        }
        print(batch_size, results[f"batch_{batch_size}"], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="documents to leave out first")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results/readers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_base(BASE)
    work = Path(f"demo_output/readers/{args.skip}-{args.documents}")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    for reader in set(READERS) - set(args.readers):
        del READERS[reader]
    texts, speed = {}, None
    for name in args.texts:
        path = work / f"{name}.json"
        kept = texts[name] = json.loads(path.read_text()) if path.exists() else {}

        def save(path: Path = path, kept: dict = kept) -> None:
            path.write_text(json.dumps(kept, indent=1) + "\n")

        print(name, flush=True)
        documents = load_documents(name, args.documents, args.skip, tokenizer, embedder)
        measure_text(documents, kept, save)
        if args.publish and speed is None and "parallel_context" in args.readers:
            speed = measure_speed(documents)
    if args.publish:
        publish(texts, speed)


def publish(texts: dict[str, dict], speed: dict | None) -> None:
    """Write what was measured. Readers that this run left out keep their published values and the command that made them."""
    path = ROOT / "benchmarks" / "results" / "readers.json"
    published = json.loads(path.read_text()) if path.exists() else {"texts": {}, "runs": {}}
    for name, kept in texts.items():
        published["texts"].setdefault(name, {}).update({reader: kept["readers"][reader] for reader in READERS})
    run = {
        "command": " ".join(["python benchmarks/readers.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, 1 thread, float32",
        "versions": {"retro-hf": __version__} | {name: version(name) for name in ("torch", "transformers")},
    }
    published["runs"].update(dict.fromkeys(READERS, run))
    published["documents"] = {name: {key: kept[key] for key in ("count", "tokens")} for name, kept in texts.items()}
    published["speed"] = speed or published["speed"]
    path.write_text(json.dumps(published, indent=1) + "\n")


if __name__ == "__main__":
    main()
