"""The manifest and the files under it: whatever was changed, swapped, cut or made up is refused before it is used."""

import dataclasses
import hashlib
import json
import shutil

import pytest

from retro_hf.datastore import DatastoreManifest, RetroDatastore
from retro_hf.datastore.manifest import MANIFEST_NAME
from retro_hf.errors import DatastoreCorruptError, DatastoreNotFoundError


@pytest.fixture
def copy(built, tmp_path):
    """A copy of the store that a test may damage."""
    return shutil.copytree(built, tmp_path / "copy")


def rewrite(folder, change, seal=True):
    """Change the content of a manifest; with `seal` its checksum is made to match, as an attacker would."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    if seal:
        content.pop("checksum", None)
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))


def setter(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return change


def test_manifest_survives_writing_and_reading(built, tmp_path):
    manifest = DatastoreManifest.read(built)
    manifest.write(tmp_path)
    assert DatastoreManifest.read(tmp_path) == manifest
    assert (tmp_path / MANIFEST_NAME).read_bytes() == (built / MANIFEST_NAME).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_manifest_has_no_absolute_path(built):
    text = (built / MANIFEST_NAME).read_text()
    assert str(built.parent) not in text and '"/' not in text


def test_folder_without_a_manifest_is_not_a_datastore(tmp_path):
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.load(tmp_path)
    with pytest.raises(DatastoreNotFoundError):
        RetroDatastore.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        setter("neighbor_size", 24),
        setter("shards", 0, "num_documents", 39),
        setter("embedder", "fingerprint", "0" * 64),
        setter("shards", 0, "index", "recall", {"at": 2, "value": 1.0, "queries": 1}),
        lambda content: content.pop("sources"),
        lambda content: content.pop("checksum"),
    ],
)
def test_manifest_with_a_wrong_checksum_is_refused(copy, change):
    rewrite(copy, change, seal=False)
    with pytest.raises(DatastoreCorruptError):
        RetroDatastore.load(copy)


HOSTILE = {
    "format": setter("format_version", 1),
    "chunk size zero": setter("chunk_size", 0),
    "chunk size of another type": setter("chunk_size", "8"),
    "chunk size true": setter("chunk_size", True),
    "chunk size huge": setter("chunk_size", 1 << 40),
    "another chunk size": setter("chunk_size", 4),
    "neighbor below chunk": setter("neighbor_size", 4),
    "neighbor huge": setter("neighbor_size", 1 << 40),
    "chunks negative": setter("shards", 0, "num_chunks", -1),
    "chunks huge": setter("shards", 0, "num_chunks", 1 << 60),
    "chunks a float": setter("shards", 0, "num_chunks", 12.0),
    "fewer chunks": setter("shards", 0, "num_chunks", 40),
    "fewer documents": setter("shards", 0, "num_documents", 39),
    "more documents than chunks": setter("shards", 0, "num_documents", 1 << 30),
    "tokens huge": setter("shards", 0, "num_tokens", 1 << 40),
    "wider tokens": setter("token_dtype", "uint32"),
    "tokens of objects": setter("token_dtype", "object"),
    "metric": setter("metric", "l2"),
    "dim": setter("embedder", "dim", 16),
    "dim huge": setter("embedder", "dim", 1 << 40),
    "fingerprint": setter("embedder", "fingerprint", "../x"),
    "tokenizer a list": setter("tokenizer", []),
    "vocabulary": setter("tokenizer", "vocab_size", 0),
    "factory": setter("shards", 0, "index", "factory", None),
    "factory of nonsense": setter("shards", 0, "index", "factory", "Flat; rm -rf /"),
    "factory huge": setter("shards", 0, "index", "factory", "Flat" * 1000),
    "factory of another kind": setter("shards", 0, "index", "factory", "PQ8"),
    "lists without how many to read": setter("shards", 0, "index", "factory", "IVF8,Flat"),
    "index of other fields": setter("shards", 0, "index", "code", "import os"),
    "recall not a number": setter("shards", 0, "index", "recall", {"at": 2, "value": float("nan"), "queries": 9}),
    "recall above one": setter("shards", 0, "index", "recall", {"at": 2, "value": 1.5, "queries": 9}),
    "recall negative": setter("shards", 0, "index", "recall", {"at": 2, "value": -0.5, "queries": 9}),
    "recall a text": setter("shards", 0, "index", "recall", "perfect"),
    "recall of nothing": setter("shards", 0, "index", "recall", {}),
    "recall of a huge number": setter("shards", 0, "index", "recall", {"at": 2, "value": 1, "queries": 1 << 60}),
    "search of an unknown name": setter("shards", 0, "index", "search", {"quantizer_efSearch": 4}),
    "search of a fraction": setter("shards", 0, "index", "search", {"nprobe": 1.5}),
    "re-scoring everything": setter("shards", 0, "index", "search", {"k_factor": 1 << 40}),
    "search": setter("shards", 0, "index", "search", {"nprobe": -1}),
    "search infinite": setter("shards", 0, "index", "search", {"nprobe": 1e300}),
    "search of text": setter("shards", 0, "index", "search", "nprobe=1"),
    "parent path": setter("files", 0, "name", "../datastore.json"),
    "absolute path": setter("files", 0, "name", "/etc/passwd"),
    "windows path": setter("files", 0, "name", "a\\b"),
    "empty name": setter("files", 0, "name", ""),
    "hidden name": setter("files", 0, "name", ".profile"),
    "name with NUL": setter("files", 0, "name", "a\x00b"),
    "name a number": setter("files", 0, "name", 3),
    "missing file": setter("files", 0, "name", "absent.bin"),
    "size": setter("files", 0, "size", 7),
    "size huge": setter("files", 0, "size", 1 << 70),
    "sha256": setter("files", 0, "sha256", "abc"),
    "kind": setter("files", 0, "kind", "pickle"),
    "file twice": lambda content: content["files"].append(content["files"][0]),
    "file a text": setter("files", 0, "index-00000.faiss"),
    "no files": setter("files", []),
    "files an object": setter("files", {}),
    "too many files": lambda content: content["files"].extend(content["files"] * 2000),
    "no shards": setter("shards", []),
    "shard twice": lambda content: content["shards"].append(content["shards"][0]),
    "shard of no digits": setter("shards", 0, "name", "../00"),
    "shard of the future": setter("next_shard", 0),
    "shard a number": setter("shards", 0, 3),
    "stream of other length": setter("shards", 0, "stream_length", 1 << 20),
    "file of another shard": setter("files", 0, "shard", "00007"),
    "file of a list": setter("files", 0, "shard", []),
    "documents deleted": setter("num_deleted_documents", 3),
    "deleted negative": setter("num_deleted_documents", -1),
    "generation": setter("generation", 0),
    "unknown field": setter("trust_remote_code", True),
    "sources": setter("sources", "wiki"),
    "source a text": setter("sources", ["wiki"]),
    "source without a name": setter("sources", [{"license": "mit"}]),
    "source of other fields": setter("sources", [{"name": "wiki", "script": "import os"}]),
    "source with half a character": setter("sources", [{"name": "caf\udce9"}]),
    "license a list": setter("sources", [{"name": "wiki", "license": ["mit"]}]),
    "tokenizer of other fields": setter("tokenizer", "trust_remote_code", True),
    "tokenizer without a revision": lambda content: content["tokenizer"].pop("revision"),
    "revision a number": setter("tokenizer", "revision", 3),
    "name of the encoder huge": setter("embedder", "name", "x" * (1 << 17)),
    "pooling a number": setter("embedder", "pooling", 3),
    "prompt a list": setter("embedder", "prompt", ["query: "]),
    "encoder of queries a text": setter("embedder", "query", "dpr"),
    "encoder of queries without a fingerprint": setter(
        "embedder", "query", {"name": None, "revision": None, "prompt": ""}
    ),
    "library version": setter("library_version", 1.0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifest_with_a_valid_checksum_is_refused(copy, name):
    rewrite(copy, HOSTILE[name])
    with pytest.raises(DatastoreCorruptError) as refusal:
        # Whatever opening lets through because it looks at no key yet, using it does not.
        store = RetroDatastore.load(copy)
        _ = store.shards[0].keys, store.shards[0].index
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "3", '{"format_version": 1}', "[" * 100_000, "\x00", '{"a": 1e999}', "{" * 1000]
)
def test_file_that_is_not_a_manifest_is_refused(copy, text):
    (copy / MANIFEST_NAME).write_text(text)
    with pytest.raises(DatastoreCorruptError):
        RetroDatastore.load(copy)


def test_oversized_manifest_is_not_read(copy):
    with (copy / MANIFEST_NAME).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DatastoreCorruptError):
        RetroDatastore.load(copy)


def names_of(folder) -> list[str]:
    return [entry.name for entry in DatastoreManifest.read(folder).files]


def test_missing_file_is_named(copy):
    for name in names_of(copy):
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        with pytest.raises(DatastoreCorruptError):
            RetroDatastore.load(copy)
        (copy / name).write_bytes(content)
    RetroDatastore.load(copy, verify=True)


def test_file_of_another_size_is_named(copy):
    for name in names_of(copy):
        content = (copy / name).read_bytes()
        for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            (copy / name).write_bytes(damaged)
            with pytest.raises(DatastoreCorruptError):
                RetroDatastore.load(copy)
        (copy / name).write_bytes(content)


def test_verify_finds_a_flipped_bit_in_every_file(copy, seed):
    for name in names_of(copy):
        content = (copy / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            (copy / name).write_bytes(damaged)
            with pytest.raises(DatastoreCorruptError):
                RetroDatastore.load(copy, verify=True)
        (copy / name).write_bytes(content)


def test_swapped_files_are_refused(copy):
    entries = {entry.kind: entry.name for entry in DatastoreManifest.read(copy).files}
    first, second = copy / entries["doc_offsets"], copy / entries["keys"]
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    with pytest.raises(DatastoreCorruptError):
        RetroDatastore.load(copy)


@pytest.mark.parametrize("kind", ["tokens", "doc_offsets", "doc_lengths", "ids", "documents", "keys", "index"])
def test_random_bytes_of_the_right_size_are_refused(copy, kind):
    """Sealed anew by an attacker, so that sizes and checksums agree: the headers still do not."""
    manifest = DatastoreManifest.read(copy)
    entry = manifest.entries(kind)[0]
    noise = hashlib.shake_256(kind.encode()).digest(entry.size)
    (copy / entry.name).write_bytes(noise)
    files = tuple(
        dataclasses.replace(entry, sha256=hashlib.sha256(noise).hexdigest()) if file == entry else file
        for file in manifest.files
    )
    dataclasses.replace(manifest, files=files).write(copy)
    with pytest.raises(DatastoreCorruptError):
        store = RetroDatastore.load(copy, verify=True)
        _ = store.shards[0].keys, store.shards[0].index, store.document_number("doc-3")


def test_flipped_header_bit_is_refused_or_harmless(copy):
    """Without checksums, as every day: numpy parses headers as Python, which fails in many ways."""
    name = DatastoreManifest.read(copy).entries("doc_lengths")[0].name
    content = (copy / name).read_bytes()
    expected = RetroDatastore.load(copy).gather([3])[0]
    for place in range(128):
        for bit in (0, 3, 6):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            (copy / name).write_bytes(damaged)
            try:
                found = RetroDatastore.load(copy).gather([3])[0]
            except DatastoreCorruptError:
                continue
            assert found.tolist() == expected.tolist()
