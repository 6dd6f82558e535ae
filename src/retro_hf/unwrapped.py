"""The RETRO model inside of one that PEFT has wrapped."""

from __future__ import annotations

from typing import Any

from .model.modeling_retro import RetroPreTrainedModel


def unwrapped(model: Any) -> Any:
    """The RETRO model that PEFT has wrapped, with its LoRA layers in place; anything else as it is.

    Virtual tokens, as of prompt tuning, live in the wrapper alone. Such a model stays wrapped, so that they are not lost.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or getattr(config, "is_prompt_learning", True):
        return model
    inner = model.get_base_model()
    return inner if isinstance(inner, RetroPreTrainedModel) else model
