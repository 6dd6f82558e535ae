# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The card of a model that is uploaded: what it is made of, how to load it, and what was measured."""

import json
import os
from collections.abc import Mapping
from typing import Any

from .configuration_retro import RetroConfig
from .names_retro import check_folder_name
from .readers_retro import traits_of


# What transformers writes into the card that it makes for any model.
_PLACEHOLDER = "This model card has been automatically generated."

_CARD = """---
{data}
---

# {name}

A language model that looks up passages in a datastore every {chunk_size} tokens and reads them while it writes
([RETRO](https://arxiv.org/abs/2112.04426), made with [retro-hf](https://github.com/retro-hf/retro-hf)). {off}

| | |
|---|---|
| base | {base} |
| reader | `{reader}`: {reading} |
| chunks | {chunk_size} tokens; a neighbor has up to {neighbor_size} tokens, and a chunk {num_neighbors} neighbors |
| weights here | {weights} |
| datastore | {store} |

## Load it

```python
import {package}  # pip install retro-hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}"{where})
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
retriever = {package}.RetroRetriever.from_pretrained("{store_name}", tokenizer=tokenizer)
print({package}.answer(model, retriever, "What does the datastore say?"))
```

{named}{remote}

## What it is worth

{worth}

{more}## Limits

It reads a datastore of its own tokenizer and of chunks of {chunk_size} tokens only. What it reads, it may repeat: an answer can be as
wrong as a passage, and texts of the datastore keep their licenses. Where the datastore says nothing on the matter, retrieval brings
nothing.
"""
_NAMED = """`from_pretrained("{repo_id}", retriever="config")` opens that datastore by itself, and so does
`pipeline("text-generation", model="{repo_id}", model_kwargs={{"retriever": "config"}})`.

"""
_NO_NUMBERS = """No numbers were given. `retro evaluate {repo_id} heldout.jsonl --store {store_name}` measures bits per byte with
retrieval on, off and random, with intervals."""
_NUMBERS = """{verdict}

| reads | bits per byte | against off | 95 % interval |
|---|---|---|---|
{rows}

Scored: {num_documents:,} documents that are not in the datastore, {num_tokens:,} tokens. Datastore: {measured}. "Random" reads as many
random passages. "In the prompt" is the base without this reader, with the same passages before its text."""
_MODES = {"off": "nothing", "on": "its datastore", "random": "random passages", "in_context": "in the prompt"}
_WITH_CODE = """Without the package, for the model alone: `AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)` runs the
code of this repository."""
_WITHOUT_CODE = """The package is needed. `RetroForCausalLM.register_for_auto_class("AutoModelForCausalLM")` before the upload puts the model's code into
the repository, which `trust_remote_code=True` then runs without it."""


def read_evaluation(path: str | os.PathLike, config: RetroConfig) -> dict[str, Any]:
    """What `retro evaluate` has written.

    Args:
        path (`str` or `os.PathLike`): its folder, or the file `evaluation.json` in it.
        config ([`RetroConfig`]): of the model that was measured.
    Raises:
        ValueError: if the file is something else, or of a model with other chunks.
    """
    check_folder_name(path, what="evaluation")
    file = os.path.join(path, "evaluation.json") if os.path.isdir(path) else os.fspath(path)
    try:
        if not os.path.isfile(file):  # to read a pipe would wait
            raise FileNotFoundError("there is no such file")
        with open(file, encoding="utf-8") as opened:
            found = json.load(opened)
        sizes = {name: found["provenance"]["model"][name] for name in ("chunk_size", "neighbor_size")}
        _numbers(found, {})
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        StopIteration,
    ) as error:
        raise ValueError(
            f"'{file}' holds no evaluation ({type(error).__name__}: {error}). Pass the folder that `retro evaluate -o` wrote."
        ) from error
    for name, value in sizes.items():
        if value != getattr(config, name):
            raise ValueError(
                f"'{file}' is of a model with {name}={value}, but this one has {getattr(config, name)}. Pass its own evaluation."
            )
    return found


def write_card(
    folder: str | os.PathLike, repo_id: str, config: RetroConfig, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Put a card in the place of the placeholder that transformers has written; a card that anybody wrote stays.

    Args:
        folder (`str` or `os.PathLike`): what is to be uploaded.
        repo_id (`str`): its repository.
        config ([`RetroConfig`]): as it is uploaded, without paths of this machine.
        evaluation (`Mapping`, *optional*): from [`read_evaluation`].
    """
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        if _PLACEHOLDER not in file.read():
            return
    with open(path, "w", encoding="utf-8") as file:
        file.write(card_text(repo_id, config, evaluation))


def card_text(
    repo_id: str,
    config: RetroConfig,
    evaluation: Mapping[str, Any] | None = None,
    rivals: Mapping[str, Mapping[str, Any]] | None = None,
    more: str = "",
) -> str:
    """The card of a model.

    Args:
        repo_id, config, evaluation: as in [`write_card`].
        rivals (`Mapping`, *optional*): modes of other models on the same text, by what their rows are called.
        more (`str`): what else is to be said, after the numbers; a chapter or several.
    """
    base, store = config.backbone_name_or_path, config.retriever_name_or_path
    revision = f", revision `{config.backbone_revision}`" if base and config.backbone_revision else ""
    data = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["retro", "retrieval"]}
    data |= {"base_model": base} if base else {}
    data |= {"datasets": [store]} if store else {}
    layers = ", ".join(map(str, config.cross_attention_layers or []))
    reader = traits_of(config.reader)
    adds = "what is added to the base" if reader.has_weights else "none; the base is loaded by its name"
    frozen = "Without a datastore it is its base." if config.freeze_backbone else ""
    return _CARD.format(
        data="\n".join(f"{name}: {json.dumps(value)}" for name, value in data.items()),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        package="retro_hf",  # which these files never import
        off=frozen,
        where="" if base or config.save_backbone else ', backbone_name_or_path="path/of/its/base"',
        base=f"`{base}`{revision}"
        if base
        else f"a `{config.get_text_config(decoder=True).model_type}` model without a name on the Hub",
        reader=config.reader,
        reading=reader.sentence.format(layers=layers),
        chunk_size=config.chunk_size,
        neighbor_size=config.neighbor_size,
        num_neighbors=config.num_neighbors,
        weights="the whole model" if config.save_backbone else adds,
        store=f"`{store}`, which it was made with" if store else "any; none was named",
        store_name=store or "me/my-store",
        named=_NAMED.format(repo_id=repo_id) if store else "",
        worth=_NO_NUMBERS.format(repo_id=repo_id, store_name=store or "me/my-store")
        if evaluation is None
        else _numbers(evaluation, rivals or {}),
        more=more,
        remote=(_WITH_CODE if config.auto_map else _WITHOUT_CODE).format(repo_id=repo_id),
    )


def _numbers(evaluation: Mapping[str, Any], rivals: Mapping[str, Mapping[str, Any]]) -> str:
    """What an evaluation found, as a table."""
    off = next(mode["bits_per_byte"] for mode in evaluation["modes"] if mode["name"] == "off")
    modes = {_MODES.get(mode["name"], _cell(mode["name"])): mode for mode in evaluation["modes"]}
    rows = []
    for name, mode in {**modes, **rivals}.items():
        change = mode["difference"] or {"value": None, "low": None}
        shown = " | " if change["value"] is None else f"{change['value'] / off:+.1%} | "
        if change["low"] is not None:  # of one document there is no interval
            shown += f"{change['low'] / off:+.1%} to {change['high'] / off:+.1%}"
        rows.append(f"| {name} | {mode['bits_per_byte']:.4f} | {shown} |")
    measured, store = "none", evaluation["provenance"]["datastore"]
    if store is not None:
        licenses = ", ".join(map(_cell, store.get("licenses") or [])) or "not recorded"
        name = os.path.basename(os.path.normpath(store["name"]))  # the folders above it are of this machine
        measured = (
            f"`{_cell(name)}`, {store['num_documents']:,} documents in {store['num_chunks']:,} chunks, keys by "
            f"`{_cell(store['embedder'])}`; licenses of its texts: {licenses}"
        )
    inputs = evaluation["inputs"]
    return _NUMBERS.format(
        verdict=_cell(evaluation["verdict"]["text"]),
        rows="\n".join(rows),
        num_documents=inputs["num_documents"],
        num_tokens=inputs["num_tokens"],
        measured=measured,
    )


def _cell(text: Any) -> str:
    """Text on one line that opens no tag, no link and no other cell."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return shown.translate({ord(mark): f"\\{mark}" for mark in "|[]<"}).replace("`", "'")
