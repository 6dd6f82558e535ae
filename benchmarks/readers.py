"""Who reads best? One frozen base and the same passages: in its prompt, in parallel context, and through the shipped adapter.

    python benchmarks/readers.py                  # about 15 minutes of CPU time on one core; continues if it is stopped
    python benchmarks/readers.py --documents 4    # a quick look
    python benchmarks/readers.py --publish        # writes benchmarks/results/readers.json

| reader             | how the base reads the two neighbors of the last complete chunk                             | trained on |
| ------------------ | ------------------------------------------------------------------------------------------- | ---------- |
| `off`              | not at all                                                                                  | nothing    |
| `in_context`       | as the beginning of its prompt, which is computed again for every chunk                     | nothing    |
| `parallel_context` | `retrofit(base, reader="parallel_context")`                                                 | nothing    |
| `retro`            | `hub_configs/retro-smollm2-135m`: neighbor encoder and chunked cross-attention              | other books of the Bible, Wikipedia |

The base is SmolLM2-135M-Instruct (4 bits, dequantized to float32). Texts and datastores are those of `smollm2.py`: the first 16
documents, cut at 256 tokens, every token but the first of a document scored. `random` is the same with random chunks of the
datastore. CPU time is that of scoring, without the search; `speed` is that of decoding with neighbors that were encoded before.
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
from smollm2 import DOCUMENTS, MODEL, load_texts  # noqa: E402

from retro_hf import ChunkEmbedder, RetroDatastore, RetroForCausalLM, RetroRetriever, __version__, retrofit  # noqa: E402


CHUNK_SIZE, NUM_NEIGHBORS, NEIGHBOR_SIZE, TOKENS = 32, 2, 128, 256
BASE = Path("demo_output/smollm2/base")
TEXTS = ("bible", "licences")
Document = dict


def load_documents(name: str, count: int, tokenizer, embedder: ChunkEmbedder) -> list[Document]:
    """Documents with `input_ids` (1, T), `num_bytes`, and neighbors (1, chunks, K, R) that were found and that were drawn."""
    heldout, store = load_texts(name, DOCUMENTS[name])
    path = Path("demo_output/smollm2_texts") / f"{name}_store"
    if not path.exists():
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        RetroDatastore.build(store, path, tokenizer=tokenizer, embedder=embedder, **sizes)
    datastore = RetroDatastore.load(path)
    retriever = RetroRetriever(datastore, embedder=embedder, num_neighbors=NUM_NEIGHBORS)
    generator, documents = np.random.default_rng(0), []
    for one in heldout[:count]:
        ids = tokenizer(one["text"], return_tensors="pt").input_ids[:, :TOKENS]
        chunks = ids[0, : ids.shape[1] // CHUNK_SIZE * CHUNK_SIZE].view(-1, CHUNK_SIZE)
        found = retriever(chunks, torch.ones_like(chunks))
        drawn = datastore.gather(generator.integers(len(datastore), size=(len(chunks), NUM_NEIGHBORS)))
        first = tokenizer.decode(ids[0, :1])
        documents.append(
            {
                "input_ids": ids,
                "num_bytes": len(tokenizer.decode(ids[0]).encode()) - len(first.encode()),
                "found": _named(*found),
                "random": _named(*(torch.as_tensor(part) for part in drawn)),
            }
        )
    return documents


def _named(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = (1, -1, NUM_NEIGHBORS, NEIGHBOR_SIZE)
    return {"neighbor_input_ids": ids.long().view(shape), "neighbor_attention_mask": mask.long().view(shape)}


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
    if name == "retro":
        return RetroForCausalLM.from_pretrained(MODEL, backbone_name_or_path=BASE, dtype=torch.float32)
    if name == "parallel_context":
        sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
        return retrofit(BASE, reader="parallel_context", base_kwargs={"dtype": torch.float32}, **sizes)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


READERS = {"off": read_off, "parallel_context": read_retro, "in_context": read_in_context, "retro": read_retro}


@torch.no_grad()
def measure_texts(documents: dict[str, list[Document]], kept: dict, save: Callable[[], None]) -> None:
    """Fill `kept["texts"]`; what is there is not measured again."""
    for mode in ("found", "random"):
        key = "bits_per_byte" if mode == "found" else mode
        for name, read in READERS.items():
            rows = {text: kept["texts"].setdefault(text, {}).setdefault(name, {}) for text in documents}
            missing = [text for text in documents if key not in rows[text] and (name, mode) != ("off", "random")]
            model = load(name) if missing else None
            for text in missing:
                num_bytes = sum(document["num_bytes"] for document in documents[text])
                num_tokens = sum(document["input_ids"].shape[1] - 1 for document in documents[text])
                start = time.process_time()
                bits = sum(read(model, document, mode) for document in documents[text]) / math.log(2)
                if mode == "found":
                    rows[text]["cpu_ms_per_token"] = 1000 * (time.process_time() - start) / num_tokens
                rows[text][key] = bits / num_bytes
                save()
                print(f"{text:9} {name:17} {mode:6} {rows[text][key]:.4f}", flush=True)


@torch.no_grad()
def measure_speed(documents: list[Document], num_tokens: int = 64, repeats: int = 3) -> dict[str, dict]:
    """Tokens per second of CPU time, by batch size: the base, and the same with neighbors that were encoded before."""
    model = load("parallel_context")
    known = documents[0]["found"]["neighbor_input_ids"][0]

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
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument(
        "--skip", type=int, default=0, help="documents to leave out first; settings were chosen on 16 to 23"
    )
    parser.add_argument("--work", type=Path, help="file that results are kept in; by default one for each choice")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/results/readers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_base(BASE)
    work = args.work or Path(f"demo_output/readers-{args.skip}-{args.documents}.json")
    kept = json.loads(work.read_text()) if work.exists() else {"texts": {}}

    def save() -> None:
        work.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(json.dumps(kept, indent=1) + "\n")

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    embedder = ChunkEmbedder.from_pretrained(minilm_path())
    documents = {
        name: load_documents(name, args.skip + args.documents, tokenizer, embedder)[args.skip :] for name in args.texts
    }
    measure_texts(documents, kept, save)
    if "speed" not in kept:
        kept["speed"] = measure_speed(next(iter(documents.values())))
        save()
    if args.publish:
        kept |= {
            "command": f"python benchmarks/readers.py --documents {args.documents} --publish",
            "machine": f"{platform.machine()}, 1 thread, float32",
            "versions": {"retro-hf": __version__} | {name: version(name) for name in ("torch", "transformers")},
            "documents": {
                name: {"count": len(found), "tokens": sum(one["input_ids"].shape[1] - 1 for one in found)}
                for name, found in documents.items()
            },
        }
        path = ROOT / "benchmarks" / "results" / "readers.json"
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
