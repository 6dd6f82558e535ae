"""What the tests call by other names on other releases of transformers; what RETRO does is in `compatibility_retro`."""

from typing import Any

from transformers import PreTrainedModel

from retro_hf.model.compatibility_retro import CHECKPOINTING


def enable_checkpointing(model: PreTrainedModel, **options: Any) -> None:
    """Turn activation checkpointing on, with options of `torch.utils.checkpoint`."""
    getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": options or None})


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Turn it off."""
    getattr(model, f"{CHECKPOINTING}_disable")()


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether it is on."""
    return getattr(model, f"is_{CHECKPOINTING}")
