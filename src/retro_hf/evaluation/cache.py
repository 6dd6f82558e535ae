"""Arrays that a run has already computed, kept on disk so that an interrupted run can resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers.utils import logging

from ..datastore.atomic_files import complete_file, digest_of


logger = logging.get_logger(__name__)


class ArrayCache:
    """Arrays in `.npy` files, named by a digest of everything they were computed from.

    A file appears only when it is complete, so a killed run leaves its finished arrays and no broken ones.

    Args:
        folder (`Path`, *optional*): folder for the files, created on demand. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load_or_compute(self, kind: str, sources: list[str | bytes], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Load the array computed from `sources`, or compute and keep it."""
        if self._folder is None:
            return compute()
        path = self._folder / f"{kind}-{digest_of(*sources)}.npy"
        if path.exists():
            try:
                return np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                logger.warning(f"{str(path)!r} is damaged ({error}); it is computed again.")
        values = compute()
        with complete_file(path) as partial, partial.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        return values
