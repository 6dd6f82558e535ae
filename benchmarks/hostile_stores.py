"""Sealed hostile stores for `reliability.py`: what a stranger would put into a folder, with every checksum right.

Each kind is a function that changes a copy of a store; `canary` is a folder beside it, which nothing may read.
"""

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from retro_hf import RetroRetriever
from retro_hf.datastore import RetroDatastore
from retro_hf.datastore.hub import render_card
from retro_hf.errors import RetroError
from retro_hf.outside import printable


FORK = multiprocessing.get_context("fork")
# Of the processor, since the clock of a busy machine says nothing; what waits for ever uses none of them.
SECONDS_TO_HANG = 60
SECONDS_TO_WAIT = 600
MEMORY_TO_SPARE = 2 << 30

Kind = Callable[[Path, Path, random.Random], dict | None]
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def _file(store: Path, chance: random.Random, suffix: str = "") -> Path:
    return chance.choice(sorted(file for file in store.iterdir() if file.name.endswith(suffix) and file.is_file()))


def _replace(file: Path, make: Callable[[Path], None]) -> None:
    file.unlink()
    make(file)


def _vectors(num: int, dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num, dim)).astype(np.float32)


def _index(store: Path, index, add: bool = True) -> None:
    manifest = json.loads((store / "datastore.json").read_text())
    num, dim = manifest["shards"][0]["num_chunks"], manifest["embedder"]["dim"]
    if callable(index):
        index = index(num, dim)
    if isinstance(index, str):
        index = faiss.index_factory(dim, index, faiss.METRIC_INNER_PRODUCT)
    vectors = _vectors(num, dim)
    if not index.is_trained:
        index.train(vectors)
    if add and not index.ntotal:
        index.add(vectors)
    faiss.write_index(index, str(next(store.glob("index-*"))))


def _on_disk(store: Path, canary: Path) -> None:
    def make(num: int, dim: int):
        index = faiss.index_factory(dim, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(_vectors(num, dim))
        lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(canary / "lists"))
        index.replace_invlists(lists, True)
        lists.this.disown()
        return index

    _index(store, make)


def _json(store: Path, name: str, **changes) -> None:
    path = store / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def _bytes(file: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def _documents(store: Path, **columns) -> None:
    path = next(store.glob("documents-*"))
    table = pq.read_table(path)
    content = {name: table.column(name).to_pylist() for name in table.column_names}
    for name, value in columns.items():
        content[name] = value(content[name]) if callable(value) else [value] * table.num_rows
    pq.write_table(pa.table(content), path, compression="zstd")


def _overwrite(place: int, content: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[place : place + len(content)] = content

    return change


KINDS: dict[str, Kind] = {
    # links, pipes and devices
    "link out": lambda s, c, r: _replace(_file(s, r), lambda f: f.symlink_to(c / "secret")),
    "relative link out": lambda s, c, r: _replace(_file(s, r), lambda f: f.symlink_to(Path("..") / c.name / "secret")),
    "pipe": lambda s, c, r: _replace(_file(s, r), os.mkfifo),
    "device": lambda s, c, r: _replace(_file(s, r), lambda f: f.symlink_to("/dev/zero")),
    "folder for a file": lambda s, c, r: _replace(_file(s, r), Path.mkdir),
    "link to another file of the store": lambda s, c, r: _replace(_file(s, r), lambda f: f.symlink_to("datastore.json")),
    "unlisted config is a link": lambda s, c, r: (s / "config.json").symlink_to(c / "secret"),
    # names
    "absolute name": lambda s, c, r: {"files.0.name": str(c / "secret")},
    "name with dots": lambda s, c, r: {"files.0.name": f"../{c.name}/secret"},
    "name of another machine": lambda s, c, r: {"files.0.name": r.choice(["//host/share", "\\\\host\\x", "C:x", "nul"])},
    "embedder is a folder": lambda s, c, r: {"embedder.name": str(c / "encoder")},
    "query encoder is a folder": lambda s, c, r: {
        "embedder.query": {"name": str(c / "encoder"), "revision": None, "fingerprint": "0" * 64, "prompt": ""}
    },
    "shard name is a path": lambda s, c, r: {"shards.0.name": "../00000"},
    # code and settings
    "code of a tokenizer": lambda s, c, r: _json(s, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]}),
    "tokenizer file elsewhere": lambda s, c, r: _json(s, "tokenizer_config.json", vocab_file=str(c / "secret")),
    "tokenizer versions elsewhere": lambda s, c, r: _json(
        s, "tokenizer_config.json", fast_tokenizer_files=[f"../{c.name}/tokenizer.1.0.json"]
    ),
    "arguments of a tokenizer": lambda s, c, r: _json(s, "tokenizer_config.json", init_inputs=[str(c / "secret")]),
    "tokenizer of another kind": lambda s, c, r: _json(s, "tokenizer.json", model={"type": "Unigram", "unk_id": 9, "vocab": []}),
    "tokenizer without parts": lambda s, c, r: _json(s, "tokenizer.json", model=None, pre_tokenizer={"type": "x"}),
    "chat template without end": lambda s, c, r: (s / "chat_template.jinja").write_text(ENDLESS) and None,
    "settings out of range": lambda s, c, r: _json(s, "retriever.json", num_neighbors=r.choice([1 << 40, -1, "x", None])),
    # JSON
    "deep JSON": lambda s, c, r: _file(s, r, "json").write_bytes(DEEP) and None,
    "no JSON": lambda s, c, r: _file(s, r, "json").write_bytes(r.choice([b"", b"[]", b"\xff", b"NaN", b"{"])) and None,
    "long JSON": lambda s, c, r: (s / "datastore.json").write_bytes(b" " * (17 << 20) + b"{}") and None,
    # index
    "index on disk": lambda s, c, r: _on_disk(s, c),
    "index of another kind": lambda s, c, r: _index(s, r.choice(["SQ8", "PQ8x4", "HNSW8,Flat", "IVF4,SQ8", "IVF4,RaBitQ"])),
    "index of L2": lambda s, c, r: _index(s, lambda n, d: faiss.IndexFlatL2(d)),
    "index with own ids": lambda s, c, r: _index(s, "IDMap2,Flat", add=False),
    "empty index": lambda s, c, r: _index(s, "Flat", add=False),
    "index of another dimension": lambda s, c, r: _bytes(
        next(s.glob("index-*")), _overwrite(4, struct.pack("<i", r.choice([1, 33, 1 << 30, -1])))
    ),
    "index with a long vector": lambda s, c, r: _bytes(
        next(s.glob("index-*")), _overwrite(r.choice([37, 41, 45]), struct.pack("<Q", r.choice([1 << 40, 1 << 62, 1])))
    ),
    "index with noise": lambda s, c, r: _bytes(
        next(s.glob("index-*")), lambda d: _overwrite(r.randrange(len(d) - 8), r.randbytes(8))(d)
    ),
    "factory of another kind": lambda s, c, r: {
        "shards.0.index.factory": r.choice(["IVF99999999,Flat", "IDMap,Flat", "PQ8x32", "LSH", "IVF4(IVF4,Flat),Flat"])
    },
    # arrays
    "array with a long header": lambda s, c, r: _bytes(
        _file(s, r, "npy"), _overwrite(6, b"\x02\x00" + struct.pack("<I", 1 << 31))
    ),
    "array of objects": lambda s, c, r: np.save(_file(s, r, "npy"), np.array([{}], dtype=object), allow_pickle=True),
    "array of zeros": lambda s, c, r: _bytes(_file(s, r, "npy"), lambda d: _overwrite(128, bytes(len(d) - 128))(d)),
    "array of large numbers": lambda s, c, r: _bytes(
        _file(s, r, "npy"), lambda d: _overwrite(128, b"\x7f" * (len(d) - 128))(d)
    ),
    "archive of arrays": lambda s, c, r: _file(s, r, "npy").write_bytes(b"PK\x03\x04" + bytes(100)) and None,
    "keys with a long header": lambda s, c, r: _bytes(next(s.glob("keys-*")), _overwrite(0, struct.pack("<Q", 1 << 62))),
    "keys that are not numbers": lambda s, c, r: _bytes(
        next(s.glob("keys-*")), lambda d: _overwrite(256, b"\xff" * (len(d) - 256))(d)
    ),
    # documents
    "documents without text": lambda s, c, r: _documents(s, **{r.choice(["id", "text", "title", "source"]): None}),
    "documents of numbers": lambda s, c, r: _documents(s, text=7),
    "copies of a long text": lambda s, c, r: _documents(s, text="a" * (40 << 20)),
    "deep metadata": lambda s, c, r: _documents(s, metadata="[" * 100_000),
    "control characters": lambda s, c, r: _documents(s, title="\x1b[2J\x9b\u202e", id=lambda ids: [f"\x07{id}" for id in ids]),
    "no parquet": lambda s, c, r: next(s.glob("documents-*")).write_bytes(gzip.compress(bytes(1 << 20))) and None,
    # sizes
    "large neighbors": lambda s, c, r: {"neighbor_size": 1 << 20},
    "many chunks": lambda s, c, r: {"shards.0.num_chunks": 1 << 40, "shards.0.stream_length": 1 << 43},
    "negative counts": lambda s, c, r: {r.choice(["shards.0.num_documents", "generation", "chunk_size"]): -1},
}  # fmt: skip


# ── making, opening and judging them ──────────────────────────────────────────────────────────────────────────────────


def make_canary(folder: Path) -> Path:
    """Files that nothing may read: their time of access is older than that of their change, so a read moves it."""
    (folder / "encoder").mkdir(parents=True)
    for name in ("secret", "tokenizer.1.0.json", "encoder/config.json"):
        (folder / name).write_text('{"secret": "secret"}')
        os.utime(folder / name, (0, 1))
    return folder


def was_read(canary: Path) -> bool:
    """Whether a canary was read."""
    return any(file.stat().st_atime for file in canary.rglob("*") if file.is_file())


def make_hostile(store: Path, kind: str, canary: Path, chance: random.Random) -> None:
    """Change a store as a stranger would, and make its checksums right."""
    changes = KINDS[kind](store, canary, chance)
    if (store / "datastore.json").is_symlink() or not (store / "datastore.json").is_file():
        return
    try:
        content = json.loads((store / "datastore.json").read_bytes())
        entries = content["files"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    for entry in entries:
        file = store / entry["name"]
        if file.is_file():
            data = file.read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for place, value in (changes or {}).items():
        *way, last = place.split(".")
        part = content
        for step in way:
            part = part[int(step) if step.isdigit() else step]
        part[int(last) if last.isdigit() else last] = value
    content.pop("checksum", None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (store / "datastore.json").write_text(json.dumps(content))
    for file in canary.rglob("*"):  # sealing has followed links
        os.utime(file, (0, 1))


def use(path: Path, canary: Path, embedder, found, seconds) -> None:
    """In a child: open a store and do everything with it; what came of it goes to `found`, and the CPU `seconds` it took."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_TO_SPARE,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_TO_HANG,) * 2)
    outcome = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            name = os.path.realpath(os.fsdecode(arguments[0]))
            if name.startswith(str(canary)) or name == "/dev/zero":
                outcome.append("outside")
        elif event == "builtins.input":
            outcome.append("prompt")

    sys.addaudithook(watch)
    sys.stdin = open(os.devnull)
    began = time.process_time()
    try:
        store = RetroDatastore.load(path, verify=True)
        retriever = RetroRetriever.from_pretrained(path, embedder=embedder)
        retriever.find(["the king reads"], num_neighbors=2)
        retriever.last_turns(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4))
        retriever.look_up(["the king reads"])
        ids = np.arange(min(store.num_chunks, 64))
        store.gather(ids)
        store.search(store.keys_of(ids), 3, exclude_documents=store.document_of(ids))
        for number in range(min(store.num_documents, 8)):
            store.document_numbers([store.document(number)["id"]])
        card = str(render_card(store.manifest, "me/store"))
        outcome.append("opened" if card == printable(card) else "raw: characters in the card")
        RetroRetriever.from_pretrained(path)  # the embedder that the manifest names
    except RetroError as error:
        outcome.append("refused" if printable(str(error)) == str(error) else "raw: characters in an error")
    except BaseException as error:  # noqa: B036 - whatever else comes out is counted
        outcome.append(f"raw: {type(error).__name__}: {error}"[:180])
    seconds.value = time.process_time() - began
    worst = [one for one in outcome if one in ("outside", "prompt")] or outcome
    found.value = worst[-1 if worst is outcome else 0].encode()


def judge(path: Path, canary: Path, embedder) -> tuple[str, float]:
    """What opening and using a store in a child with bounded memory and time comes to, and the CPU seconds it took."""
    found, seconds = multiprocessing.Array("c", 200), multiprocessing.Value("d", 0.0)
    child = FORK.Process(target=use, args=(path, canary, embedder, found, seconds))
    child.start()
    child.join(SECONDS_TO_WAIT)
    if child.is_alive():
        child.kill()
        child.join()
        return "crash: hang", float(SECONDS_TO_WAIT)
    if was_read(canary):
        return "outside", seconds.value
    outcome = found.value.decode(errors="replace") if child.exitcode == 0 else f"crash: exit code {child.exitcode}"
    return outcome, seconds.value


def run_hostile(count: int, store: Path, folder: Path, embedder, seed: int) -> dict:
    """Judge `count` hostile stores, of every kind in turn; counts by kind, and of what must not happen."""
    chance = random.Random(seed)
    by_kind: dict[str, Counter] = {}
    total: Counter = Counter()
    times: dict[str, float] = {}
    kinds = sorted(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        path = shutil.copytree(store, folder / "hostile")
        canary = make_canary(folder / "canary")
        make_hostile(path, kind, canary, chance)
        outcome, seconds = judge(path, canary, embedder)
        word = outcome.split(":")[0]
        if word == "refused":
            times[kind] = max(times.get(kind, 0.0), seconds)
        total[word] += 1
        by_kind.setdefault(kind, Counter())[outcome if word in ("raw", "crash") else word] += 1
        if word not in ("refused", "opened"):
            print(kind, outcome, file=sys.stderr, flush=True)
        shutil.rmtree(path)
        shutil.rmtree(canary)
    return {
        "hostile": count,
        "hostile_kinds": len(by_kind),
        "outside": total["outside"],
        "prompts": total["prompt"],
        "raw": total["raw"],
        "hostile_crashes": total["crash"],
        # From opening a store to the error: the slowest of all, and of half of the kinds.
        "refused_cpu_seconds": {
            "slowest": round(max(times.values(), default=0.0), 2),
            "of": max(times, key=times.__getitem__, default=None),
            "median": round(statistics.median(times.values()), 3) if times else 0.0,
        },
        "hostile_by_kind": {kind: dict(sorted(counts.items())) for kind, counts in sorted(by_kind.items())},
    }
