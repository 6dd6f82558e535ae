"""What a fit leaves: the adapter with its card, what was measured, and how it was made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datastore.atomic_files import write_file
from ..evaluation.interval import Interval
from ..evaluation.result import Evaluation, Mode
from ..model.card_retro import card_text
from ..model.configuration_retro import RetroConfig


_MORE = """{details}

"Parallel context" is the base with `retrofit(base, reader="parallel_context")`, which reads the same passages without training.

## How it was made

| | |
|---|---|
| began as | {start} |
| text | {num_train:,} documents; {num_heldout} more were held out |
| steps | {steps:,} of {planned:,}, each of {batch_size} windows of up to {window} tokens |
| time | {minutes:.0f} minutes on {device} |
| settings | AdamW, learning rate {learning_rate:g} (cosine), seed {seed} |

"""
_NAMES = {
    "off": "off: the base",
    "on": "**this adapter**",
    "random": "this adapter, random passages",
    "in_context": "in the prompt",
}
_PARALLEL = {"on": "parallel context", "random": "parallel context, random passages"}


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
            found += [(_PARALLEL[name], self.parallel_context.mode(name)) for name in _PARALLEL]
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
        write_file(self.folder / "README.md", self._card().encode("utf-8", "replace"))

    def _card(self) -> str:
        settings, found = self.settings, self.parallel_context
        is_new = settings["base"] == settings["backbone"]
        more = _MORE.format(
            **settings,
            details=" ".join(self.evaluation.verdict.details),
            start=f"a new reader of `{settings['base']}` that copies" if is_new else f"`{settings['base']}`",
            minutes=settings["seconds"] / 60,
        )
        rivals = {_PARALLEL[one["name"]]: one for one in found.to_dict()["modes"][1:]} if found else {}
        config = RetroConfig.from_pretrained(self.folder)
        return card_text(self.folder.name, config, self.evaluation.to_dict(), rivals, more)
