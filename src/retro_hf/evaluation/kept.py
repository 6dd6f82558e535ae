"""Arrays that a run has finished, kept under a digest of all they are made from, so that an interrupted run goes on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from transformers.utils import logging

from ..datastore.blocks import digest_of
from ..datastore.storage import complete_file


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeptBlocks", "digest_of", "weights_digest"]

logger = logging.get_logger(__name__)


class KeptBlocks:
    """Arrays in files named by a digest; without a folder nothing is kept.

    A file appears when it is complete, so what a killed run has finished is there, and what it was at is not.

    Args:
        folder (`Path`, *optional*): where the files lie; made if it isn't there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load_or_make(self, kind: str, digest: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of that digest: read if it is kept, else made and kept."""
        if self._folder is None:
            return make()
        path = self._folder / f"{kind}-{digest}.npy"
        if path.exists():
            try:
                return np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                logger.warning(f"{str(path)!r} is damaged ({error}); what it held is computed again.")
        values = make()
        with complete_file(path) as partial, partial.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        return values


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of a model's weights and settings, wherever it was loaded from; at several GB per second.

    Weights that are not in memory (offloaded ones) cannot be read: such a model has another digest each time.
    """
    digest = xxhash.xxh3_128(json.dumps(_settings(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return uuid.uuid4().hex
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(value: Any) -> Any:
    """A config without what does not change a score: names, versions, and the dtype it was saved in."""
    if isinstance(value, dict):
        kept = {str(name): part for name, part in value.items()}
        passing = ("dtype", "transformers_version", "architectures")
        return {name: _settings(part) for name, part in kept.items() if name[:1] != "_" and name not in passing}
    return value
