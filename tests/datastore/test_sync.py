"""A store is made to hold what a folder holds: what differs is found, told, and written in one step."""

import json

import pytest

from retro_hf.datastore import RetroDatastore
from retro_hf.errors import DatastoreInputError


TEXTS = {"a.txt": "The king reads.", "b.md": "A bridge falls.", "sub/c.txt": "Music runs.", "rows.jsonl": None}


@pytest.fixture
def folder(tmp_path):
    """Three texts and a file of two records, of which the second has no id."""
    folder = tmp_path / "notes"
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": "row", "text": "A clock sings.", "year": float("nan")}, {"text": "The queen writes."}]
        path.write_text("\n".join(map(json.dumps, rows)) if text is None else text)
    return folder


@pytest.fixture
def store(folder, tmp_path, tokenizer, embedder):
    return RetroDatastore.build(folder, tmp_path / "store", tokenizer=tokenizer, embedder=embedder, chunk_size=8)


def texts_of(store) -> dict[str, str]:
    """The documents that a store has, by their ids."""
    numbers = set(range(store.num_documents)) - set(store.deleted_documents.tolist())
    return {(document := store.document(number))["id"]: document["text"] for number in numbers}


def test_new_changed_and_gone_documents_are_found_and_written_in_one_generation(store, folder, embedder, tmp_path):
    assert not store.compare(folder) and not store.sync(folder, embedder=embedder)
    assert store.generation == 1
    (folder / "a.txt").write_text("The king sleeps.")
    (folder / "b.md").unlink()
    (folder / "new.txt").write_text("A harbor opens.")
    (folder / "rows.jsonl").write_text(
        '{"id": "row", "text": "A clock sings.", "year": 7}\n{"text": "The queen writes."}'
    )
    expected = {"new": ("new.txt",), "changed": ("a.txt", "row"), "gone": ("b.md",), "num_unchanged": 2}
    assert vars(store.compare(folder)) == expected and store.generation == 1
    assert vars(store.sync(folder, embedder=embedder)) == expected and store.generation == 2
    fresh = RetroDatastore.build(
        folder, tmp_path / "fresh", tokenizer=store.tokenizer, embedder=embedder, chunk_size=8
    )
    assert texts_of(store) == texts_of(fresh) and store.manifest.sources == fresh.manifest.sources
    assert store.document(store.document_number("row"))["year"] == 7
    # Only what differs was embedded.
    assert store.shards[1].num_documents == 3
    assert not store.sync(folder, embedder=embedder)


def test_file_that_only_moved_is_gone_and_new(store, folder, embedder):
    (folder / "a.txt").rename(folder / "z.txt")
    changes = store.sync(folder, embedder=embedder)
    assert (changes.new, changes.gone, changes.changed) == (("z.txt",), ("a.txt",), ())


def test_document_that_lost_its_text_is_gone(store, folder, embedder):
    (folder / "a.txt").write_text(" \n")
    assert store.sync(folder, embedder=embedder).gone == ("a.txt",)
    assert "a.txt" not in texts_of(store)
    assert store.num_deleted_documents == 1 and store.manifest.num_empty_documents == 1


def test_another_folder_deletes_nothing(store, tmp_path, embedder):
    """A slip in the path would empty the store."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("A river.")
    for call in (store.compare, lambda documents: store.sync(documents, embedder=embedder)):
        with pytest.raises(DatastoreInputError):
            call(tmp_path / "other")
    assert store.generation == 1 and not list(tmp_path.glob(".*"))


def test_id_that_comes_twice_changes_nothing(store, folder, embedder):
    rows = [{"id": "a.txt", "text": "one"}, {"id": "a.txt", "text": "two"}]
    for documents in (rows, [rows[0] | {"id": "n"}, rows[1] | {"id": "n"}, rows[0]]):
        with pytest.raises(DatastoreInputError):
            store.sync(documents, embedder=embedder)
        with pytest.raises(DatastoreInputError):
            store.append(documents, embedder=embedder, replace=True)
    assert store.generation == 1


def test_append_replaces_documents_where_that_is_asked_for(store, embedder):
    rows = [{"id": "row", "text": "A clock falls."}, {"id": "new", "text": "A sailor."}]
    with pytest.raises(DatastoreInputError, match="'row'.*replace=True"):
        store.append(rows, embedder=embedder)
    assert store.generation == 1
    changes = store.append(rows, embedder=embedder, replace=True)
    assert (changes.new, changes.changed, changes.gone) == (("new",), ("row",), ())
    assert store.generation == 2 and len(texts_of(store)) == 6 and texts_of(store)["row"] == "A clock falls."
    # The same call once more, as after a kill that came too late.
    assert store.append(rows, embedder=embedder, replace=True).num_unchanged == 2 and store.generation == 2


def test_split_and_encoding_hold_for_every_call(folder, tmp_path, tokenizer, embedder):
    (folder / "latin.txt").write_bytes("Caf\u00e9.\n\nBread.".encode("cp1252"))
    options = {"encoding": "cp1252", "split": "paragraph"}
    store = RetroDatastore.from_texts(folder, tokenizer, embedder=embedder, **options)
    assert texts_of(store)["latin.txt:1"] == "Caf\u00e9."
    assert not store.compare(folder, **options)
    (folder / "latin.txt").write_bytes("Caf\u00e9.\n\nMore bread.".encode("cp1252"))
    assert store.sync(folder, embedder=embedder, **options).changed == ("latin.txt:3",)
    store.append(["x\n\ny"], embedder=embedder, split="paragraph")
    assert texts_of(store)["0:3"] == "y"
