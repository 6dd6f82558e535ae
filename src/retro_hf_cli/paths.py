"""Paths on the command line, looked at while it is parsed: a slip is answered before anything heavy is loaded.

This only looks at what is there and what it is; the package itself checks the content. A name that may be one on the Hub is
not looked up. The rules are those of the package, which takes seconds to import.
"""

import json
import os
from pathlib import Path
from typing import Any


MANIFEST = "datastore.json"  # also `retro_hf.datastore.manifest.MANIFEST_NAME`
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_MAX_CONFIG_BYTES = 16 << 20


def source(path: Path | None) -> Path | None:
    """Documents: a file or a folder that exists."""
    if path is not None and not path.exists():
        raise FileNotFoundError(f"There is nothing at '{path}'. Check the path of the documents.")
    return path


def datastore(path: Path) -> Path:
    """A datastore in a folder."""
    _check_datastore(str(path))
    return path


def store(name: str | None) -> str | None:
    """A datastore in a folder, or one on the Hub, where its name has an owner."""
    if name is not None and os.path.exists(name):
        _check_datastore(name)
    elif name is not None and ("/" not in name or is_path(name)):
        _check_datastore(name, " On the Hub a datastore is named with its owner, such as 'org/name'.")
    return name


def _check_datastore(name: str, hint: str = "") -> None:
    if is_datastore(path := Path(name)):
        return
    if path.is_dir():
        reason = f"the folder has no {MANIFEST}"
    else:
        reason = "it is a file, and a datastore is a folder" if path.exists() else "the folder does not exist"
    raise FileNotFoundError(
        f"There is no datastore at '{name}': {reason}. Check the path, or build one with `retro build`.{hint}"
    )


def is_datastore(path: Path) -> bool:
    """Whether a folder is a datastore; or may become one, about which the package has more to say."""
    return (path / MANIFEST).exists() or unfinished(path).exists()


def model(name: str) -> str:
    """A model in a folder, or one on the Hub."""
    pretrained("model", name)
    if os.path.isdir(name) and not is_model(Path(name)):
        raise FileNotFoundError(
            f"The folder '{name}' holds no model: it has no {_CONFIG}. Pass a folder that `save_pretrained` wrote, or a model "
            "on the Hub."
        )
    return name


def is_model(path: Path) -> bool:
    """Whether a folder holds a model; or an adapter of PEFT, about which the package has more to say."""
    return any((path / name).exists() for name in (_CONFIG, _ADAPTER))


def family(name: str) -> str | None:
    """The family that the config of a model in a folder names; None if that cannot be told."""
    config = Path(name, _CONFIG)
    try:
        content: Any = json.loads(config.read_bytes()) if config.stat().st_size <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    found = content.get("model_type") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def embedder(name: str | None) -> str | None:
    """An encoder in a folder, or one on the Hub."""
    return name if name is None else pretrained("embedder", name)


def tokenizer(name: str) -> str:
    """A tokenizer in a folder, or one on the Hub."""
    return pretrained("tokenizer", name)


def base(name: str | None) -> str | None:
    """The base of an adapter in a folder, or one on the Hub."""
    return name if name is None else pretrained("base", name)


def pretrained(what: str, name: str) -> str:
    """Something of transformers, in a folder or on the Hub."""
    if is_path(name) and not os.path.exists(name):
        raise FileNotFoundError(
            f"There is no folder '{name}'. Check the path of the {what}, or pass a name on the Hub ('org/name')."
        )
    return name


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder; also `retro_hf.outside.is_path`."""
    return os.path.isabs(name) or name.startswith((".", "~")) or name.endswith(("/", os.sep)) or name.count("/") > 1


def saved(path: Path) -> Path:
    """A datastore or a model in a folder."""
    if not path.exists() and not is_datastore(path):
        raise FileNotFoundError(f"There is nothing at '{path}'. Check the path of the datastore or model.")
    if not is_datastore(path) and not is_model(path):
        raise FileNotFoundError(
            f"'{path}' is neither a datastore, which is a folder with {MANIFEST}, nor a model, which is one with {_CONFIG}. "
            "Check the path."
        )
    return path


def evaluation(path: Path | None) -> Path | None:
    """What `retro evaluate` has written."""
    if path is not None and not path.exists():
        raise FileNotFoundError(f"There is nothing at '{path}'. Pass the folder that `retro evaluate -o` wrote.")
    return path


def output(path: Path) -> Path:
    """Where a datastore is to be built."""
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"'{path}' already exists and is never overwritten. Choose another path, remove it, or, if it is a datastore, add "
            "to it with `retro append`."
        )
    return path


def folder(path: Path | None) -> Path | None:
    """Where files are to be written: no file."""
    if path is not None and path.is_file():
        raise NotADirectoryError(f"'{path}' is a file, but a folder is to be written there. Choose another path.")
    return path


def unfinished(path: Path) -> Path:
    """The folder in which a build of the datastore at `path` keeps what it has done."""
    return path.parent / f".{path.name}.building"
