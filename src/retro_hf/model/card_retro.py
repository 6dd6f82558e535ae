# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The card of a model that is uploaded: what it is made of, how to load it, and what nobody has measured."""

import json
import os

from .configuration_retro import RetroConfig


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

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
retriever = {package}.RetroRetriever.from_pretrained("{store_name}", tokenizer=tokenizer)
print({package}.answer(model, retriever, "What does the datastore say?"))
```

{remote}

## What it is worth

No numbers were given. `retro evaluate {repo_id} heldout.jsonl --store {store_name}` measures bits per byte with
retrieval on, off and random, with intervals.

## Limits

It reads a datastore of its own tokenizer and of chunks of {chunk_size} tokens only. What it reads, it may repeat: an answer can be as
wrong as a passage, and texts of the datastore keep their licences. Where the datastore says nothing on the matter, retrieval brings
nothing.
"""
_READING = {
    "cross_attention": "a neighbor encoder and chunked cross-attention in layers {layers} (counted from 0), which are to be trained",
    "parallel_context": "the base reads neighbors beside its text; no weights are added",
}
_WITH_CODE = """Without the package, for the model alone: `AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)` runs the
code of this repository."""
_WITHOUT_CODE = """The package is needed. `RetroForCausalLM.register_for_auto_class("AutoModelForCausalLM")` before the upload puts the model's code into
the repository, which `trust_remote_code=True` then runs without it."""


def write_card(folder: str | os.PathLike, repo_id: str, config: RetroConfig) -> None:
    """Put a card in the place of the placeholder that transformers has written; a card that anybody wrote stays.

    Args:
        folder (`str` or `os.PathLike`): what is to be uploaded.
        repo_id (`str`): its repository.
        config ([`RetroConfig`]): as it is uploaded, without paths of this machine.
    """
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        if _PLACEHOLDER not in file.read():
            return
    with open(path, "w", encoding="utf-8") as file:
        file.write(card_text(repo_id, config))


def card_text(repo_id: str, config: RetroConfig) -> str:
    """The card of a model."""
    base, store = config.backbone_name_or_path, config.retriever_name_or_path
    revision = f", revision `{config.backbone_revision}`" if base and config.backbone_revision else ""
    data = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["retro", "retrieval"]}
    data |= {"base_model": base} if base else {}
    data |= {"datasets": [store]} if store else {}
    layers = ", ".join(map(str, config.cross_attention_layers or []))
    adds = (
        "what is added to the base" if config.reader == "cross_attention" else "none; the base is loaded by its name"
    )
    frozen = "Without a datastore it is its base." if config.freeze_backbone else ""
    return _CARD.format(
        data="\n".join(f"{name}: {json.dumps(value)}" for name, value in data.items()),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        package="retro_hf",  # which these files never import
        off=frozen,
        base=f"`{base}`{revision}"
        if base
        else f"a `{config.get_text_config(decoder=True).model_type}` model without a name on the Hub",
        reader=config.reader,
        reading=_READING[config.reader].format(layers=layers),
        chunk_size=config.chunk_size,
        neighbor_size=config.neighbor_size,
        num_neighbors=config.num_neighbors,
        weights="the whole model" if config.save_backbone else adds,
        store=f"`{store}`, which it was made with" if store else "any; none was named",
        store_name=store or "me/my-store",
        remote=(_WITH_CODE if config.auto_map else _WITHOUT_CODE).format(repo_id=repo_id),
    )


__all__ = ["card_text", "write_card"]
