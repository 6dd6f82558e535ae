"""What kills and damage do to a datastore: random SIGKILLs during every kind of change, and stores with mutated files.

    python benchmarks/reliability.py  # about an hour on one core
    python benchmarks/reliability.py --kills 12 --mutations 60 --hostile 60 --seconds 10 --generations 300  # a quick look

Kills: a child process builds, appends, deletes or compacts and is killed after a random time. Then the store must open
with all checksums right and hold exactly the documents from before the change or from after it, and making the call
again must end in the state of a change that was not killed (for builds, the very same bytes).

Mutations: a copy of a store is damaged in one of the ways below, opened and used in a child process with bounded memory
and time. `verified` opens it with `verify=True`, as after a download; `plain` opens it as every day, when only sizes and
structure are checked. "Wrong" means that an answer differs from the undamaged store's without an error. Sealed mutations
have all checksums made right again, as an attacker would; such a store is another store, so no answer of it is wrong, but
it must not crash, hang, or take memory without bounds.

Hostile stores (`hostile_stores.py`): sealed stores of more than 30 kinds that name other files, lie about sizes or hold what
a library may fail on. `outside` counts those that had another file read, `prompts` those that asked at the terminal, `raw`
those that ended in another error than a `RetroError`.

Readers at the same time as writers (`many_readers.py`): `false_alarms` counts errors, and a neighbor that is no text of its document is
wrong. Then the growth of a process over many generations.

Writes benchmarks/results/reliability.json: `kills`, `lost`, `mutations`, `wrong`, `crashes`, `hostile`, `outside`, `raw`,
`false_alarms`, and all of it by kind.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from datastore.fixtures import corpus, make_encoder, make_tokenizer  # noqa: E402
from hostile_stores import run_hostile  # noqa: E402
from many_readers import leak, race  # noqa: E402

from retro_hf.datastore import ChunkEmbedder, RetroDatastore, stages  # noqa: E402
from retro_hf.datastore.manifest import MANIFEST_NAME, DatastoreManifest  # noqa: E402
from retro_hf.errors import RetroError  # noqa: E402


OPTIONS = {"chunk_size": 8, "neighbor_size": 20}
INDEXES = ("Flat", "IVF16,Flat", "IVF16,PQ8x4fs,Refine(SQfp16)", "HNSW8,SQ8")
SECONDS_TO_HANG = 60
MEMORY_TO_SPARE = 2 << 30
FORK = multiprocessing.get_context("fork")


def more() -> list[dict]:
    """Documents to append."""
    return [document | {"id": f"new-{document['id']}"} for document in corpus(20, seed=5)]


class Kills:
    """Changes that are killed, and what must be true afterwards."""

    def __init__(self, folder: Path, tokenizer, embedder) -> None:
        self.folder, self.tokenizer, self.embedder = folder, tokenizer, embedder
        self.base = self.folder / "base"
        self.build(self.base)
        store = RetroDatastore.load(self.base)
        store.append(more()[:5], embedder=embedder)
        store.delete(["doc-2", "doc-9"])

    def build(self, path: Path) -> None:
        """A build of eight blocks."""
        RetroDatastore.build(corpus(), path, tokenizer=self.tokenizer, embedder=self.embedder, **OPTIONS)

    def change(self, kind: str, path: Path) -> None:
        """Make one change."""
        if kind == "build":
            self.build(path)
            return
        store = RetroDatastore.load(path)
        if kind == "append":
            store.append(more()[5:], embedder=self.embedder)
        elif kind == "delete":
            store.delete([f"doc-{number}" for number in range(20, 30)])
        else:
            store.compact()

    def state(self, path: Path) -> tuple[str, ...] | None:
        """Ids of the documents that are there, in order; None where there is no store."""
        if not path.exists():
            return None
        store = RetroDatastore.load(path, verify=True)
        gone = set(store.deleted_documents.tolist())
        live = [number for number in range(store.num_documents) if number not in gone]
        ids = store.search(store.keys_of(np.arange(store.num_chunks)), 2)[1]
        if not set(store.document_of(ids[ids >= 0]).tolist()) <= set(live):
            return ("a deleted document was found",)
        return tuple(store.document(number)["id"] for number in live)

    def run(self, kind: str, chance: random.Random, number: int) -> dict[str, int]:
        """One change, killed; counts of what went wrong."""
        path = self.folder / f"{kind}-{number}"
        reference = self.folder / f"{kind}-reference"
        if not reference.exists():
            if kind != "build":
                shutil.copytree(self.base, reference)
            start = time.perf_counter()
            self.change(kind, reference)
            self.seconds = getattr(self, "seconds", {}) | {kind: time.perf_counter() - start}
        if kind != "build":
            shutil.copytree(self.base, path)
        before, after = self.state(path), self.state(reference)
        child = FORK.Process(target=self.change, args=(kind, path))
        child.start()
        child.join(chance.uniform(0, 1.1) * self.seconds[kind])
        child.kill()
        child.join()
        lost = self.state(path) not in (before, after)
        wrong = False
        if self.state(path) == before:
            self.change(kind, path)
            wrong = self.state(path) != after or (
                kind in ("build", "append") and contents(path) != contents(reference)
            )
        wrong |= any(entry.name.endswith(".partial") for entry in path.iterdir())
        shutil.rmtree(path)
        return {"killed": int(child.exitcode == -signal.SIGKILL), "lost": int(lost), "wrong": int(wrong)}


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def seal(folder: Path) -> None:
    """Make the checksums of a damaged store right again."""
    content = json.loads((folder / MANIFEST_NAME).read_text())
    for entry in content["files"]:
        file = folder / str(entry["name"])
        if file.is_file():
            data = file.read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(folder, content)


def reseal(folder: Path, content: dict) -> None:
    """Write a manifest with the checksum that its content has."""
    content.pop("checksum", None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


HOSTILE_VALUES = (0, -1, 1 << 40, 1 << 62, 1e300, None, True, "", "x", "../x", "/dev/zero", [], {}, "IVF99999999,Flat")


def mutate(folder: Path, kind: str, chance: random.Random) -> None:
    """Damage a store in one way."""
    names = sorted(entry.name for entry in DatastoreManifest.read(folder).files)
    file = folder / chance.choice(names)
    data = bytearray(file.read_bytes())
    if kind.startswith("truncated"):
        file.write_bytes(data[: chance.choice([0, 1, len(data) // 2, len(data) - 1, chance.randrange(len(data))])])
    elif kind.startswith("flipped"):
        data[chance.choice([chance.randrange(min(300, len(data))), chance.randrange(len(data))])] ^= (
            1 << chance.randrange(8)
        )
        file.write_bytes(data)
    elif kind == "grown":
        file.write_bytes(data + bytes(chance.randrange(1, 5000)))
    elif kind == "missing":
        file.unlink()
    elif kind == "swapped":
        other = folder / chance.choice([name for name in names if name != file.name])
        file_bytes, other_bytes = file.read_bytes(), other.read_bytes()
        file.write_bytes(other_bytes)
        other.write_bytes(file_bytes)
    elif kind == "noise, sealed":
        file.write_bytes(chance.randbytes(len(data)))
    elif kind == "manifest flipped":
        data = bytearray((folder / MANIFEST_NAME).read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (folder / MANIFEST_NAME).write_bytes(data)
    elif kind == "field changed, sealed":
        content = json.loads((folder / MANIFEST_NAME).read_text())
        place, key = content, chance.choice(sorted(content))
        while isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
            place = place[key]
            key = chance.choice(sorted(place)) if isinstance(place, dict) else chance.randrange(len(place))
        place[key] = chance.choice(HOSTILE_VALUES)
        reseal(folder, content)
        return
    if kind.endswith("sealed"):
        seal(folder)


KINDS = (
    "truncated", "truncated, sealed", "flipped", "flipped, sealed", "grown", "missing", "swapped", "noise, sealed",
    "manifest flipped", "field changed, sealed",
)  # fmt: skip


def answers(path: Path, verify: bool) -> bytes:
    """A digest of everything a store answers."""
    store = RetroDatastore.load(path, verify=verify)
    ids = np.arange(min(store.num_chunks, 2000))
    digest = hashlib.sha256()
    for array in (*store.gather(ids), store.document_of(ids), *store.search(store.keys_of(ids), 3)):
        digest.update(np.ascontiguousarray(array).tobytes())
    own = store.document_of(ids)
    digest.update(store.search(store.keys_of(ids), 3, exclude_documents=own)[1].tobytes())
    for number in range(store.num_documents):
        document = store.document(number)
        digest.update(json.dumps(document, sort_keys=True).encode())
        digest.update(store.document_numbers([document["id"]]).tobytes())
    digest.update(repr(dataclasses.asdict(store.manifest)).encode())
    return digest.digest()


def use(path: Path, verify: bool, expected: bytes, sealed: bool, result) -> None:
    """What a child process finds: refused, same or wrong."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_TO_SPARE,) * 2)
    try:
        same = answers(path, verify) == expected
        result.value = b"same" if same else b"other" if sealed else b"wrong"
    except RetroError:
        result.value = b"refused"
    except MemoryError:
        result.value = b"memory"
    except BaseException as error:  # noqa: B036 - whatever else comes out of a damaged store is counted against it
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        result.value = b"error"


def judged(path: Path, verify: bool, expected: bytes, sealed: bool) -> str:
    """Open and use a damaged store in a child process."""
    result = multiprocessing.Array("c", 16)
    child = FORK.Process(target=use, args=(path, verify, expected, sealed, result))
    child.start()
    child.join(SECONDS_TO_HANG)
    if child.is_alive():
        child.kill()
        child.join()
        return "hang"
    if child.exitcode != 0:
        return f"crash ({signal.Signals(-child.exitcode).name if child.exitcode < 0 else child.exitcode})"
    return result.value.decode()


def run_kills(folder: Path, tokenizer, embedder, args) -> dict:
    """Changes that are killed."""
    kills: dict[str, collections.Counter] = {}
    (folder / "kills").mkdir()
    chance, killing = random.Random(args.seed), Kills(folder / "kills", tokenizer, embedder)
    changes = ("build", "append", "delete", "compact")
    number = 0
    # A child that was done before its time is no kill and is tried again.
    while sum(counts["killed"] for counts in kills.values()) < args.kills:
        kind = changes[number % len(changes)]
        kills.setdefault(kind, collections.Counter()).update(killing.run(kind, chance, number))
        number += 1
    return {
        "kills": sum(counts["killed"] for counts in kills.values()),
        "lost": sum(counts["lost"] for counts in kills.values()),
        "wrong_after_kills": sum(counts["wrong"] for counts in kills.values()),
        "kills_by_change": {kind: dict(counts) for kind, counts in kills.items()},
    }


def run_mutations(folder: Path, stores: list[tuple[Path, bytes]], args) -> dict:
    """Stores that are damaged."""
    chance = random.Random(args.seed)
    outcomes: dict[str, dict[str, collections.Counter]] = {"verified": {}, "plain": {}}
    for number in range(args.mutations):
        kind = KINDS[number % len(KINDS)]
        source, expected = stores[number // len(KINDS) % len(stores)]
        path = shutil.copytree(source, folder / "damaged")
        mutate(path, kind, chance)
        for mode, counts in outcomes.items():
            found = judged(path, mode == "verified", expected, kind.endswith("sealed"))
            counts.setdefault(kind, collections.Counter())[found] += 1
        shutil.rmtree(path)

    def total(mode: str, *names: str) -> int:
        counts = outcomes[mode].values()
        return sum(count for kind in counts for found, count in kind.items() if found.split(" ")[0] in names)

    return {
        "mutations": args.mutations,
        "wrong_after_damage": total("verified", "wrong"),
        "wrong_without_verify": total("plain", "wrong"),
        "damage_crashes": sum(total(mode, "crash", "hang", "memory", "error") for mode in outcomes),
        "mutations_by_kind": {
            mode: {kind: dict(sorted(found.items())) for kind, found in counts.items()}
            for mode, counts in outcomes.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="What to run; other parts of the file stay.")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--hostile", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300, help="Of readers beside writers.")
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reliability.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import faiss

    faiss.omp_set_num_threads(1)
    stages._BLOCK_DOCUMENTS = 5
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        embedder = ChunkEmbedder.from_pretrained(make_encoder(folder / "encoder"), dtype=torch.float32)
        stores = []
        for index in INDEXES:
            store = RetroDatastore.build(
                corpus(),
                folder / f"store-{len(stores)}",
                tokenizer=tokenizer,
                embedder=embedder,
                index=index,
                **OPTIONS,
            )
            store.append(more()[:4], embedder=embedder)
            stores.append((store.path, answers(store.path, verify=True)))
        plain = stores[0][0]
        work = {
            "kills": lambda: run_kills(folder, tokenizer, embedder, args),
            "mutations": lambda: run_mutations(folder, stores, args),
            "hostile": lambda: run_hostile(args.hostile, plain, folder, embedder, args.seed),
            "race": lambda: race(shutil.copytree(plain, folder / "raced"), embedder, more()[4:7], args.seconds),
            "leak": lambda: leak(plain, embedder, args.generations),
        }
        for part in args.parts.split(","):
            found = work[part]()
            print(part, {key: value for key, value in found.items() if not isinstance(value, dict)}, flush=True)
            results[part] = found | {"command": " ".join(["python", *sys.argv]), "seed": args.seed}

    # Parts may run one after the other, or beside each other.
    with FileLock(f"{args.out}.lock"):
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        parts = known.get("parts", {}) | results
        record = summary(parts) | {"parts": parts}
        record["versions"] = {"faiss": faiss.__version__, "numpy": np.__version__, "torch": torch.__version__}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    Path(f"{args.out}.lock").unlink(missing_ok=True)
    if bad := [name for name in MUST_BE_ZERO if record[name]] + ["leak"] * (record["mb_per_1000_generations"] >= 0.1):
        sys.exit(f"This must not happen: {', '.join(bad)}.")


PARTS = ("kills", "mutations", "hostile", "race", "leak")
MUST_BE_ZERO = ("lost", "wrong", "crashes", "outside", "prompts", "raw", "false_alarms")


def summary(parts: dict) -> dict:
    """The figures of all parts; 0 for a part that has not run."""

    def of(part: str, *names: str) -> float:
        return sum(parts.get(part, {}).get(name, 0) for name in names)

    return {
        "kills": of("kills", "kills"),
        "lost": of("kills", "lost"),
        "mutations": of("mutations", "mutations"),
        "wrong": of("kills", "wrong_after_kills") + of("mutations", "wrong_after_damage") + of("race", "wrong_texts"),
        "crashes": of("mutations", "damage_crashes") + of("hostile", "hostile_crashes"),
        "hostile": of("hostile", "hostile"),
        "outside": of("hostile", "outside"),
        "prompts": of("hostile", "prompts"),
        "raw": of("hostile", "raw"),
        "false_alarms": of("race", "false_alarms"),
        "mb_per_1000_generations": of("leak", "mb_per_1000_generations"),
    }


if __name__ == "__main__":
    main()
