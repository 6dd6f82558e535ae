"""The folder of results: made, or known to hold the same evaluation, before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..datastore.manifest import MANIFEST_NAME


__all__ = ["BLOCKS", "claim_folder"]

BLOCKS = "blocks"
_RESULTS = ("evaluation.json", "tokens.parquet", "documents.parquet")
# What must be the same, in words and where provenance has it.
_SAME = {
    "model": ("model", "weights"),
    "datastore": ("datastore", "fingerprint"),
    "set of documents": ("documents", "fingerprint"),
}


def claim_folder(folder: Path, origin: Mapping[str, Any]) -> None:
    """Make the folder, unless what would be written over is somebody else's, or of another model, datastore or text.

    Other settings are no reason: a call that asks for more goes on with what is there.

    Args:
        folder (`Path`): of results.
        origin (`Mapping[str, Any]`): from [`provenance`].
    Raises:
        FileExistsError: for anything else there.
        OSError: if the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The folder of results {str(folder)!r} cannot be made ({error.strerror}). Choose another one."
        ) from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"The folder of results {str(folder)!r} cannot be written. Choose another one.")
    if (folder / MANIFEST_NAME).exists():
        raise FileExistsError(f"{str(folder)!r} is a datastore, not a folder of results. Choose another one.")
    found = [name for name in _RESULTS if (folder / name).exists()]
    before = _provenance(folder / _RESULTS[0])
    if found and before is None and (found[0] == _RESULTS[0] or not (folder / BLOCKS).is_dir()):
        raise FileExistsError(
            f"The folder {str(folder)!r} has a file {found[0]!r} that no evaluation wrote; it would be written over. Choose "
            "another folder, or move the file."
        )
    others = [
        f"another {words}"
        for words, (part, key) in _SAME.items()
        if before and (before.get(part) or {}).get(key) != (origin[part] or {}).get(key)
    ]
    if others:
        raise FileExistsError(
            f"The folder {str(folder)!r} has an evaluation of {', '.join(others)}. Choose another folder, "
            "or remove its evaluation.json."
        )


def _provenance(file: Path) -> dict[str, Any] | None:
    """The provenance of an evaluation of any version; None for what is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["provenance"] if "format_version" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
