"""The progress of long work: a bar on a terminal, and lines in a log elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from transformers.utils import logging

from .arguments import flag


logger = logging.get_logger(__name__)

_SECONDS = 20
"""Time between two lines of a log."""


def progress_bar(show_progress: bool | None, **options: Any) -> Any:
    """A progress bar, with the options `total`, `unit` and `desc` of tqdm.

    Args:
        show_progress (`bool`, *optional*): by default a bar is shown on a terminal only, and elsewhere the progress is logged
            (level INFO). No bar is shown if the progress bars of transformers are switched off.
    """
    shows = show_progress is None or flag("show_progress", show_progress, ValueError)
    if show_progress is None and not sys.stderr.isatty():
        return _ProgressLog(**options)
    return logging.tqdm(disable=not shows, **options)


class _ProgressLog:
    """Has the methods of a bar that are used here, and logs every 20 seconds how much is done."""

    disable = True

    def __init__(self, total: int | None, unit: str, desc: str) -> None:
        self.total, self.unit, self.desc = total, unit, desc
        self.done = 0
        self._begun = self._last = time.monotonic()

    def __enter__(self) -> _ProgressLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count finished units."""
        self.done += count
        now = time.monotonic()
        if now - self._last < _SECONDS or self.done == 0 or self.done == self.total:
            return
        self._last = now
        if self.total is None:
            logger.info(f"{self.desc}: {self.done:,} {self.unit}s")
            return
        minutes = (now - self._begun) * (self.total - self.done) / self.done / 60
        logger.info(
            f"{self.desc}: {self.done:,} of {self.total:,} {self.unit}s, about {max(round(minutes), 1)} min left"
        )

    def close(self) -> None:
        """Do nothing; a bar would leave its line."""
