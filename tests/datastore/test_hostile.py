"""A stranger's folder: whatever is in it, opening and using it raises a RetroError, and reads nothing outside of it."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retro_hf.datastore import ChunkEmbedder, DatastoreManifest, RetroDatastore
from retro_hf.datastore.atomic_files import map_npy, reading
from retro_hf.datastore.compatibility import load_tokenizer
from retro_hf.datastore.hub import render_card
from retro_hf.datastore.index_format import check_index, parse_factory
from retro_hf.datastore.manifest import MANIFEST_NAME
from retro_hf.datastore.shard import MAX_GROUP_BYTES, DocumentTable
from retro_hf.errors import (
    DatastoreCorruptError,
    DatastoreInputError,
    DatastoreReadError,
    PretrainedNotFoundError,
    RetroError,
)
from retro_hf.retriever import RetroRetriever
from retro_hf_cli.output import plain, say, say_json

from .fixtures import corpus, make_encoder


@pytest.fixture
def store(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "store")


def seal(folder: Path, **changes) -> None:
    """Make all checksums right again, as a stranger would."""
    content = json.loads((folder / MANIFEST_NAME).read_text()) | changes
    for entry in content["files"]:
        if (folder / entry["name"]).is_file():
            data = (folder / entry["name"]).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.pop("checksum", None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def index_bytes(factory: str, num_vectors: int = 300, dim: int = 32, metric=faiss.METRIC_INNER_PRODUCT) -> bytes:
    vectors = np.random.default_rng(0).normal(size=(num_vectors, dim)).astype(np.float32)
    index = faiss.index_factory(dim, factory, metric)
    index.train(vectors)
    index.add(vectors)
    return faiss.serialize_index(index).tobytes()


def check(content: bytes, factory: str, num_vectors: int = 300, dim: int = 32) -> None:
    check_index(np.frombuffer(content, dtype=np.uint8), factory, num_vectors, dim)


KINDS = [
    "Flat", "SQ8", "SQfp16", "PQ8x4", "PQ8x4fs", "HNSW8,Flat", "HNSW8,SQ8", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ8x4",
    "IVF4,PQ8x4fs,Refine(SQfp16)", "IVF8_HNSW4,SQ8", "PCA16,IVF4,SQ8,Refine(Flat)",
]  # fmt: skip


@pytest.mark.parametrize("factory", KINDS)
def test_an_index_is_its_own_kind_and_no_other(factory):
    content = index_bytes(factory)
    check(content, factory)
    for other in (*KINDS, "LSH", "IDMap,Flat", "IVF4,RaBitQ", "", "Flat,"):
        if other != factory:
            with pytest.raises(ValueError):
                check(content, other)
    for sizes in ((299, 32), (301, 32), (300, 31), (300, 64), (0, 32)):
        with pytest.raises(ValueError):
            check(content, factory, *sizes)
    for cut in (content[:-1], content[: len(content) // 2], content[:3], b"", content + b"\0"):
        with pytest.raises(ValueError):
            check(cut, factory)
    with pytest.raises(ValueError):
        check(index_bytes("Flat", metric=faiss.METRIC_L2), factory)


@pytest.mark.parametrize("factory", KINDS)
def test_faiss_reads_every_forged_index_that_passes_the_check(factory):
    """Any byte may differ: what the check lets through has the same sizes, so FAISS searches it within its bounds."""
    content, generator = index_bytes(factory), np.random.default_rng(1)
    queries = np.random.default_rng(2).normal(size=(20, 32)).astype(np.float32)
    passed = 0
    for place in generator.integers(len(content), size=150):
        forged = bytearray(content)
        forged[place] = int(generator.choice([0, 1, 0x7F, 0xFF, forged[place] ^ 0x80]))
        try:
            check(bytes(forged), factory)
        except ValueError:
            continue
        passed += 1
        data = np.frombuffer(bytes(forged), dtype=np.uint8)
        index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(data), len(data)), faiss.IO_FLAG_MMAP_IFC)
        assert index.search(queries, 5)[1].max() < 300
    assert passed


@pytest.mark.parametrize("factory", ["HNSW8,Flat", "IVF4,Flat", "IVF4,PQ8x4fs,Refine(SQfp16)"])
def test_ids_beyond_the_vectors_are_refused(factory):
    """FAISS would read the vector of such an id wherever it is in memory."""
    content = index_bytes(factory)
    width = 4 if "HNSW" in factory else 8
    known = (299).to_bytes(width, "little")
    at = content.index(known, 60)
    with pytest.raises(ValueError):
        check(content[:at] + (1 << 20).to_bytes(width, "little") + content[at + width :], factory)


def on_disk_lists(secret: Path) -> bytes:
    """An IVF index whose lists are in another file."""
    index = faiss.index_factory(32, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    vectors = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    index.train(vectors)
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(secret))
    index.replace_invlists(lists)
    index.add(vectors)
    return faiss.serialize_index(index).tobytes()


def test_an_index_that_names_another_file_is_refused(tmp_path):
    content = on_disk_lists(tmp_path / "lists")
    assert str(tmp_path / "lists").encode() in content
    with pytest.raises(ValueError):
        check(content, "IVF4,Flat")


@pytest.mark.parametrize(
    "factory",
    ["IVF999999999999,Flat", "IVF4(IVF4,Flat),Flat", "Flat,Refine(IVF4,Flat)", "PQ8x32", "HNSW8,PQ8", "IDMap2,Flat"],
)
def test_other_kinds_of_index_are_neither_built_nor_opened(factory, store):
    assert parse_factory(factory) is None
    content = json.loads((store / MANIFEST_NAME).read_text())
    content["shards"][0]["index"]["factory"] = factory
    content["shards"][0]["index"]["search"] = {"nprobe": 1, "efSearch": 16, "k_factor": 1}
    seal(store, shards=content["shards"])
    with pytest.raises(RetroError):
        opened = RetroDatastore.load(store)
        opened.search(opened.keys_of([0]), 1)


def test_forged_index_of_a_store_is_refused_before_faiss_reads_it(store, tmp_path):
    opened = RetroDatastore.load(store)
    queries, count = opened.keys_of([0, 1]), opened.num_chunks
    for content in (index_bytes("SQ8", count), index_bytes("Flat", count, metric=faiss.METRIC_L2), b"IxFI", b""):
        (store / "index-00000.faiss").write_bytes(content)
        seal(store)
        with pytest.raises(DatastoreCorruptError):
            RetroDatastore.load(store, verify=True).search(queries, 1)


# ── names and kinds of files ──────────────────────────────────────────────────────────────────────────────────────────


def replaced(store: Path, name: str, how: str, secret: Path) -> None:
    (store / name).unlink()
    if how == "link":
        (store / name).symlink_to(secret)
    elif how == "relative link":
        (store / name).symlink_to(Path("..") / secret.name)
    elif how == "fifo":
        os.mkfifo(store / name)
    elif how == "device":
        (store / name).symlink_to("/dev/zero")
    elif how == "folder":
        (store / name).mkdir()


@pytest.mark.parametrize("how", ["link", "relative link", "fifo", "device", "folder"])
@pytest.mark.parametrize(
    "name", ["datastore.json", "tokens-00000.npy", "documents-00000.parquet", "index-00000.faiss", "tokenizer.json"]
)
def test_links_out_of_the_folder_pipes_and_devices_are_refused(store, tmp_path, name, how):
    secret = tmp_path / "secret"
    shutil.copyfile(store / name, secret)
    replaced(store, name, how, secret)
    with pytest.raises(RetroError):
        _ = RetroDatastore.load(store).tokenizer


def test_file_that_the_tokenizer_would_open_is_checked_too(store, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (store / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(DatastoreCorruptError):
        _ = RetroDatastore.load(store).tokenizer


def test_folder_of_links_to_files_of_the_same_cache_opens(built, tmp_path):
    """As the Hub's client keeps downloads."""
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in built.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert RetroDatastore.load(snapshot, verify=True).tokenizer is not None


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.npy",
        "a/b.npy",
        "a\\b.npy",
        "//host/x",
        "C:x",
        "nul",
        "COM1.npy",
        ".hidden",
        "",
        "x" * 200,
        "a\nb",
    ],
)
def test_names_of_files_that_are_paths_are_refused(store, name):
    files = json.loads((store / MANIFEST_NAME).read_text())["files"]
    files[0]["name"] = name
    seal(store, files=files)
    with pytest.raises(DatastoreCorruptError):
        DatastoreManifest.read(store)


@pytest.mark.parametrize(
    "name",
    [
        "{folder}",
        "./{name}",
        "{name}",
        "../{name}",
        "//host/share",
        "C:\\models\\x",
        "org/name/more",
        "org/..",
        "/dev/stdin",
        "nul\0",
    ],
)
def test_embedder_of_a_manifest_is_never_a_local_folder(store, tmp_path, monkeypatch, encoder_folder, name):
    """Also not one in the current folder: only the caller names local folders."""
    local = shutil.copytree(encoder_folder, tmp_path / "work" / "encoder")
    monkeypatch.chdir(local.parent)
    made = json.loads((store / MANIFEST_NAME).read_text())["embedder"]
    seal(store, embedder=made | {"name": name.format(folder=local, name="encoder")})
    with pytest.raises(RetroError):
        RetroRetriever.from_pretrained(store)
    assert RetroRetriever.from_pretrained(store, embedder="encoder").find("the king", num_neighbors=1)[0]


def test_saved_number_of_neighbors_is_bounded(store, encoder_folder):
    for number in (10**9, -1, 1.5, None, True, [2], "2"):
        (store / "retriever.json").write_text(json.dumps({"num_neighbors": number}))
        with pytest.raises(RetroError):
            RetroRetriever.from_pretrained(store, embedder=encoder_folder)


# ── code and questions ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_questions(monkeypatch):
    def ask(*_):
        raise AssertionError("a question at the terminal")

    monkeypatch.setattr("builtins.input", ask)


def test_code_of_a_tokenizer_is_neither_asked_for_nor_run(store, no_questions):
    path = store / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    )
    (store / "code.py").write_text("raise SystemExit('it ran')")
    for load in (lambda: RetroDatastore.load(store).tokenizer, lambda: load_tokenizer(store)):
        try:
            load()
        except RetroError:
            pass


def test_code_of_an_embedder_is_neither_asked_for_nor_run(tmp_path, no_questions):
    folder = make_encoder(tmp_path / "encoder")
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"model_type": "unheard_of"}
    path.write_text(json.dumps(content | {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}))
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(folder)


@pytest.mark.parametrize(
    "modules",
    [
        [{"idx": 0, "name": "0", "path": "", "type": "os.system"}],
        [{"idx": 0, "name": "0", "path": "", "type": "antigravity"}],
        [{"idx": 0, "name": "0", "path": "../outside", "type": "sentence_transformers.models.Transformer"}],
        [{"idx": 0, "name": "0", "path": "/etc", "type": "sentence_transformers.models.Transformer"}],
        [7],
    ],
)
def test_modules_of_an_embedder_are_those_of_its_library_and_in_its_folder(tmp_path, modules):
    folder = make_encoder(tmp_path / "encoder")
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "/etc"}),
        ("adapter_config.json", {"base_model_name_or_path": "../other"}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "../secret.safetensors"}}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "/etc/passwd"}}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": ["a"]}),
        ("config.json", {"transformers_weights": "../secret.safetensors"}),
        ("config.json", {"attn_implementation": "somebody/kernel"}),
        ("config.json", {"text_config": {"_attn_implementation": "somebody/kernel"}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.1.0.json"]}),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
    ],
)
def test_files_that_name_other_files_or_code_are_refused(tmp_path, name, content):
    folder = make_encoder(tmp_path / "encoder")
    known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(known | content))
    with pytest.raises(PretrainedNotFoundError):
        ChunkEmbedder.from_pretrained(folder)


# ── whatever is wrong is a RetroError ─────────────────────────────────────────────────────────────────────────────────


DEEP = b'{"a":' * 200_000 + b"1" + b"}" * 200_000


@pytest.mark.parametrize("name", ["datastore.json", "tokenizer.json", "tokenizer_config.json", "retriever.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"NaN", b"{", DEEP, b"[" * 100_000])
def test_json_that_is_not_as_it_should_be_is_reported(store, encoder_folder, name, content):
    (store / name).write_bytes(content)
    if name != MANIFEST_NAME:
        seal(store)
    with pytest.raises(RetroError):
        retriever = RetroRetriever.from_pretrained(store, embedder=encoder_folder)
        retriever.find("the king")


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "Unheard"}},
        {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}},
        {"model": None},
    ],
)
def test_tokenizer_that_the_library_cannot_make_is_reported(store, part):
    content = json.loads((store / "tokenizer.json").read_text()) | part
    (store / "tokenizer.json").write_text(json.dumps(content))
    seal(store)
    with pytest.raises(RetroError):
        _ = RetroDatastore.load(store).tokenizer


class PanicException(BaseException):
    """As a panic of a library in Rust arrives in Python."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PanicException("index out of range"), DatastoreCorruptError),
        (RecursionError(), DatastoreCorruptError),
        (RuntimeError("Error: bad index"), DatastoreCorruptError),
        (KeyError("x"), DatastoreCorruptError),
        (FileNotFoundError(2, "no such file"), DatastoreCorruptError),
        (MemoryError(), DatastoreReadError),
        (OSError(24, "Too many open files"), DatastoreReadError),
        (PermissionError(13, "Permission denied"), DatastoreReadError),
        (OSError(5, "Input/output error"), DatastoreReadError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_error_keeps_its_kind(tmp_path, error, expected):
    with pytest.raises(expected) as caught, reading(tmp_path):
        raise error
    if expected is DatastoreReadError:
        assert "damaged" not in str(caught.value)


def test_header_of_an_array_is_bounded_before_it_is_read(tmp_path):
    dtype = np.dtype(np.int64)
    good = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }"

    def npy(header: bytes, version: int = 1, claimed: int | None = None) -> bytes:
        size = len(header) if claimed is None else claimed
        return (
            b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + header + bytes(8)
        )

    path = tmp_path / "x.npy"
    path.write_bytes(npy(good))
    assert map_npy(path, dtype, 1).tolist() == [0]
    for content in (
        npy(good, 2, 1 << 31), npy(b"(" * 4000), npy(b"[" * 60_000), npy(b"__import__('os')"), npy(good, 9), b"PK\x03\x04", b"",
        npy(good.replace(b"<i8", b"|O")), npy(good.replace(b"(1,)", b"(-1,)")), npy(good) + b"0", npy(b"{}"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DatastoreCorruptError):
            map_npy(path, dtype, 1)


def documents_file(path: Path, texts: list, **columns) -> DocumentTable:
    count = len(texts)
    content = {name: [f"{name}-{row}" for row in range(count)] for name in ("id", "title", "source")}
    table = pa.table(content | {"text": texts, "metadata": pa.array([None] * count, pa.string())} | columns)
    pq.write_table(table, path, compression="zstd")
    return DocumentTable(path, np.frombuffer(path.read_bytes(), dtype=np.uint8), count)


def test_text_that_unpacks_to_more_than_the_bound_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "documents.parquet"
    monkeypatch.setattr("retro_hf.datastore.shard.MAX_GROUP_BYTES", 1 << 20)
    with pytest.raises(DatastoreCorruptError):
        documents_file(path, ["a" * (1 << 21)])
    # A dictionary of one text, which each of many rows names: small as a file, and small by its own account.
    copies = documents_file(path, ["a" * (1 << 19)] * 100)
    with pytest.raises(DatastoreCorruptError):
        copies.document(0)
    assert MAX_GROUP_BYTES >= 1 << 28


@pytest.mark.parametrize(
    "columns",
    [
        {"text": [7, 8]}, {"text": [None, None]}, {"id": [None, "a"]}, {"id": [["a"], ["b"]]}, {"metadata": ["[" * 100_000] * 2},
        {"metadata": ["[]", "7"]},
    ],
)  # fmt: skip
def test_documents_of_other_types_are_reported(tmp_path, columns):
    with pytest.raises(DatastoreCorruptError):
        documents_file(tmp_path / "documents.parquet", ["a", "b"], **columns).document(1)


def test_tokens_above_the_largest_id_are_reported(store):
    path = store / "tokens-00000.npy"
    data = bytearray(path.read_bytes())
    data[-2:] = data[128:130] = b"\xff\xff"
    path.write_bytes(data)
    seal(store)
    opened = RetroDatastore.load(store, verify=True)
    with pytest.raises(DatastoreCorruptError):
        opened.gather(np.arange(opened.num_chunks))


def test_gathering_more_than_memory_holds_is_refused(store):
    seal(store, neighbor_size=1 << 20)
    with pytest.raises(DatastoreInputError):
        RetroDatastore.load(store).gather(np.zeros(1 << 12, dtype=np.int64))


def test_control_characters_of_a_folder_do_not_reach_the_text_of_an_error(tmp_path):
    folder = tmp_path / "x\x1b[2J\u202e"
    with pytest.raises(RetroError) as caught:
        RetroDatastore.load(folder)
    assert str(caught.value).isprintable()


STRANGE = "a|b `c` [d](javascript:e) <script>f</script> \x1b[2J \x9b31m \u202eg \u2066h\ni"


def test_text_of_a_manifest_is_plain_in_the_card(store):
    content = json.loads((store / MANIFEST_NAME).read_text())
    made = {part: content[part] | {"name": STRANGE, "revision": STRANGE} for part in ("tokenizer", "embedder")}
    sources = [{"name": STRANGE, "license": STRANGE, "revision": STRANGE}]
    seal(store, sources=sources, library_version=STRANGE, **made)
    card = str(render_card(DatastoreManifest.read(store), "me/store"))
    assert not set("\x1b\x9b\u202e\u2066") & set(card)
    assert "<script" not in card and "[d](" not in card and "`c`" not in card
    rows = [line for line in card.splitlines() if "javascript" in line]
    assert rows and all(line.startswith("|") for line in rows)


def test_text_of_a_store_is_plain_on_a_terminal(capsys):
    say(STRANGE)
    say_json({"title": STRANGE})
    shown = capsys.readouterr().out
    assert not set("\x1b\x9b\u202e\u2066") & set(shown)
    assert json.loads(shown.splitlines()[-1])["title"] == STRANGE
    assert (
        plain("na\u00efve \U0001f469\u200d\U0001f4bb\n\u05e9\u05dc\u05d5\u05dd\u00a0x")
        == "na\u00efve \U0001f469\u200d\U0001f4bb\n\u05e9\u05dc\u05d5\u05dd\u00a0x"
    )


def test_documents_of_a_build_are_still_read_back(tmp_path, tokenizer, embedder):
    documents = corpus(3)
    store = RetroDatastore.build(
        documents, tmp_path / "s", tokenizer=tokenizer, embedder=embedder, chunk_size=8, neighbor_size=20
    )
    assert [store.document(number) for number in range(3)] == documents
