"""The `retro` command; beside the package so that `--help` waits for neither torch nor transformers."""

import dataclasses
import json
import logging
import os
import sys
import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from . import paths
from .evaluate import evaluate


app = typer.Typer(
    name="retro",
    help="Language models that read a datastore, chunk by chunk. retro COMMAND --help ends with an example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DATASTORE, MODEL = "Datastore", "Model"
STORE = "A datastore: its folder, or a dataset repository on the Hub."
Folder = Annotated[Path, typer.Argument(callback=paths.datastore, help="Folder of a datastore.")]
TEXTS = "Folder of texts, or a .txt, .md, .jsonl, .jsonl.gz or .parquet file."
Source = Annotated[Path, typer.Argument(callback=paths.source, help=TEXTS)]
Embedder = Annotated[str | None, typer.Option(help="Encoder that built the datastore; needed if it was a folder.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_INTERRUPTED = 130  # exit code, which typer gives to Ctrl-C
DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"retro-hf {version('retro-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command(rich_help_panel=DATASTORE, epilog="retro build notes/ -o store --tokenizer my-model")
def build(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", callback=paths.output, help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the language model: a folder or a Hub name.")],
    embedder: Annotated[str, typer.Option(help="Encoder of the chunks: a folder or a Hub name.")] = DEFAULT_EMBEDDER,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per chunk; the same as the model's.")] = 64,
    neighbor_size: Annotated[int, typer.Option(min=1, help="Tokens per neighbor: its chunk and what follows.")] = 128,
    index: Annotated[str, typer.Option(help="auto, by size, or a FAISS factory string such as Flat.")] = "auto",
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the two nearest neighbors to find; 1 is exact.")
    ] = 0.95,
    memory_budget: Annotated[str | None, typer.Option(help="Memory for the index in use, such as 4GB.")] = None,
    workers: Workers = 1,
) -> None:
    """Build a datastore, or go on with a build that was stopped."""
    from retro_hf import RetroDatastore

    _tell_sizes()
    store = RetroDatastore.build(
        source,
        output,
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=chunk_size,
        neighbor_size=neighbor_size,
        index=index,
        recall=recall,
        memory_budget=memory_budget,
        executor=workers,
    )
    typer.echo(f"{_size_of(store)} in {output}")


@app.command(rich_help_panel=DATASTORE, epilog="retro append store more.jsonl")
def append(store: Folder, source: Source, embedder: Embedder = None, workers: Workers = 1) -> None:
    """Add documents; nothing that is there is computed again."""
    from retro_hf import ChunkEmbedder

    _tell_sizes()
    opened = _load_datastore(store)
    before = opened.num_documents
    opened.append(source, embedder=ChunkEmbedder.of_datastore(opened.manifest.embedder, embedder), executor=workers)
    typer.echo(f"{_size_of(opened)} in {store}; documents added: {opened.num_documents - before:,}")


@app.command(rich_help_panel=DATASTORE, epilog="retro delete store doc-7 doc-9")
def delete(store: Folder, ids: Annotated[list[str], typer.Argument(help="Ids, as search shows them.")]) -> None:
    """Never return documents again; compact removes them from the disk."""
    _load_datastore(store).delete(ids)
    typer.echo(f"documents deleted from {store}: {len(ids):,}; `retro compact {store}` removes them from the disk")


@app.command(rich_help_panel=DATASTORE, epilog="retro compact store")
def compact(store: Folder) -> None:
    """Rewrite a datastore without what was deleted, as one shard."""
    opened = _load_datastore(store)
    opened.compact()
    typer.echo(f"{_size_of(opened)} in {store}")


@app.command(rich_help_panel=DATASTORE, epilog="retro push store me/my-store")
def push(
    store: Folder,
    repo: Annotated[str, typer.Argument(help="Dataset repository, such as me/my-store; made if it isn't there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it isn't there.")] = None,
) -> None:
    """Upload a datastore to the Hub, with a card, as one commit."""
    commit = _load_datastore(store).push_to_hub(repo, private=private or None, revision=revision)
    typer.echo(f"{commit.repo_url}, commit {commit.oid}")


@app.command(rich_help_panel=DATASTORE, epilog='retro search store "frogs came up" -k 3')
def search(
    store: Annotated[str, typer.Argument(help=STORE)],
    query: Annotated[str, typer.Argument(help="Text to look up.")],
    num_neighbors: Annotated[int, typer.Option("-k", min=1, help="How many neighbors.")] = 2,
    embedder: Embedder = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Search by words instead of vectors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the nearest neighbors of a text."""
    if not query.strip():
        raise ValueError("The query is empty; give at least one word to look up.")
    if bm25:
        from retro_hf import RetroDatastore, RetroRetriever
        from retro_hf.datastore import LexicalSearcher

        datastore = RetroDatastore.from_pretrained(store)
        retriever = RetroRetriever(datastore, searcher=LexicalSearcher.build(datastore))
    else:
        retriever = _open_retriever(store, embedder)
    found = retriever.find(_readable(query), num_neighbors=num_neighbors)[0]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(neighbor) for neighbor in found], ensure_ascii=False))
        return
    if not found:
        gone = retriever.datastore.num_deleted_documents == retriever.datastore.num_documents
        reason = f"all documents of {store} have been deleted" if gone else "no chunk has a word of the query"
        typer.echo(f"Nothing was found: {reason}.")
    for neighbor in found:
        typer.echo(f"{neighbor.score:.3f}  {_harmless(neighbor.document_id)}  {_harmless(neighbor.title)}")
        typer.echo(f"    {_harmless(neighbor.text)}\n  → {_harmless(neighbor.continuation)}\n")


@app.command(rich_help_panel=DATASTORE, epilog="retro inspect store --verify")
def inspect(
    store: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksum of every file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a datastore is made of."""
    opened = _load_datastore(store)
    if verify:
        opened.verify()
    manifest = opened.manifest
    if as_json:
        counts = {name: getattr(opened, name) for name in ("num_documents", "num_chunks", "num_tokens")}
        typer.echo(json.dumps(counts | dataclasses.asdict(manifest), ensure_ascii=False))
        return
    tokenizer, embedder = manifest.tokenizer, manifest.embedder
    lines = {
        "documents": f"{opened.num_documents:,}, of which deleted: {opened.num_deleted_documents:,}; left out as empty: "
        f"{manifest.num_empty_documents:,}",
        "chunks": f"{opened.num_chunks:,} of up to {manifest.chunk_size} tokens; a neighbor has up to {manifest.neighbor_size}",
        "tokens": f"{opened.num_tokens:,} ({manifest.token_dtype})",
        "tokenizer": f"{tokenizer['name']}, vocabulary {tokenizer['vocab_size']:,}, fingerprint {tokenizer['fingerprint'][:12]}",
        "embedder": f"{embedder['name']}, {embedder['dim']} numbers per key, {embedder['pooling']} pooling, "
        f"{embedder['dtype']}, fingerprint {embedder['fingerprint'][:12]}",
        "index": _first([_index_of(shard) for shard in manifest.shards]),
        "sources": _first([" ".join(one.values()) for one in manifest.sources]) or "not known",
        "version": f"generation {manifest.generation}, format {manifest.format_version}, retro-hf {manifest.library_version}",
    }
    for name, value in lines.items():
        typer.echo(f"{name:<10} {_harmless(value)}")
    for file in manifest.files:
        typer.echo(f"  {file.size / 1e6:>12,.2f} MB  {file.name}")
    typer.echo("all checksums match" if verify else "sizes match; --verify checks the content, too")


@app.command(rich_help_panel=MODEL, epilog='retro generate model "In the beginning" --store store')
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a RETRO model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    store: Annotated[str | None, typer.Option(help=f"{STORE} Without one, retrieval is off.")] = None,
    embedder: Embedder = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
) -> None:
    """Continue a text, with a datastore to read or without."""
    from retro_hf.datastore.compatibility import load_tokenizer

    tokenizer = load_tokenizer(model)
    retriever = None if store is None else _open_retriever(store, embedder, tokenizer)
    inputs = tokenizer(_readable(prompt), return_tensors="pt", return_token_type_ids=False)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError("The prompt is empty; give at least one word to continue.")
    options = {"retriever": retriever, "max_new_tokens": max_new_tokens, "do_sample": False}
    output = _load_model(model).generate(**inputs, **options)
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))


@app.command(rich_help_panel=MODEL, epilog="retro retrofit org/base -o my-retro")
def retrofit(
    base: Annotated[str, typer.Argument(help="Folder or Hub name of a decoder-only model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 64,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Save only what is added.")] = False,
) -> None:
    """Add retrieval to a decoder-only checkpoint, which then needs training."""
    from retro_hf import retrofit as add_retrieval
    from retro_hf.datastore.compatibility import load_tokenizer
    from retro_hf.retrofit import parameter_report

    model = add_retrieval(base, chunk_size=chunk_size)
    tokenizer = load_tokenizer(base)
    model.save_pretrained(output, save_backbone=not adapter_only)
    tokenizer.save_pretrained(output)
    typer.echo(parameter_report(model))


app.command(rich_help_panel=MODEL, epilog="retro evaluate model heldout.jsonl --store store -o results")(evaluate)


def _tell_sizes() -> None:
    """Show what the library says before long work: sizes, times, and without a terminal each stage."""
    logger = logging.getLogger("retro_hf")
    logger.setLevel(logging.INFO)
    if not logger.handlers:  # Python shows nothing below a warning by itself
        logger.addHandler(logging.StreamHandler())


def _size_of(datastore: Any) -> str:
    from retro_hf.errors import counted

    return f"{counted(datastore.num_documents, 'document')}, {counted(datastore.num_chunks, 'chunk')}"


def _index_of(shard: Any) -> str:
    recall = shard.index["recall"]
    measured = (
        ""
        if recall is None
        else (
            f", recall {recall['value']:.3f} (of {recall['at']}, measured with {recall['queries']:,} of its own chunks as queries)"
        )
    )
    return f"shard {shard.name}: {shard.num_chunks:,} chunks, {shard.index['factory']}{measured}"


def _readable(argument: str) -> str:
    """The argument with U+FFFD for bytes that are not UTF-8, which Python keeps as half characters no tokenizer takes."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _first(texts: list[str]) -> str:
    """The first five of them, and how many more there are."""
    more = [f"and {len(texts) - 5:,} more (all with --json)"] if len(texts) > 5 else []
    return "; ".join([*texts[:5], *more])


def _harmless(text: str) -> str:
    """The text in one line, its control characters written out, which could move the cursor or colour the terminal."""
    text = text.replace("\n", "⏎")
    return "".join(repr(letter)[1:-1] if unicodedata.category(letter) == "Cc" else letter for letter in text)


def _load_model(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from retro_hf.errors import PretrainedNotFoundError  # the package registers the model

    try:
        family = AutoConfig.from_pretrained(name).model_type
        if family == "retro":
            return AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PretrainedNotFoundError.for_name("model", name, error) from error
    raise ValueError(
        f"'{name}' is a model of the family '{family}', not a RETRO model. Make one of it with `retro retrofit`, if it is a "
        "decoder-only language model, and train that."
    )


def _load_datastore(folder: Path) -> Any:
    from retro_hf import RetroDatastore

    return RetroDatastore.load(folder)


def _open_retriever(store: str, embedder: str | None, tokenizer: Any = None) -> Any:
    from retro_hf import RetroRetriever

    return RetroRetriever.from_pretrained(store, embedder=embedder, tokenizer=tokenizer)


def main() -> None:
    """Run the `retro` command; an error that can be explained is one line on stderr, exit code 1; after Ctrl-C it is 130."""
    if not sys.stderr.isatty():
        # The switch of transformers and the Hub's client, whose bars would fill a log.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            typer.echo(
                "Interrupted. A datastore is as it was before or as it was to become, never in between; the same `retro build` or "
                "`retro evaluate -o` goes on where it was.",
                err=True,
            )
        raise
    except Exception as error:
        package = sys.modules.get("retro_hf.errors")
        explained = (ValueError, OSError, RuntimeError, ImportError, *([package.RetroError] if package else ()))
        if "--debug" in sys.argv or not isinstance(error, explained):
            raise
        message = str(error)
        if (
            "retro_hf" in sys.modules
        ):  # otherwise the error is the command line's own, and the package takes seconds to load
            from retro_hf.errors import in_commands

            message = in_commands(message, typer.main.get_command(app))
        typer.echo(f"Error: {message}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
