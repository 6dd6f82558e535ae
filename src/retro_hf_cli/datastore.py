"""The commands of a datastore: build, append, sync, delete, compact, search and inspect."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from . import paths
from .options import (
    DEFAULT_EMBEDDER,
    AsJson,
    Embedder,
    Encoding,
    Folder,
    MinScore,
    Source,
    Split,
    StoreName,
    Workers,
    open_retriever,
    readable,
    tell_progress,
)
from .output import one_line, say, say_json, say_neighbor


commands = typer.Typer()


@commands.command(rich_help_panel="Datastore", epilog="retro build notes/ -o store --tokenizer my-model")
def build(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", callback=paths.output, help="The folder to write.")],
    tokenizer: Annotated[
        str,
        typer.Option(callback=paths.tokenizer, help="The tokenizer of the language model: a folder or a Hub name."),
    ],
    embedder: Annotated[
        str, typer.Option(callback=paths.embedder, help="The encoder that makes the keys: a folder or a Hub name.")
    ] = DEFAULT_EMBEDDER,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per chunk. It must be the model's.")] = 64,
    neighbor_size: Annotated[
        int, typer.Option(min=1, help="Tokens per neighbor: the chunk and the text after it.")
    ] = 128,
    index: Annotated[
        str, typer.Option(help="auto (chosen by size), or a FAISS factory string such as Flat.")
    ] = "auto",
    recall: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the two nearest neighbors that a search should find. 1 is exact."),
    ] = 0.95,
    memory_budget: Annotated[
        str | None, typer.Option(help="Largest memory of the index during search, such as 4GB.")
    ] = None,
    workers: Workers = 1,
    encoding: Encoding = None,
    split: Split = None,
) -> None:
    """Build a datastore, or resume a build that was stopped."""
    from retro_hf import RetroDatastore
    from retro_hf.datastore import IndexOptions

    tell_progress()
    store = RetroDatastore.build(
        source,
        output,
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=chunk_size,
        neighbor_size=neighbor_size,
        index=IndexOptions(index, recall, memory_budget),
        executor=workers,
        encoding=encoding,
        split=split,
    )
    say(f"{_size_of(store)} in {output}")


@commands.command(rich_help_panel="Datastore", epilog="retro append store more.jsonl")
def append(
    store: Folder,
    source: Source,
    embedder: Embedder = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace documents that have the same id.")] = False,
    workers: Workers = 1,
    encoding: Encoding = None,
    split: Split = None,
) -> None:
    """Add documents. What is already stored is not computed again."""
    from retro_hf import ChunkEmbedder

    tell_progress()
    opened = _load_datastore(store)
    changes = opened.append(
        source,
        replace=replace,
        embedder=ChunkEmbedder.of_datastore(opened.manifest.embedder, embedder),
        executor=workers,
        encoding=encoding,
        split=split,
    )
    replaced = f", replaced: {len(changes.changed):,}, unchanged: {changes.num_unchanged:,}" if replace else ""
    say(f"{_size_of(opened)} in {store}; documents added: {len(changes.new):,}{replaced}")


@commands.command(rich_help_panel="Datastore", epilog="retro sync notes/ store --dry-run")
def sync(
    source: Source,
    store: Folder,
    embedder: Embedder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    workers: Workers = 1,
    encoding: Encoding = None,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """Make a datastore equal to a folder: add new documents, replace changed ones, delete missing ones, in one step.

    Pass the path, --encoding and --split that the datastore was built with. Only new and changed documents are embedded.
    """
    from retro_hf import ChunkEmbedder

    opened = _load_datastore(store)
    changes = opened.compare(source, encoding=encoding, split=split)
    if not as_json:
        say(changes)
    if changes and not dry_run:
        tell_progress()
        changes = opened.sync(
            source,
            embedder=ChunkEmbedder.of_datastore(opened.manifest.embedder, embedder),
            executor=workers,
            encoding=encoding,
            split=split,
        )
    if as_json:
        say_json(dataclasses.asdict(changes) | {"dry_run": dry_run, "generation": opened.generation})
    elif dry_run:
        say("Nothing was changed (--dry-run).")
    else:
        say(f"{_size_of(opened)} in {store}")


@commands.command(rich_help_panel="Datastore", epilog="retro delete store doc-7 doc-9")
def delete(
    store: Folder, ids: Annotated[list[str], typer.Argument(help="Ids of documents, as `retro search` shows them.")]
) -> None:
    """Delete documents: they are not found any more. `retro compact` removes them from the disk.

    `retro sync` adds a deleted document again if its file is still in the folder.
    """
    _load_datastore(store).delete(ids)
    say(f"documents deleted from {store}: {len(ids):,}; `retro compact {store}` removes them from the disk")


@commands.command(rich_help_panel="Datastore", epilog="retro compact store")
def compact(store: Folder) -> None:
    """Rewrite a datastore as one shard, without the deleted documents."""
    opened = _load_datastore(store)
    opened.compact()
    say(f"{_size_of(opened)} in {store}")


@commands.command(rich_help_panel="Datastore", epilog='retro search store "frogs came up" -k 3')
def search(
    store: StoreName,
    query: Annotated[str, typer.Argument(help="The text to look up.")],
    num_neighbors: Annotated[int, typer.Option("-k", min=1, help="Number of passages to show.")] = 2,
    embedder: Embedder = None,
    min_score: MinScore = None,
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
        retriever = RetroRetriever(datastore, searcher=LexicalSearcher.build(datastore), min_score=min_score)
    else:
        retriever = open_retriever(store, embedder, min_score=min_score)
    found = retriever.find(readable(query), num_neighbors=num_neighbors)[0]
    if as_json:
        say_json([dataclasses.asdict(neighbor) for neighbor in found])
        return
    if not found:
        if retriever.datastore.num_deleted_documents == retriever.datastore.num_documents:
            reason = f"all documents of {store} have been deleted"
        elif retriever.min_score is not None:
            reason = f"no chunk has a score of {retriever.min_score:g} or more (--min-score)"
        elif not any(getattr(retriever.searcher, "words", list)([query])):
            reason = "the query has no word of two letters or digits"
        else:
            reason = "no chunk has a word of the query"
        say(f"Nothing was found: {reason}.")
    for neighbor in found:
        say_neighbor(neighbor)
        say()


@commands.command(rich_help_panel="Datastore", epilog="retro inspect store --verify")
def inspect(
    store: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check the checksum of every file.")] = False,
    embedder: Annotated[
        str | None,
        typer.Option(
            callback=paths.embedder,
            help="The encoder that built the datastore. With it, also check what it cuts off or does not know.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the contents of a datastore, and what its keys miss; with --embedder, also what the encoder cuts off."""
    from retro_hf import ChunkEmbedder

    opened = _load_datastore(store)
    if verify:
        opened.verify()
    manifest = opened.manifest
    seen = opened.coverage(embedder and ChunkEmbedder.of_datastore(manifest.embedder, embedder))
    if as_json:
        counts = {name: getattr(opened, name) for name in ("num_documents", "num_chunks", "num_tokens")}
        say_json(counts | dataclasses.asdict(manifest) | {"coverage": dataclasses.asdict(seen)})
        return
    tokenizer, encoder = manifest.tokenizer, manifest.embedder
    lines = {
        "documents": f"{opened.num_documents:,}, of which deleted: {opened.num_deleted_documents:,}; left out as empty: "
        f"{manifest.num_empty_documents:,}",
        "chunks": f"{opened.num_chunks:,} of up to {manifest.chunk_size} tokens; a neighbor has up to {manifest.neighbor_size}",
        "tokens": f"{opened.num_tokens:,} ({manifest.token_dtype})",
        "tokenizer": f"{tokenizer['name']}, vocabulary {tokenizer['vocab_size']:,}, fingerprint {tokenizer['fingerprint'][:12]}",
        "embedder": f"{encoder['name']}, {encoder['dim']} numbers per key, {encoder['pooling']} pooling, "
        f"{encoder['dtype']}, fingerprint {encoder['fingerprint'][:12]}",
        "keys": f"{seen}{'' if embedder else '; --embedder checks what the encoder cuts off and does not know, too'}",
        "index": _first([_index_of(shard) for shard in manifest.shards]),
        "sources": _first([" ".join(one.values()) for one in manifest.sources]) or "not known",
        "version": f"generation {manifest.generation}, format {manifest.format_version}, retro-hf {manifest.library_version}",
    }
    for name, value in lines.items():
        say(f"{name:<10} {one_line(value)}")
    for file in manifest.files:
        say(f"  {file.size / 1e6:>12,.2f} MB  {file.name}")
    say("all checksums match" if verify else "sizes match; --verify checks the content, too")


def _load_datastore(folder: Path) -> Any:
    from retro_hf import RetroDatastore

    return RetroDatastore.load(folder)


def _size_of(datastore: Any) -> str:
    from retro_hf.errors import counted

    kept = datastore.num_documents - datastore.num_deleted_documents
    gone = datastore.num_documents - kept
    deleted = f", with those of {counted(gone, 'deleted document')}, which `retro compact` removes" if gone else ""
    return f"{counted(kept, 'document')}, {counted(datastore.num_chunks, 'chunk')}{deleted}"


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


def _first(texts: list[str]) -> str:
    """The first five of them, and how many more there are."""
    more = [f"and {len(texts) - 5:,} more (all with --json)"] if len(texts) > 5 else []
    return "; ".join([*texts[:5], *more])
