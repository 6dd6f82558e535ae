"""The commands of a model: retrofit and generate."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import paths
from .options import STORE, Base, Embedder, MinScore, Model, open_retriever, readable
from .output import one_line, say, say_neighbor


commands = typer.Typer()


@commands.command(rich_help_panel="Model", epilog='retro generate model "In the beginning" --store store')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    store: Annotated[
        str | None, typer.Option(callback=paths.store, help=f"{STORE} Without one, retrieval is off.")
    ] = None,
    embedder: Embedder = None,
    min_score: MinScore = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 64,
    query: Annotated[str | None, typer.Option(help="The text to look up instead of the prompt.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time went, at the end.")] = False,
    base: Base = None,
) -> None:
    """Continue a text, with or without a datastore, and show the passages that were read."""
    check_alone(model, store)
    tokenizer = tokenizer_of(model, base)
    retriever = None if store is None else open_retriever(store, embedder, tokenizer, min_score)
    inputs = tokenizer(readable(prompt), return_tensors="pt", return_token_type_ids=False)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError("The prompt is empty; give at least one word to continue.")
    options: dict[str, Any] = {"retriever": retriever, "max_new_tokens": max_new_tokens, "do_sample": False}
    if query is not None:
        options["query"] = readable(query)
    reader = load_reader(model, retriever, base)
    with _profiled(reader) if profile else nullcontext() as spent:
        output = reader.generate(**inputs.to(reader.device), return_dict_in_generate=True, **options)
    say(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    if retriever is not None:
        _show_read(output.retrieval_trace[0], tokenizer)
    if spent is not None:
        say(f"\n{spent}")


def _profiled(model: Any) -> Any:
    from retro_hf.evaluation import profile

    return profile(model)


def _show_read(trace: list[dict[str, Any]], tokenizer: Any) -> None:
    """Show what was looked up, and what was found for it."""
    if not any(entry["neighbors"] for entry in trace):
        say("\nNothing was read: no neighbor was found.")
        return
    for entry in trace:
        query = entry.get("query") or tokenizer.decode(entry["chunk_input_ids"], skip_special_tokens=True)
        say(f"\nLooked up: {one_line(query)}")
        for neighbor in entry["neighbors"]:
            say_neighbor(neighbor, indent="  ")
        if not entry["neighbors"]:
            say("  nothing was found")


@commands.command(rich_help_panel="Model", epilog="retro retrofit org/base -o my-retro")
def retrofit(
    base: Annotated[str, typer.Argument(callback=paths.model, help="Folder or Hub name of a decoder-only model.")],
    output: Annotated[Path, typer.Option("--output", "-o", callback=paths.folder, help="The folder to write.")],
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 64,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Save only the added weights, and the name of the base.")
    ] = False,
) -> None:
    """Add the paper's reader to a decoder-only checkpoint. It then needs training."""
    from retro_hf import retrofit as add_retrieval
    from retro_hf.datastore.compatibility import load_tokenizer
    from retro_hf.retrofit import parameter_report

    model = add_retrieval(base, chunk_size=chunk_size)
    tokenizer = load_tokenizer(base)
    model.save_pretrained(output, save_backbone=not adapter_only)
    tokenizer.save_pretrained(output)
    say(parameter_report(model))


def open_model(
    name: str,
    store: str | None,
    embedder: str | None,
    num_neighbors: int | None = None,
    dtype: str = "auto",
    min_score: float | None = None,
    base: str | None = None,
) -> tuple[Any, Any, Any]:
    """A model on the best device, its tokenizer, and the retriever of its store, which is None without a store.

    Raises:
        ValueError: for a model without retrieval if there is no store.
        DatastoreMismatchError: if the store belongs to another tokenizer or chunk size.
    """
    import torch

    tokenizer = tokenizer_of(name, base)
    retriever = None if store is None else open_retriever(store, embedder, tokenizer, min_score)
    if retriever is not None and num_neighbors is not None:
        retriever.num_neighbors = num_neighbors
    model = load_reader(name, retriever, base)
    if retriever is not None:
        retriever.datastore.check_compatible(tokenizer=tokenizer, chunk_size=model.config.chunk_size)
    if dtype != "auto":
        model.to(getattr(torch, dtype))
    return model.eval(), tokenizer, retriever


def tokenizer_of(name: str, base: str | None = None) -> Any:
    """The tokenizer of a model. If its folder has none, as after `model.save_pretrained`, it is that of its base.

    Raises:
        PretrainedNotFoundError: if there is none in either place.
    """
    from retro_hf.datastore.compatibility import load_tokenizer
    from retro_hf.errors import PretrainedNotFoundError

    try:
        return load_tokenizer(name)
    except PretrainedNotFoundError:
        config = _config_of(name, base)
        if config.model_type == "retro":
            _check_base(name, config)
        if getattr(config, "backbone_name_or_path", None) is None:
            raise
        return load_tokenizer(config.backbone_name_or_path)


def load_reader(name: str, retriever: Any, base: str | None = None) -> Any:
    """A RETRO model, or with a retriever a model of another family that reads in parallel context; on the best device.

    Raises:
        PretrainedNotFoundError: if there is no such model.
        UnsupportedBackboneError: for a model that cannot read.
        ValueError: for a model of another family without a retriever.
    """
    import torch

    from retro_hf import retrofit

    family = _config_of(name, base).model_type
    if retriever is None:
        _check_reads(name, family)
    if base is not None or family == "retro":
        model = load_model(name, base)
    else:
        sizes = {"chunk_size": retriever.chunk_size, "neighbor_size": retriever.neighbor_size}
        model = retrofit(name, reader="parallel_context", **sizes)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_alone(name: str, store: str | None) -> None:
    """Check that a model needs no store if it gets none, as far as its folder tells without loading anything."""
    family = paths.family(name)
    if store is None and family is not None:
        _check_reads(name, family)


def _check_reads(name: str, family: str) -> None:
    if family != "retro":
        raise ValueError(
            f"'{name}' is a model of the family '{family}', not a RETRO model. If it is a decoder-only language model, it can "
            "read a datastore without training: add `--store`. For the paper's reader, make a RETRO model of it with `retro "
            "fit`, or with `retro retrofit` and training of your own."
        )


def load_model(name: str, base: str | None = None) -> Any:
    """A RETRO model, from a folder or the Hub; `base` is the folder of an adapter's base.

    Raises:
        PretrainedNotFoundError: if there is no such model.
        ValueError: for a model of another family.
    """
    from transformers import AutoModelForCausalLM

    from retro_hf.datastore.compatibility import loading

    config = _config_of(name, base)
    if (family := config.model_type) != "retro":
        raise ValueError(
            f"'{name}' is a model of the family '{family}', not a RETRO model. Make one of it with `retro fit`, or with `retro "
            "retrofit` and training of your own."
        )
    _check_base(name, config)
    with loading("model", name):
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **_given(base))


def _check_base(name: str, config: Any) -> None:
    if not config.save_backbone and config.backbone_name_or_path is None:
        raise ValueError(
            f"'{name}' holds only what RETRO adds to a base in a folder, which it does not name. Say where that is: `--base FOLDER`."
        )


def _config_of(name: str, base: str | None) -> Any:
    from transformers import AutoConfig

    from retro_hf.datastore.compatibility import loading  # the package registers the family "retro"

    with loading("model", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **_given(base))


def _given(base: str | None) -> dict[str, str]:
    return {} if base is None else {"backbone_name_or_path": base}
