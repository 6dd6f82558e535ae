# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Values that callers give: how messages quote them, and which tensors can be read."""

import reprlib
from numbers import Integral
from typing import Any

import torch


MOST_NUMBERS = 1 << 36
"""What no array or tensor of arguments has: `expand` and `broadcast_to` make one in no time, and reading it takes all memory."""
_MOST_LABELS = 1 << 21
# What was given may be nested a thousand times, or be text of a whole book.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def shown(value: Any) -> str:
    """How a message quotes what a caller gave: short, and without an error of its own."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return f"{type(value).__name__} of many digits"


def check_plain(name: str, tensor: Any, has_values: bool = True) -> None:
    """Check that the values of a tensor can be read; anything else is left to other checks.

    Raises:
        ValueError: for one that is sparse, nested, quantized or complex, without values on the device "meta", or so large that
            to read it would take all memory: `expand` makes such a tensor in no time.
    """
    if not isinstance(tensor, torch.Tensor):
        return
    kinds = {
        "sparse or nested": tensor.layout != torch.strided or tensor.is_nested,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "on the device 'meta', where it has no values": has_values and tensor.is_meta,
    }
    found = next((kind for kind, applies in kinds.items() if applies), None)
    if found is None and type(tensor) is torch.Tensor and not torch.compiler.is_compiling():
        found = f"of {tensor.numel():,} numbers" if tensor.numel() > MOST_NUMBERS else None
    if found is not None:
        raise ValueError(f"{name} must be a dense tensor on the device of the model, but it is {found}.")


def check_general_fields(config: Any, unknown: dict[str, Any]) -> None:
    """Check values of any config that transformers takes apart before it checks their types.

    Args:
        config (`PreTrainedConfig`): that is being built.
        unknown (`dict`): keywords that are no fields of it.
    Raises:
        ValueError: for a dtype that torch does not have, and for labels that are none or do not fit into memory.
    """
    dtype = unknown.get("torch_dtype") if config.dtype is None else config.dtype
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` is {shown(dtype)}. Pass a dtype of torch or its name, such as 'float32'.")
    if not isinstance(config.id2label, (dict, type(None))):
        raise ValueError(f"`id2label` is {shown(config.id2label)}. Pass a dict from numbers to names, or None.")
    count = unknown.get("num_labels")
    if count is not None and not (isinstance(count, Integral) and 0 <= int(count) <= _MOST_LABELS):
        raise ValueError(f"`num_labels` must be an integer from 0 to {_MOST_LABELS:,}, got {shown(count)}.")


__all__ = ["MOST_NUMBERS", "check_general_fields", "check_plain", "shown"]
