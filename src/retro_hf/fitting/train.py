"""The training of a fit: plain `Trainer`, which saves by the clock and measures the reader on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..datastore.atomic_files import write_file
from ..evaluation import BitsPerByte
from ..model.modeling_retro import RetroForCausalLM
from ..outside import read_json_value
from .plan import Plan


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

_SAVE_SECONDS = 120.0
_WATCHES = 6  # in a training
_WARM_UP = 10


def _read_log(path: Path) -> list[dict[str, float]]:
    """What was logged before; nothing if the file is gone or damaged, since it only tells the way."""
    try:
        log = read_json_value(path)
        return [entry for entry in log if {"step", "seconds"} <= set(entry)]
    except (OSError, ValueError, TypeError):
        return []


class _Clock(TrainerCallback):
    """Saves by the clock, ends when the time is over, and logs the progress."""

    def __init__(
        self,
        watch: Callable[[RetroForCausalLM], BitsPerByte],
        plan: Plan,
        minutes: float | None,
        path: Path,
        step: int,
    ) -> None:
        self._watch, self._plan, self._path = watch, plan, path
        # After a crash the log may be ahead of the last checkpoint; those steps are done again.
        self.log: list[dict[str, float]] = [entry for entry in _read_log(path) if entry["step"] <= step]
        self._before = self.log[-1]["seconds"] if self.log else 0.0
        self._begin = self._saved = time.monotonic()
        self._end = math.inf if minutes is None else self._begin + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each step."""
        now = time.monotonic()
        is_over = now > self._end
        if now - self._saved > _SAVE_SECONDS or is_over or state.global_step >= state.max_steps:
            control.should_save, self._saved = True, now
        if is_over:
            control.should_training_stop = True
        if state.global_step % max(state.max_steps // _WATCHES, 1) == 0 or is_over:
            self.tell(kwargs["model"], state)

    def tell(self, model: RetroForCausalLM, state: Any) -> None:
        """Measure the watched documents, and log one line."""
        values = self._watch(model).bits_per_byte
        seconds, left = self._before + time.monotonic() - self._begin, self._plan.steps - state.global_step
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        entry = {"step": state.global_step, "seconds": round(seconds, 1)}
        self.log.append(entry | {name: round(value, 4) for name, value in values.items()})
        write_file(self._path, json.dumps(self.log).encode())
        change = values["on"] / values["off"] - 1
        logger.info(
            f"Step {state.global_step} of {self._plan.steps}, {seconds / 60:.1f} minutes, about "
            f"{left * self._plan.seconds_per_step / 60:.0f} left"
            + (f"; loss {losses[-1]:.3f} nats per token" if losses else "")
            + f"; held-out bits per byte: {values['on']:.4f} ON ({change:+.1%}), {values['off']:.4f} OFF, {values['random']:.4f} RANDOM"
        )


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint."""
    # Trainer writes this file last; a run that was killed may leave a folder without it.
    complete = [path.parent for path in (work / "checkpoints").glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def train(
    model: RetroForCausalLM,
    rows: Dataset,
    collator: Any,
    watch: Callable[[RetroForCausalLM], BitsPerByte],
    plan: Plan,
    *,
    work: Path,
    batch_size: int,
    learning_rate: float,
    minutes: float | None,
    seed: int,
) -> dict[str, Any]:
    """Train the reader in place, from the last checkpoint if there is one.

    Args:
        watch (`Callable`): measures the reader on the way.
    Returns:
        `dict`: `steps` that were done, the `seconds` they took, and the `log` of what was watched.
    """
    checkpoint = last_checkpoint(work)
    begun = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    clock = _Clock(watch, plan, minutes, work / "log.json", begun)
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        per_device_train_batch_size=batch_size,
        max_steps=plan.steps,
        learning_rate=learning_rate,
        adam_beta2=0.98,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(_WARM_UP, plan.steps // 5),
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        logging_steps=5,
        save_strategy="no",  # `clock` asks for each save
        save_total_limit=2,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])
    # `disable_tqdm` replaces the bar by a callback that prints every log entry; `clock` logs the same in one line.
    trainer.callback_handler.callbacks = [
        one for one in trainer.callback_handler.callbacks if type(one).__name__ != "PrinterCallback"
    ]
    if checkpoint is None:
        clock.tell(model, trainer.state)
    else:
        logger.info(f"Going on from step {begun} of {plan.steps}.")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done = trainer.state.global_step
    if done < plan.steps:
        logger.info(f"The time was over after {done} of {plan.steps} steps; repeat the same call to resume.")
    return {"steps": done, "seconds": clock.log[-1]["seconds"], "log": clock.log}
