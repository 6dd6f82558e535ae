"""Output that is not UTF-8 loses letters, never an answer; and what the options of the look-up commands do."""

import contextlib
import io
import json
import shutil
import sys

import pytest
from datastore.fixtures import corpus
from test_cli import retro, world
from tiny_training import CHUNK_SIZE

from retro_hf import RetroDatastore
from retro_hf_cli import main as command_line
from retro_hf_cli.output import say, say_json


__all__ = ["world"]

TEXT = "café – 图书馆 ⏎ 😀 \x1b[1m"


ENCODINGS = ["ascii", "cp1252", "shift_jis", "utf-8"]


def written(encoding: str, call) -> str:
    """What a call writes to a standard output of an encoding."""
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, write_through=True)):
        call()
        return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_is_shown_as_far_as_the_output_can(encoding):
    shown = written(encoding, lambda: say(TEXT))
    assert "\x1b" not in shown and "\\x1b" in shown
    for letter in "é–图⏎😀":
        assert letter.encode(encoding, "backslashreplace").decode(encoding) in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_stays_json(encoding):
    value = {"text": TEXT, "ids": ["é"]}
    assert json.loads(written(encoding, lambda: say_json(value))) == value


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_command_speaks_in_any_encoding(encoding, world, monkeypatch):
    """Help and tables are drawn by others, and the arrows of the command are not in every encoding."""
    search = ["search", world / "store", "the lighthouse – 图书馆", "--embedder", world / "encoder"]

    def run():
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        assert ended.value.code == 0

    for arguments in (["--help"], ["search", "--help"], ["env"], search):
        monkeypatch.setattr(sys, "argv", ["retro", *map(str, arguments)])
        assert written(encoding, run).strip()


def test_nothing_below_a_score_is_read(world, caplog):
    options = ("--embedder", world / "encoder", "--min-score")
    found = json.loads(retro("search", world / "store", "the lighthouse", "-k", 2, *options, -1, "--json"))
    between = (found[0]["score"] + found[1]["score"]) / 2
    kept = json.loads(retro("search", world / "store", "the lighthouse", "-k", 2, *options, between, "--json"))
    assert [one["chunk_id"] for one in kept] == [found[0]["chunk_id"]]
    assert "score of 2 or more" in retro("search", world / "store", "the lighthouse", *options, 2)
    generate = ("generate", world / "model", "the lighthouse", "--max-new-tokens", 2, "--store", world / "store")
    assert "Nothing was read" in retro(*generate, *options, 2)
    assert retro(*generate, *options, between).count("→") == 1
    ask = ("ask", world / "model", "the lighthouse", "--max-new-tokens", 2)
    for source in (("--store", world / "store"), ("--texts", world / "texts.jsonl")):
        assert json.loads(retro(*ask, *source, "--json", *options, 2))["sources"] == []
    evaluate = ("evaluate", world / "model", world / "texts.jsonl", "--store", world / "store")
    retro(*evaluate, "--modes", "off,on,random", *options, 2)
    assert "have no neighbor (100%)" in caplog.text


def test_a_document_with_an_id_of_its_own_is_shown_with_its_file(world, tmp_path):
    """Otherwise nobody knows where to look; an id that begins with the file says it already."""
    texts, store = tmp_path / "texts", tmp_path / "store"
    texts.mkdir()
    (texts / "faq.csv").write_text("id,title,text\n17,Frogs,the frogs came up\n")
    (texts / "list.csv").write_text("text\nthe king reads\n")
    encoder = ("--embedder", world / "encoder")
    retro("build", texts, "-o", store, "--tokenizer", world / "model", *encoder, "--chunk-size", CHUNK_SIZE)
    asked = retro("ask", world / "model", "frogs", "--store", store, *encoder, "--max-new-tokens", 2)
    found = retro("search", store, "frogs", *encoder)
    for printed in (asked, found):
        assert "17  Frogs  (faq.csv)\n" in printed
        assert printed.count("list.csv") == 1


def test_search_by_words_says_why_nothing_was_found(world):
    printed = retro("search", world / "store", "图书馆", "--bm25")
    assert "no chunk has a word of the query" in printed


def test_folder_and_store_are_brought_together(world, tmp_path):
    """What would change is told first, and with `--dry-run` nothing else happens."""
    folder, store = tmp_path / "notes", tmp_path / "store"
    folder.mkdir()
    for number, document in enumerate(corpus(3, seed=4)):
        (folder / f"{number}.txt").write_text(document["text"])
    embedder = ("--embedder", world / "encoder")
    retro("build", folder, "-o", store, "--tokenizer", world / "model", *embedder, "--chunk-size", CHUNK_SIZE)
    (folder / "0.txt").write_text("the king of another text")
    (folder / "1.txt").unlink()
    (folder / "3.txt").write_text("the queen of a new text")
    printed = retro("sync", folder, store, "--dry-run")
    assert all(line in printed for line in ("new: 1 (3.txt)", "changed: 1 (0.txt)", "gone: 1 (1.txt)", "unchanged: 1"))
    assert RetroDatastore.load(store).generation == 1
    assert "new: 1 (3.txt)" in retro("sync", folder, store, *embedder)
    changes = json.loads(retro("sync", folder, store, "--json"))
    assert changes["num_unchanged"] == 3 and changes["generation"] == 2 and not changes["gone"]
    (folder / "3.txt").write_text("the queen of a newer text")
    printed = retro("append", store, folder, "--replace", *embedder)
    assert "added: 0, replaced: 1, unchanged: 2" in printed
    shutil.rmtree(folder)


def test_encoding_and_split_are_options_of_what_reads_documents(world, tmp_path):
    folder, store = tmp_path / "notes", tmp_path / "store"
    folder.mkdir()
    (folder / "a.txt").write_bytes("the café opens.\n\nthe king reads.".encode("cp1252"))
    options = ("--embedder", world / "encoder", "--encoding", "cp1252", "--split", "paragraph")
    retro("build", folder, "-o", store, "--tokenizer", world / "model", "--chunk-size", CHUNK_SIZE, *options)
    opened = RetroDatastore.load(store)
    assert opened.document(0)["text"] == "the café opens." and opened.document(1)["id"] == "a.txt:3"
    assert "unchanged: 2" in retro("sync", folder, store, *options)
    (folder / "b.txt").write_text("one\n\ntwo")
    assert "added: 2, replaced: 0, unchanged: 2" in retro("append", store, folder, "--replace", *options)
