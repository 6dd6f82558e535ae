"""What a fit leaves: the adapter with its card, what was measured, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datastore.atomic_files import write_file
from ..evaluation.interval import Interval
from ..evaluation.result import Evaluation, Mode


_CARD = """---
{data}
---

# {name}

A reader for `{base}`, which stays as it is: with it the base looks up passages in a datastore every {chunk_size} tokens and reads them
while it writes ([RETRO](https://arxiv.org/abs/2112.04426), made with [retro-hf](https://github.com/retro-hf/retro-hf)). Without a
datastore the model is the base.

## What it is worth

{verdict}

| who reads | bits per byte | against off | 95 % interval |
|---|---|---|---|
{rows}

{scored} The passages are the same in every row, {num_neighbors} for each chunk of {chunk_size} tokens. "Random" reads as many random
ones. "In the prompt" is the base with the passages before its text, "parallel context" the base with
`retrofit(base, reader="parallel_context")`; neither is trained.

{details}

## How it was made

| | |
|---|---|
| began as | {start} |
| text | {texts} |
| steps | {steps:,} of {planned:,}, each of {batch_size} windows of up to {window} tokens |
| time | {minutes:.0f} minutes on {device} |
| settings | AdamW, learning rate {learning_rate:g} (cosine), seed {seed} |

## Load it

```python
import retro_hf  # pip install retro-hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{where})
```

It reads datastores of its own tokenizer with chunks of {chunk_size} tokens. What it reads, it may repeat.
"""
_NAMES = {
    "off": "off: the base",
    "on": "**this adapter**",
    "random": "this adapter, random passages",
    "in_context": "in the prompt",
}


@dataclass(frozen=True)
class Fit:
    """A reader that was fitted, and what it is worth.

    Attributes:
        folder (`Path`): the adapter, with its card `README.md`, `evaluation.json` and `fit.json`.
        evaluation ([`Evaluation`]): on the documents that were held out, with the base that reads in its prompt.
        parallel_context ([`Evaluation`], *optional*): the base that reads in parallel context, on the same documents; `None`
            for a base that cannot.
        settings (`dict`): how it was made: documents, steps, times, versions, and losses on the way.
    """

    folder: Path
    evaluation: Evaluation
    parallel_context: Evaluation | None
    settings: dict[str, Any]

    def rows(self) -> list[tuple[str, float, Interval | None]]:
        """Who reads, bits per byte, and their difference to off."""
        found = [(_NAMES[mode.name], mode) for mode in self.evaluation.modes]
        if self.parallel_context is not None:
            found += [
                ("parallel context", self.parallel_context.mode("on")),
                ("parallel context, random passages", self.parallel_context.mode("random")),
            ]
        return [(name, mode.bits_per_byte, mode.difference) for name, mode in found]

    def __str__(self) -> str:
        lines = [self.evaluation.verdict.text, *self.evaluation.verdict.details, ""]
        width = max(len(name) for name, _, _ in self.rows())
        lines.append(f"{'bits per byte':<{width}}")
        for name, value, difference in self.rows():
            change = "" if difference is None else f"  {difference.value / self._off.bits_per_byte:+7.1%}"
            lines.append(f"{name.replace('*', ''):<{width}}  {value:.4f}{change}")
        return "\n".join(lines)

    @property
    def _off(self) -> Mode:
        return self.evaluation.mode("off")

    def save(self) -> None:
        """Write the card, the evaluation and the settings."""
        self.evaluation.save(self.folder)
        write_file(self.folder / "fit.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        write_card(self)


def write_card(result: Fit) -> None:
    """Write the card of a fitted adapter."""
    settings, inputs = result.settings, result.evaluation.inputs
    data = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": settings["backbone"],
        "tags": ["retro", "retrieval", "adapter"],
    }
    text = _CARD.format(
        data="\n".join(f"{name}: {json.dumps(value)}" for name, value in data.items()),
        name=result.folder.name,
        base=settings["backbone"],
        # A base without an owner is a folder, which the adapter does not name.
        where="" if "/" in settings["backbone"] else f', backbone_name_or_path="{settings["backbone"]}"',
        verdict=result.evaluation.verdict.text,
        rows="\n".join(_table(result)),
        scored=f"{inputs.num_documents:,} documents that were held out, {inputs.num_tokens:,} tokens.",
        details=" ".join(result.evaluation.verdict.details),
        start="a new reader that copies" if settings["base"] == settings["backbone"] else f"`{settings['base']}`",
        texts=f"{settings['num_train']:,} documents; {settings['num_heldout']} more were held out",
        **{
            name: settings[name]
            for name in (
                "chunk_size",
                "num_neighbors",
                "steps",
                "planned",
                "batch_size",
                "window",
                "device",
                "learning_rate",
                "seed",
            )
        },
        minutes=settings["seconds"] / 60,
    )
    write_file(result.folder / "README.md", text.encode("utf-8", "replace"))


def _table(result: Fit) -> Iterable[str]:
    off = result.evaluation.mode("off").bits_per_byte
    for name, value, difference in result.rows():
        shown = (
            "|"
            if difference is None
            else f"{difference.value / off:+.1%} | {difference.low / off:+.1%} to {difference.high / off:+.1%}"
        )
        yield f"| {name} | {value:.4f} | {shown} |"
