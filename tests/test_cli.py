"""The `retro` command: each subcommand does its work, answers in JSON where asked, and explains its errors."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios

import pytest
import typer
from datastore.fixtures import corpus
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, make_model, make_world
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from retro_hf import RetroDatastore, retrofit
from retro_hf.errors import (
    DatasetError,
    DatastoreInputError,
    MissingExtraError,
    PretrainedNotFoundError,
    RetroError,
    UnsupportedBackboneError,
)
from retro_hf.evaluation import Evaluation
from retro_hf_cli import main as command_line
from retro_hf_cli.main import app


@pytest.fixture(autouse=True)
def same_loglevel():
    """Commands make the package talkative in this process, and other tests count its warnings."""
    logger = logging.getLogger("retro_hf")
    before, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(before)
    logger.handlers = handlers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a model, an encoder, texts and a datastore."""
    folder = tmp_path_factory.mktemp("cli")
    made = make_world(folder)
    make_model().save_pretrained(folder / "model")
    made.tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"id": f"new-{document['id']}", "text": document["text"]}) for document in corpus(5, seed=9)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def retro(*arguments: object) -> str:
    """Run the command in this process and return what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_build_makes_a_datastore_that_search_and_inspect_open(world, tmp_path):
    """The first three commands of a newcomer, in a row."""
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder", "--chunk-size", CHUNK_SIZE)
    printed = retro("build", world / "texts.jsonl", "-o", tmp_path / "store", *options)
    assert "5 documents" in printed
    text = json.loads((world / "texts.jsonl").read_text().splitlines()[2])["text"]
    found = json.loads(
        retro("search", tmp_path / "store", text[:40], "-k", 3, "--embedder", world / "encoder", "--json")
    )
    assert len(found) == 3
    assert found[0]["score"] >= found[1]["score"] >= found[2]["score"]
    manifest = json.loads(retro("inspect", tmp_path / "store", "--verify", "--json"))
    assert manifest["num_documents"] == 5
    assert manifest["chunk_size"] == CHUNK_SIZE


def test_a_store_grows_forgets_and_is_compacted(world, tmp_path):
    """Append, delete, compact: what they say is what is there afterwards."""
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder", "--chunk-size", CHUNK_SIZE)
    store = tmp_path / "store"
    retro("build", world / "texts.jsonl", "-o", store, *options, "--memory-budget", "1GB", "--recall", 1)
    (tmp_path / "more.jsonl").write_text('{"id": "new", "text": "a brand new document"}\n')
    with pytest.raises(PretrainedNotFoundError, match="'encoder'"):
        retro("append", store, tmp_path / "more.jsonl")
    printed = retro("append", store, tmp_path / "more.jsonl", "--embedder", world / "encoder")
    assert "documents added: 1\n" in printed and printed.startswith("6 documents, ")
    first = json.loads(retro("search", store, "anything", "-k", 1, "--embedder", world / "encoder", "--json"))[0]
    assert "deleted from" in retro("delete", store, "new", first["document_id"])
    found = json.loads(retro("search", store, "anything", "-k", 9, "--embedder", world / "encoder", "--json"))
    assert not {neighbor["document_id"] for neighbor in found} & {"new", first["document_id"]}
    assert "4 documents" in retro("compact", store)
    manifest = json.loads(retro("inspect", store, "--verify", "--json"))
    assert (manifest["num_documents"], manifest["num_deleted_documents"], manifest["generation"]) == (4, 0, 4)


def test_search_prints_text_and_continuation(world):
    """What is found is shown in words."""
    printed = retro("search", world / "store", "the lighthouse", "--embedder", world / "encoder")
    assert printed.count("→") == 2
    found = json.loads(retro("search", world / "store", "the lighthouse", "--bm25", "--json"))
    assert "lighthouse" in found[0]["text"] and found[0]["metric"] == "bm25"


def test_generate_with_and_without_a_datastore(world):
    """A datastore changes what is written; without one, retrieval is off."""
    prompt = "the king reads seven letters under the old bridge near the harbor today because winter falls"
    arguments = ("generate", world / "model", prompt, "--max-new-tokens", 12)
    off = retro(*arguments)
    on = retro(*arguments, "--store", world / "store", "--embedder", world / "encoder")
    assert off.startswith(prompt[:20])
    assert on.startswith(prompt[:20])
    text, *lookups = on.split("\nLooked up: ")
    assert text.strip() != off.strip()
    assert [look_up.count("→") for look_up in lookups] == [2] * len(lookups)


def test_generate_reads_before_the_first_token_of_a_short_prompt(world):
    """A prompt shorter than a chunk is looked up; what was found is shown, and so is a query of one's own."""
    arguments = ("generate", world / "model", "the lighthouse", "--max-new-tokens", 2, "--store", world / "store")
    printed = retro(*arguments, "--embedder", world / "encoder")
    assert "Looked up: the lighthouse\n" in printed and printed.count("→") == 2
    printed = retro(*arguments, "--embedder", world / "encoder", "--query", "an old bridge", "--profile")
    assert "Looked up: an old bridge\n" in printed
    assert "\nembed the queries" in printed and "\nbackbone" in printed


@pytest.mark.parametrize("source", ["--store", "--texts"])
@pytest.mark.parametrize("name", ["model", "base"])
def test_ask_answers_and_names_its_sources(world, name, source):
    """A RETRO model answers, and so does a model of another family; from a datastore, and from texts."""
    if name == "base" and not (world / name).exists():
        tokenizer = AutoTokenizer.from_pretrained(world / "model")
        tiny_backbone("llama", vocab_size=len(tokenizer)).save_pretrained(world / name)
        tokenizer.save_pretrained(world / name)
    documents = world / "store" if source == "--store" else world / "texts.jsonl"
    arguments = ("ask", world / name, "the lighthouse", source, documents, "--embedder", world / "encoder")
    printed = retro(*arguments, "--passages", 3, "--max-new-tokens", 5).splitlines()
    found = json.loads(retro(*arguments, "--passages", 3, "--max-new-tokens", 5, "--json"))
    assert len(found["sources"]) == 3
    for passage, (heading, text) in zip(
        found["sources"], zip(printed[-6::2], printed[-5::2], strict=True), strict=True
    ):
        assert heading.split("] ")[1].split()[0] == passage["document_id"]
        assert text.strip() == " ".join(passage["text"].split())


def test_a_model_saved_without_a_tokenizer_has_that_of_its_base(world, tmp_path):
    """As `model.save_pretrained(folder, save_backbone=False)` leaves it."""
    base, saved = tmp_path / "base", tmp_path / "saved"
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tiny_backbone("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": 2 * CHUNK_SIZE}
    retrofit(base, reader="parallel_context", **sizes).save_pretrained(saved, save_backbone=False)
    arguments = ("the lighthouse", "--store", world / "store", "--embedder", world / "encoder", "--max-new-tokens", 5)
    assert retro("generate", saved, *arguments, "--base", base) == retro("generate", base, *arguments)
    with pytest.raises(ValueError, match="--base FOLDER"):
        retro("generate", saved, *arguments)


def test_ask_needs_one_source(world):
    """Neither, or both, is an error before anything is loaded."""
    for options in ((), ("--store", world / "store", "--texts", world / "texts.jsonl")):
        with pytest.raises(ValueError, match="--store"):
            retro("ask", world / "model", "who", *options)


def result_line(printed, start):
    """What follows `start` on the line that begins with it."""
    return next(line for line in printed.splitlines() if line.startswith(start))[len(start) :].strip()


def test_evaluate_measures_and_keeps_what_it_measured(world, tmp_path):
    """Figures as JSON and in words, sweeps, a folder; and OFF alone without a datastore."""
    arguments = (world / "model", world / "texts.jsonl", "--store", world / "store", "--embedder", world / "encoder")
    options = ("-k", 3, "--sweep-k", "1,2", "--fractions", "0.5", "-o", tmp_path, "--modes", "on, off,random")
    printed = retro("evaluate", *arguments, *options, "--report")
    assert result_line(printed, "Report: ") == str(tmp_path / "report.html")
    assert "<details" in (tmp_path / "report.html").read_text()  # chunks of a traced document
    result = Evaluation.load(tmp_path)
    assert " ".join(printed.split()).startswith(" ".join(result.verdict.text.split()))
    assert [(mode.name, mode.num_neighbors) for mode in result.modes] == [("off", 0), ("on", 3), ("random", 3)]
    assert [point.num_neighbors for point in result.num_neighbors_sweep] == [1, 2]
    assert [point.fraction for point in result.fraction_sweep] == [0.5]
    assert json.loads(retro("evaluate", *arguments, *options, "--json"))["modes"] == result.to_dict()["modes"]
    alone = json.loads(retro("evaluate", *arguments[:2], "--dtype", "float32", "--json"))
    assert [mode["name"] for mode in alone["modes"]] == ["off"]
    for wrong, message in (
        (("--sweep-k", "1;2"), "commas between"),
        (("--report",), "add --output FOLDER"),
    ):
        with pytest.raises(ValueError, match=message):
            retro("evaluate", *arguments, *wrong)


def test_retrofit_saves_a_model_that_loads(world, tmp_path):
    """Adapter-only: the folder holds what was added, and the caller says where the base is."""
    base = make_model().model.backbone
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "base")
    printed = retro("retrofit", tmp_path / "base", "-o", tmp_path / "new", "--chunk-size", 8, "--adapter-only")
    assert "trainable" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", backbone_name_or_path=tmp_path / "base")
    assert type(model).__name__ == "RetroForCausalLM"
    assert model.config.chunk_size == 8


def test_a_base_without_a_tokenizer_is_refused(tmp_path):
    """Where transformers would make up a vocabulary of special tokens; nothing is written."""
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=32, n_layer=4, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(PretrainedNotFoundError, match=r"'.*base' holds no tokenizer.*there is no vocabulary"):
        retro("retrofit", tmp_path / "base", "-o", tmp_path / "new", "--chunk-size", 8)
    assert not (tmp_path / "new").exists()


def test_an_error_is_one_explained_line(tmp_path):
    """No traceback, exit code 1; with --debug the traceback."""
    command = [sys.executable, "-m", "retro_hf_cli"]
    arguments = ["inspect", str(tmp_path / "nothing")]
    failed = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: There is no datastore")
    assert "build one with `retro build`" in failed.stderr
    assert "Traceback" not in failed.stderr
    debug = subprocess.run([*command, "--debug", *arguments], capture_output=True, text=True, check=False)
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("place", ["embedder", "tokenizer", "model", "base"])
def test_a_wrong_name_is_explained(world, tmp_path, place):
    """What was looked for, and how to go on; nothing is written."""
    build = ("build", world / "texts.jsonl", "-o", tmp_path / "out")
    arguments = {
        "embedder": (*build, "--tokenizer", world / "model", "--embedder", "org/nothing"),
        "tokenizer": (*build, "--tokenizer", "org/nothing", "--embedder", world / "encoder"),
        "model": ("generate", "org/nothing", "the king"),
        "base": ("retrofit", "org/nothing", "-o", tmp_path / "out"),
    }[place]
    what = {"base": "model"}.get(place, place)
    with pytest.raises(PretrainedNotFoundError, match=f"no folder 'org/nothing', and no {what} of that name"):
        retro(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command():
    """The commands that the README promises."""
    printed = retro("--help")
    for name in (
        "build",
        "append",
        "delete",
        "compact",
        "push",
        "search",
        "inspect",
        "generate",
        "retrofit",
        "evaluate",
    ):
        assert name in printed


def test_a_datastore_of_another_tokenizer_is_refused(world, tmp_path):
    """Also if the prompt is so short that nothing would be looked up."""
    other = AutoTokenizer.from_pretrained(world / "encoder")
    other.save_pretrained(tmp_path / "other")
    options = ("--tokenizer", tmp_path / "other", "--embedder", world / "encoder", "--chunk-size", CHUNK_SIZE)
    retro("build", world / "texts.jsonl", "-o", tmp_path / "store", *options)
    with pytest.raises(ValueError, match="tokenizer"):
        retro("generate", world / "model", "the", "--store", tmp_path / "store", "--embedder", world / "encoder")


def test_neighbors_of_another_size_are_built(world, tmp_path):
    """Also where chunks are longer than the neighbors that are built by default."""
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder", "--chunk-size", 130)
    with pytest.raises(DatastoreInputError, match="neighbor_size is 128.*chunk_size=130"):
        retro("build", world / "texts.jsonl", "-o", tmp_path / "store", *options)
    retro("build", world / "texts.jsonl", "-o", tmp_path / "store", *options, "--neighbor-size", 260)
    assert json.loads(retro("inspect", tmp_path / "store", "--json"))["neighbor_size"] == 260


def test_evaluate_reads_what_build_reads_and_names_a_broken_line(world, tmp_path):
    """A folder of texts; a line that is no JSON, with its number."""
    options = ("--store", world / "store", "--embedder", world / "encoder")
    (tmp_path / "one.txt").write_text("the king reads seven letters under the old bridge near the harbor today")
    assert "Scored: 1 document, " in retro("evaluate", world / "model", tmp_path, *options)
    (tmp_path / "two.jsonl").write_text('{"text": "fine"}\nnot JSON\n')
    with pytest.raises(DatasetError, match="two.jsonl:2 is not JSON"):
        retro("evaluate", world / "model", tmp_path / "two.jsonl", *options)


def test_evaluate_warns_of_what_is_not_utf8(world, tmp_path, caplog):
    """As build does."""
    (tmp_path / "latin.txt").write_bytes(
        "the king reads seven letters in the café under the old bridge".encode("latin1")
    )
    retro("evaluate", world / "model", tmp_path / "latin.txt")
    assert "1 of 1 file" in caplog.text and "'latin.txt'" in caplog.text


def test_evaluate_counts_documents_without_text(world, tmp_path):
    """As the page says, and where there are no others."""
    (tmp_path / "one.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DatasetError, match="one.jsonl:1"):
        retro("evaluate", world / "model", tmp_path / "one.jsonl")
    (tmp_path / "two.jsonl").write_text('{"text": ""}\n{"text": "the king reads seven letters"}\n')
    printed = retro("evaluate", world / "model", tmp_path / "two.jsonl", "--json")
    assert json.loads(printed)["inputs"]["num_unscorable"] == 1


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_model_without_retrieval_reads_a_store_or_is_refused(world, tmp_path, command):
    """A base that can read needs a store; without one, or if it cannot read, it would write on as if nothing were wrong."""
    texts, base = world / "texts.jsonl", tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tiny_backbone("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    make_model().model.backbone.save_pretrained(tmp_path)
    for folder in (base, tmp_path):
        tokenizer.save_pretrained(folder)
    store = ("--store", world / "store", "--embedder", world / "encoder")
    assert retro(command, base, texts, *store)
    with pytest.raises(ValueError, match="--store"):
        retro(command, base, texts)
    with pytest.raises(UnsupportedBackboneError):
        retro(command, tmp_path, texts, *store)


def test_an_empty_prompt_and_a_missing_store_are_explained(world, tmp_path):
    """Nothing to continue; nothing to look up; nowhere to look."""
    with pytest.raises(ValueError, match="query is empty"):
        retro("search", world / "store", " ", "--embedder", world / "encoder")
    with pytest.raises(ValueError, match="prompt is empty"):
        retro("generate", world / "model", "")
    for nowhere in (tmp_path / "nowhere", "nowhere", "./nowhere", "some/long/path"):
        with pytest.raises(FileNotFoundError) as error:
            retro("search", nowhere, "frogs", "--embedder", world / "encoder")
        assert str(error.value).startswith(f"There is no datastore at '{nowhere}'") and "hf auth" not in str(
            error.value
        )
        if nowhere != "nowhere":  # which may be a model of the Hub
            with pytest.raises(FileNotFoundError) as error:
                retro("generate", nowhere, "frogs")
            assert "from the Hub" not in str(error.value)


def test_arguments_that_are_not_utf8_are_read(world):
    """Python hands such bytes over as lone surrogates, which no tokenizer takes."""
    latin1 = b"the caf\xe9 of the king".decode("utf-8", "surrogateescape")
    assert "→" in retro("search", world / "store", latin1, "--embedder", world / "encoder")
    assert "\ufffd" in retro("generate", world / "model", latin1, "--max-new-tokens", 2)


def environment_with_bars():
    """That of the tests, but for the switch that keeps their own output free of bars."""
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}


ONE_AFTER_ANOTHER = """
import json, sys
from retro_hf_cli.main import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["retro", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, arguments
    for stream in (sys.stdout, sys.stderr):
        print(end="\\x1e", file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def piped(world, tmp_path_factory):
    """Standard output and standard error of each command, in a process of their own whose streams are pipes."""
    texts, encoder = world / "texts.jsonl", ("--embedder", world / "encoder")
    commands = [
        ("search", world / "store", "the king", *encoder, "--json"),
        ("inspect", world / "store", "--json"),
        ("evaluate", world / "model", texts, "--json"),
        ("build", texts, "--tokenizer", world / "model", *encoder, "-o", tmp_path_factory.mktemp("piped") / "store"),
    ]
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    code = [sys.executable, "-c", ONE_AFTER_ANOTHER, asked]
    done = subprocess.run(code, capture_output=True, text=True, check=False, env=environment_with_bars())
    assert done.returncode == 0, done.stderr
    printed = zip(done.stdout.split("\x1e"), done.stderr.split("\x1e"), strict=True)
    return {command[0]: streams for command, streams in zip(commands, printed, strict=False)}


@pytest.mark.parametrize("command", ["search", "inspect", "evaluate"])
def test_standard_output_has_only_json(piped, command):
    """In a process of its own: what a library prints while it is imported would be there, too."""
    output, _ = piped[command]
    json.loads(output)


def test_bars_are_not_drawn_into_a_pipe(piped):
    """Neither by this package nor by transformers; a line for each stage shows in a log where it is."""
    output, errors = piped["build"]
    assert "%" not in output + errors, errors
    for line in ("Tokenizing", "8 chunks: ", "Embedding: 8 chunks", "Indexing (Flat): 8 chunks"):
        assert any(row.startswith(line) for row in errors.splitlines()), errors


def test_bars_are_drawn_on_a_terminal(world, tmp_path):
    """Also that of transformers, which shows one while it loads a model."""
    options = [
        "--tokenizer",
        str(world / "model"),
        "--embedder",
        str(world / "encoder"),
        "-o",
        str(tmp_path / "store"),
    ]
    build = [sys.executable, "-m", "retro_hf_cli", "build", str(world / "texts.jsonl"), *options]
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a new one has no columns
    settings = {"stdout": terminal, "stderr": terminal, "env": environment_with_bars()}
    with subprocess.Popen(build, **settings) as process:
        os.close(terminal)
        drawn = b""
        with open(screen, "rb", buffering=0) as shown, contextlib.suppress(OSError):  # the end of a terminal on Linux
            while part := shown.read(1 << 16):
                drawn += part
    assert process.returncode == 0, drawn
    assert b"Embedding: 100%" in drawn and b"Loading weights: 100%" in drawn


def test_one_is_not_a_plural(world, tmp_path):
    """Neither of documents nor of chunks."""
    (tmp_path / "one.txt").write_text("a single line")
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder")
    printed = retro("build", tmp_path / "one.txt", "-o", tmp_path / "store", *options)
    assert printed == f"1 document, 1 chunk in {tmp_path / 'store'}\n"


def test_a_search_that_finds_nothing_says_why(world, tmp_path):
    """An empty answer looks like a failure; scripts get an empty list."""
    RetroDatastore.load(world / "store").save(tmp_path / "store")
    options = (tmp_path / "store", "zyzzyva", "--bm25")
    assert retro("search", *options) == "Nothing was found: no chunk has a word of the query.\n"
    store = RetroDatastore.load(tmp_path / "store")
    store.delete([store.document(number)["id"] for number in range(store.num_documents)])
    vectors = (tmp_path / "store", "the king", "--embedder", world / "encoder")
    assert (
        retro("search", *vectors) == f"Nothing was found: all documents of {tmp_path / 'store'} have been deleted.\n"
    )
    with pytest.raises(DatastoreInputError, match="not deleted"):
        retro("search", *options)
    assert json.loads(retro("search", *vectors, "--json")) == []


@pytest.mark.parametrize("command", ["inspect", "search"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("texts.jsonl", "it is a file"),
        ("store/datastore.json", "it is a file"),
        ("model", "the folder has no datastore.json"),
    ],
)
def test_path_that_is_not_a_datastore_is_reported(world, command, place, reason):
    """A file, a file inside the folder that was meant, a folder of something else."""
    rest = ("the king", "--embedder", world / "encoder") if command == "search" else ()
    with pytest.raises(FileNotFoundError, match=f"There is no datastore at '.*{place}': {reason}"):
        retro(command, world / place, *rest)


@pytest.mark.parametrize("command", [("inspect",), ("search", "the king"), ("append", "texts.jsonl")])
def test_an_unfinished_build_is_named(world, tmp_path, command):
    """Where nothing is yet, what was done so far lies beside it: the same build goes on."""
    name, *rest = command
    rest = [world / one if one == "texts.jsonl" else one for one in rest]
    (tmp_path / ".store.building").mkdir()
    with pytest.raises(FileNotFoundError, match=r"store' is not finished.*\.store\.building'"):
        retro(name, tmp_path / "store", *rest)


def test_inspect_speaks_to_people(world):
    """Numbers with separators and units, no Python literals; scripts have --json."""
    printed = retro("inspect", world / "store")
    store = RetroDatastore.load(world / "store")
    assert f"chunks     {store.num_chunks:,} of up to {CHUNK_SIZE} tokens" in printed
    assert f"shard 00000: {store.num_chunks:,} chunks, Flat" in printed
    assert "{" not in printed and "None" not in printed


def test_inspect_does_not_print_all_files_of_a_folder(world, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text("the king sat")
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder", "--chunk-size", CHUNK_SIZE)
    retro("build", tmp_path / "texts", "-o", tmp_path / "store", *options)
    sources = "00.txt; 01.txt; 02.txt; 03.txt; 04.txt; and 25 more (all with --json)"
    assert f"sources    {sources}\n" in retro("inspect", tmp_path / "store")
    assert len(json.loads(retro("inspect", tmp_path / "store", "--json"))["sources"]) == 30


def test_inspect_says_with_which_queries_recall_was_measured(world, tmp_path):
    """The store's own chunks: a user's queries may find less."""
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder", "--chunk-size", CHUNK_SIZE)
    retro("build", world / "texts.jsonl", "-o", tmp_path / "store", *options, "--index", "IVF2,Flat")
    assert "IVF2,Flat, recall 1.000 (of 2, measured with 45 of its own chunks as queries)" in retro(
        "inspect", tmp_path / "store"
    )


def test_control_characters_are_shown_and_not_sent(world, tmp_path):
    """Ids and texts of strangers must not move the cursor, color the terminal or end a line; JSON has them as they are."""
    row = {"id": "a\x1b[31m\x00b\nc", "title": "\x07bell", "text": "the frogs\x1b[2J came\nup and out"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row))
    options = ("--tokenizer", world / "model", "--embedder", world / "encoder", "--chunk-size", CHUNK_SIZE)
    retro("build", tmp_path / "odd.jsonl", "-o", tmp_path / "store", *options)
    printed = retro("search", tmp_path / "store", "frogs", "--bm25")
    assert r"a\x1b[31m\x00b⏎c  \x07bell" in printed
    assert not {"\x1b", "\x00", "\x07"} & set(printed)
    assert json.loads(retro("search", tmp_path / "store", "frogs", "--bm25", "--json"))[0]["document_id"] == row["id"]


def test_an_interrupt_says_what_became_of_the_datastore(world, monkeypatch, capsys):
    """Whenever it comes: a change is whole or has not happened."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.datastore, "_load_datastore", interrupted)
    monkeypatch.setattr(sys, "argv", ["retro", "delete", str(world / "store"), "doc-1"])
    with pytest.raises(SystemExit, match="130"):
        command_line.main()
    shown = capsys.readouterr().err
    assert (
        shown.startswith("Interrupted. A datastore is as it was before, or the change is complete.")
        and shown.count("\n") == 1
    )


def test_every_error_of_the_package_is_one_line(world, monkeypatch, capsys):
    """Also errors that are not a ValueError, such as that of a killed worker."""

    def ended(*_):
        raise RetroError("A worker process ended. Repeat the call.")

    monkeypatch.setattr(command_line.datastore, "_load_datastore", ended)
    monkeypatch.setattr(sys, "argv", ["retro", "compact", str(world / "store")])
    with pytest.raises(SystemExit, match="1"):
        command_line.main()
    assert capsys.readouterr().err == "Error: A worker process ended. Repeat the call.\n"


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_help_of_every_command_ends_with_an_example_that_it_takes(name):
    command = typer.main.get_command(app).commands[name]
    first, second, *arguments = shlex.split(command.epilog)
    assert (first, second) == ("retro", name)
    known = {option for parameter in command.params for option in parameter.opts}
    given = [argument for argument in arguments if argument.startswith("-")]
    assert given == [option for option in given if option in known]
    assert CliRunner().invoke(app, [name, "--help"]).output.rstrip().endswith(command.epilog)


def test_report_without_matplotlib_is_refused_before_any_work(world, tmp_path, monkeypatch):
    """Measuring takes minutes, and the model here cannot even be loaded."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError):
        retro("evaluate", "org/no-model", world / "texts.jsonl", "-o", tmp_path / "results", "--report")
