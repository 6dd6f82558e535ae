"""Paths on the command line, looked at while it is parsed: a slip is answered before anything heavy is loaded.

This only checks that a path exists, or that nothing is in the way; the package itself checks what is there.
"""

from pathlib import Path


MANIFEST = "datastore.json"  # also `retro_hf.datastore.manifest.MANIFEST_NAME`, which takes seconds to import


def source(path: Path) -> Path:
    """Documents: a file or a folder that exists."""
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at '{path}'. Check the path of the documents.")
    return path


def datastore(path: Path) -> Path:
    """A datastore, or what may have become of one."""
    if not path.exists() and not unfinished(path).exists():
        raise FileNotFoundError(
            f"There is no datastore at '{path}': the folder does not exist. Check the path, or build one with `retro build`."
        )
    return path


def is_datastore(path: Path) -> bool:
    """Whether a folder is a datastore, or may become one."""
    return (path / MANIFEST).exists() or unfinished(path).exists()


def saved(path: Path) -> Path:
    """A datastore or a model, in a folder that exists."""
    if not path.exists() and not unfinished(path).exists():
        raise FileNotFoundError(f"There is nothing at '{path}'. Check the path of the datastore or model.")
    return path


def output(path: Path) -> Path:
    """Where a datastore is to be built."""
    if (path / MANIFEST).exists():
        raise FileExistsError(
            f"'{path}' already exists. A datastore is never written over another: choose another path, remove the old one "
            "first, or add to it with `retro append`."
        )
    return path


def unfinished(path: Path) -> Path:
    """The folder in which a build of the datastore at `path` keeps what it has done."""
    return path.parent / f".{path.name}.building"
