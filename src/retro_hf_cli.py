"""The `retro` command; beside the package so that `--help` waits for neither torch nor transformers."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    name="retro",
    help="RETRO for Hugging Face transformers: language models that read a datastore, chunk by chunk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DATASTORE, MODEL = "Datastore", "Model"
Embedder = Annotated[str | None, typer.Option(help="Frozen encoder: a folder or a Hub name.")]
Workers = Annotated[int, typer.Option(help="Processes that share the cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
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


@app.command(rich_help_panel=DATASTORE)
def build(
    source: Annotated[Path, typer.Argument(help="A folder of texts, or a .txt, .jsonl, .jsonl.gz or .parquet file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the language model: a folder or a Hub name.")],
    embedder: Annotated[str, typer.Option(help="Frozen encoder: a folder or a Hub name.")] = DEFAULT_EMBEDDER,
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk, as the model has it.")] = 64,
    neighbor_size: Annotated[int, typer.Option(help="Tokens per neighbor: its chunk and what follows.")] = 128,
    index: Annotated[str, typer.Option(help="A FAISS factory string, or auto.")] = "auto",
    recall: Annotated[
        float, typer.Option(help="Share of the two nearest neighbors to find; 1 is exact search.")
    ] = 0.95,
    memory_budget: Annotated[str | None, typer.Option(help="For the index when searched, such as 4GB.")] = None,
    workers: Workers = 1,
) -> None:
    """Build a datastore, or go on with a build that was stopped: retro build notes/ -o store --tokenizer my-model"""
    from retro_hf import ChunkEmbedder, RetroDatastore

    _tell_sizes()
    store = RetroDatastore.build(
        source,
        output,
        tokenizer=_load("tokenizer", tokenizer),
        embedder=ChunkEmbedder.from_pretrained(embedder),
        chunk_size=chunk_size,
        neighbor_size=neighbor_size,
        index=index,
        recall=recall,
        memory_budget=memory_budget,
        executor=workers,
        show_progress=True,
    )
    typer.echo(f"{store.num_documents:,} documents, {store.num_chunks:,} chunks in {output}")


@app.command(rich_help_panel=DATASTORE)
def append(
    store: Annotated[Path, typer.Argument(help="Folder of a datastore.")],
    source: Annotated[Path, typer.Argument(help="A folder of texts, or a .txt, .jsonl, .jsonl.gz or .parquet file.")],
    embedder: Embedder = None,
    workers: Workers = 1,
) -> None:
    """Add documents; nothing that is there is computed again: retro append store more.jsonl"""
    from retro_hf import RetroDatastore

    _tell_sizes()
    opened = RetroDatastore.load(store)
    before = opened.num_documents
    name = embedder or opened.manifest.embedder["name"]
    opened.append(source, embedder=name, executor=workers, show_progress=True)
    typer.echo(f"{opened.num_documents - before:,} documents added; {opened.num_chunks:,} chunks in {store}")


@app.command(rich_help_panel=DATASTORE)
def delete(
    store: Annotated[Path, typer.Argument(help="Folder of a datastore.")],
    ids: Annotated[list[str], typer.Argument(help="Ids of documents.")],
) -> None:
    """Never return documents again; compact removes them from the disk: retro delete store doc-7 doc-9"""
    from retro_hf import RetroDatastore

    RetroDatastore.load(store).delete(ids)
    typer.echo(f"{len(ids):,} documents deleted from {store}; `retro compact {store}` removes them from the disk")


@app.command(rich_help_panel=DATASTORE)
def compact(store: Annotated[Path, typer.Argument(help="Folder of a datastore.")]) -> None:
    """Rewrite a datastore without what was deleted, as one shard: retro compact store"""
    from retro_hf import RetroDatastore

    opened = RetroDatastore.load(store)
    opened.compact(show_progress=True)
    typer.echo(f"{opened.num_documents:,} documents, {opened.num_chunks:,} chunks in {store}")


@app.command(rich_help_panel=DATASTORE)
def search(
    store: Annotated[Path, typer.Argument(help="Folder of a datastore.")],
    query: Annotated[str, typer.Argument(help="Text to look up.")],
    num_neighbors: Annotated[int, typer.Option("-k", help="How many neighbors.")] = 2,
    embedder: Embedder = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Search by words instead of vectors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look a text up: retro search store "frogs came up" -k 3"""
    import dataclasses

    if not query.strip():
        raise ValueError("The query is empty; give at least one word to look up.")
    if bm25:
        from retro_hf import RetroDatastore, RetroRetriever
        from retro_hf.datastore import LexicalSearcher

        datastore = RetroDatastore.load(store)
        retriever = RetroRetriever(datastore, searcher=LexicalSearcher.build(datastore))
    else:
        retriever = _open_retriever(store, embedder)
    found = retriever.find(_readable(query), num_neighbors=num_neighbors)[0]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(neighbor) for neighbor in found], ensure_ascii=False))
        return
    for neighbor in found:
        typer.echo(f"{neighbor.score:.3f}  {neighbor.document_id}  {neighbor.title}")
        typer.echo(f"    {neighbor.text}\n  → {neighbor.continuation}\n")


@app.command(rich_help_panel=DATASTORE)
def inspect(
    store: Annotated[Path, typer.Argument(help="Folder of a datastore.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksum of every file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a datastore is made of: retro inspect store --verify"""
    import dataclasses

    from retro_hf import RetroDatastore

    opened = RetroDatastore.load(store, verify=verify).manifest
    counts = {name: getattr(opened, name) for name in ("num_documents", "num_chunks", "num_tokens")}
    manifest = counts | dataclasses.asdict(opened)
    if as_json:
        typer.echo(json.dumps(manifest, ensure_ascii=False))
        return
    files = manifest.pop("files")
    for name, value in manifest.items():
        typer.echo(f"{name:<20} {value}")
    for file in files:
        typer.echo(f"  {file['size'] / 1e6:>10.2f} MB  {file['name']}")
    typer.echo("all checksums match" if verify else "sizes match; --verify checks the content, too")


@app.command(rich_help_panel=MODEL)
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a RETRO model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    store: Annotated[Path | None, typer.Option(help="Folder of a datastore; without one, retrieval is off.")] = None,
    embedder: Embedder = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
) -> None:
    """Continue a text, with retrieval: retro generate model "In the beginning" --store store"""
    tokenizer = _load("tokenizer", model)
    retriever = None if store is None else _open_retriever(store, embedder, tokenizer)
    inputs = tokenizer(_readable(prompt), return_tensors="pt", return_token_type_ids=False)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError("The prompt is empty; give at least one word to continue.")
    output = _load("model", model).generate(
        **inputs, retriever=retriever, max_new_tokens=max_new_tokens, do_sample=False
    )
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))


@app.command(rich_help_panel=MODEL)
def retrofit(
    base: Annotated[str, typer.Argument(help="Folder or Hub name of a decoder-only model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 64,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Save only what is added.")] = False,
) -> None:
    """Add retrieval to a checkpoint: retro retrofit org/base -o my-retro"""
    from retro_hf import retrofit as add_retrieval
    from retro_hf.retrofit import parameter_report

    model = add_retrieval(base, chunk_size=chunk_size)
    tokenizer = _load("tokenizer", base)
    model.save_pretrained(output, save_backbone=not adapter_only)
    tokenizer.save_pretrained(output)
    typer.echo(parameter_report(model))


@app.command("eval", rich_help_panel=MODEL)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a RETRO model.")],
    texts: Annotated[
        Path, typer.Argument(help="Held-out documents, as for build: a folder, or a file such as .jsonl.")
    ],
    store: Annotated[Path, typer.Option(help="Folder of a datastore.")],
    embedder: Embedder = None,
    as_json: AsJson = False,
) -> None:
    """Bits per byte with retrieval on, off and random: retro eval model heldout.jsonl --store store"""
    from retro_hf.datastore.documents import DocumentReader
    from retro_hf.evaluation import bits_per_byte

    documents = [{"id": document.id, "text": document.text} for document in DocumentReader(texts)]
    result = bits_per_byte(
        _load("model", model),
        documents,
        _load("tokenizer", model),
        retriever=_open_retriever(store, embedder),
    )
    typer.echo(json.dumps(result.to_dict()) if as_json else str(result))


def _tell_sizes() -> None:
    """Show what the library says before long work."""
    from transformers.utils import logging

    logging.get_logger("retro_hf").setLevel(logging.INFO)


def _readable(argument: str) -> str:
    """The argument with U+FFFD for bytes that are not UTF-8, which Python keeps as half characters no tokenizer takes."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _load(what: str, name: str) -> Any:
    """The "model" or "tokenizer" called `name`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from retro_hf.errors import PretrainedNotFoundError  # the package registers the model

    try:
        if what == "tokenizer":
            return AutoTokenizer.from_pretrained(name)
        family = AutoConfig.from_pretrained(name).model_type
        if family == "retro":
            return AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PretrainedNotFoundError.for_name(what, name, error) from error
    raise ValueError(
        f"'{name}' is a model of the family '{family}', not a RETRO model. Make one of it with `retro retrofit`, if it is a "
        "decoder-only language model, and train that."
    )


def _open_retriever(store: Path, embedder: str | None, tokenizer: Any = None) -> Any:
    from retro_hf import RetroRetriever

    return RetroRetriever.from_pretrained(store, embedder=embedder, tokenizer=tokenizer)


def main() -> None:
    """Run the `retro` command; an error that can be explained is one line on stderr, exit code 1."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
