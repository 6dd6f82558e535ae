# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What differs between the releases of transformers that RETRO runs on; no other file looks at a release.

| release | difference |
|---|---|
| 5.24 | the cache, as an argument and in outputs, is called `cache`; before, `past_key_values` |
| 5.23 | activation checkpointing is called so; before, gradient checkpointing |
| 5.21 | has `slice_logits_to_keep` |
| 5.20 | has `SubConfigSpec` |
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, NamedTuple

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging


try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:

    class SubConfigSpec(NamedTuple):  # type: ignore[no-redef]  # the other half of the `try`
        """Read by no release that lacks it: these read `sub_configs`."""

        config_class: type


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Keep the last `logits_to_keep` positions of `(B, T, hidden_size)`, all for 0, or those that a tensor names."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


logger = logging.get_logger(__name__)

OLDEST_TESTED, NEWEST_TESTED = (5, 18), (5, 24)
"""The releases of transformers that the tests have run on; `make test-versions` runs them again."""

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls, or has called, the cache in a model's arguments and outputs."""

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What the installed release calls it."""

CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""How the options of checkpointing begin in the installed release."""


def warn_if_untested(version: str = transformers.__version__) -> None:
    """Log a warning, once, if no test has run with this release of transformers."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST_TESTED <= release <= NEWEST_TESTED:
        oldest, newest = ("{}.{}".format(*release) for release in (OLDEST_TESTED, NEWEST_TESTED))
        remedy = "Upgrade retro-hf" if release > NEWEST_TESTED else "Upgrade transformers"
        logger.warning_once(
            f"RETRO is tested with transformers {oldest} to {newest}, and {version} is installed: results may be wrong. "
            f"{remedy}, or install a tested release: `pip install 'transformers>={oldest},<{newest}.99'`."
        )


def accept_cache_by_any_name(forward: Callable) -> Callable:
    """Let a `forward` with the parameter `past_key_values` take the cache under every name of `CACHE_NAMES`.

    Its signature shows the name of the installed release, which transformers looks for. A cache under a name that
    `forward` does not know raises: in `**kwargs` it would be ignored, and every token read without its past.

    Raises:
        TypeError: at the call, for a cache under an unknown name, or two caches.
    """
    signature = inspect.signature(forward)
    known = {*signature.parameters, *CACHE_NAMES, "cache_position", "use_cache"}  # a table of positions, and a flag

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value in kwargs.items():
            if name not in known and _looks_like_cache(name, value):
                raise TypeError(
                    f"{type(self).__name__} got `{name}`, which looks like a cache and would be ignored. Pass a cache as "
                    f"`{CACHE_NAME}`. If transformers {transformers.__version__} passed it, install a release that RETRO "
                    "is tested with."
                )
        names = [name for name in CACHE_NAMES if name in kwargs and not _is_paged(name, kwargs[name])]
        caches = {name: kwargs.pop(name) for name in names}
        given = {name: cache for name, cache in caches.items() if cache is not None}
        if len(given) > 1:
            raise TypeError(f"{type(self).__name__} got a cache twice, as `cache` and as `past_key_values`; pass one.")
        if given:
            kwargs["past_key_values"] = next(iter(given.values()))
        return forward(self, *args, **kwargs)

    wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]  # `inspect` reads it
        parameters=[
            parameter.replace(name=CACHE_NAME) if parameter.name == "past_key_values" else parameter
            for parameter in signature.parameters.values()
        ]
    )
    return wrapper


def _is_paged(name: str, value: Any) -> bool:
    """Whether `cache` is that of continuous batching, which always had this name; attention takes it from `**kwargs`."""
    return name != CACHE_NAME and value is not None and not isinstance(value, Cache)


def _looks_like_cache(name: str, value: Any) -> bool:
    """Whether an unknown argument is a cache, by its type or, unless it is a flag, by its name."""
    if isinstance(value, Cache) or hasattr(value, "get_seq_length"):
        return True
    by_name = "cache" in name or name.startswith("past_") or name.endswith("_past")
    return by_name and value is not None and not isinstance(value, bool)


warn_if_untested()
