"""Checks on what came from outside: the names, files, JSON and characters of a folder that somebody else made.

Every function raises ValueError with the reason. The caller knows which folder it was, and says so.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .model.names_retro import check_sizes, objects_in


MAX_JSON_BYTES = 16 << 20
_MAX_WEIGHT_MAP_BYTES = 64 << 20
_MAX_NESTING = 256
_MAX_VALUES = 1 << 23  # an empty list has 3 bytes in a file and 64 in memory
# Files that libraries read as a whole; the largest vocabularies have a quarter of these bytes.
_PARSED, _MAX_PARSED_BYTES = (".json", ".jinja", ".model", ".txt"), 128 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# Names that Windows takes for devices, whatever their suffix.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,95})(?:/[A-Za-z0-9](?:[A-Za-z0-9._-]{0,95}))?")
# Characters that move the cursor or color the terminal (C0, DEL, C1), reorder what is shown (bidirectional), end a line for
# some programs, or cannot be seen at all (tags).
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_file_name(name: Any) -> bool:
    """Whether a name is that of a file in its folder: no path, no device, no hidden file."""
    return isinstance(name, str) and bool(_FILE_NAME.fullmatch(name)) and not _DEVICE.fullmatch(name)


def can_be_a_file(name: str | bytes) -> bool:
    """Whether every library can open a file of this name: text in UTF-8, which is not empty and has no NUL."""
    return isinstance(name, str) and is_utf8(name) and "\0" not in name and name != ""


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode a text: not if it has half a character, as the names of files in other encodings have."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def is_hub_name(name: Any) -> bool:
    """Whether a name can be one of the Hub, such as `"org/name"` or `"name"`: no path of this machine."""
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and ".." not in name and "--" not in name


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder, so that nobody has to look for it on the Hub."""
    return os.path.isabs(name) or name.startswith((".", "~")) or name.endswith(("/", os.sep)) or name.count("/") > 1


def check_hub_name(name: Any) -> None:
    """Check a name that somebody else wrote, from which something is to be loaded.

    Only the caller names local folders: a folder of this machine that has the name of a repository is refused, too, since
    transformers would read it instead of the Hub.
    """
    if not is_hub_name(name):
        raise ValueError(f"{name!r:.200} is not a name on the Hub, such as 'org/name'")
    if os.path.lexists(name):
        raise ValueError(f"{name!r} is a name on the Hub and also something in the current folder")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_inside(folder: str | os.PathLike[str], name: str) -> os.stat_result:
    """The status of a regular file of a folder.

    A link may lead to another file of the folder, or, in the cache of the Hub's client, to the file's content there.

    Raises:
        OSError: if there is no such file.
        ValueError: for a name that is a path, a device, a pipe, or a link out of the folder.
    """
    if not is_file_name(name):
        raise ValueError(f"{name!r:.200} is not the name of a file")
    return _status_inside(Path(folder), Path(folder) / name)


def _status_inside(folder: Path, path: Path) -> os.stat_result:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in _roots(folder)):
            raise ValueError("it is a link out of the folder")
        status = os.stat(target)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    return status


def _roots(folder: Path) -> list[Path]:
    """Where the files of a folder may be: in it, and in the store of the Hub's client, which keeps snapshots of links."""
    real = Path(os.path.realpath(folder))
    cached = [parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots"]
    return [real, *cached[:1]]


def is_inside(folder: str | os.PathLike[str], path: Path) -> bool:
    """Whether a path below a folder is a regular file in it, as for [`file_inside`]."""
    try:
        _status_inside(Path(folder), path)
    except (OSError, ValueError):
        return False
    return os.path.realpath(path.parent).startswith(os.path.realpath(folder))


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Check that every visible file of a folder is a regular one in it, before a library opens what it finds there."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.is_dir(follow_symlinks=False):
            continue
        try:
            _status_inside(Path(folder), Path(entry.path))
        except FileNotFoundError:  # removed since by a writer, or a link to nothing
            continue
        except ValueError as error:
            raise ValueError(f"{entry.name!r}: {error}") from error


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_json(content: str | bytes) -> Any:
    """A JSON value; ValueError for whatever is wrong with it, also if it is nested too deeply or has too many parts."""
    commas: Any = b"," if isinstance(content, bytes) else ","
    if content.count(commas) > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES:,} values")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Python's own limit depends on how deep the caller is, and whoever writes the value again may be deeper.
    marks: Any = (b"[", b"{") if isinstance(content, bytes) else ("[", "{")
    if sum(map(content.count, marks)) > _MAX_NESTING:
        level = [value]
        for _ in range(_MAX_NESTING):
            level = [
                inner
                for outer in level
                if isinstance(outer, (dict, list))
                for inner in (outer.values() if isinstance(outer, dict) else outer)
            ]
            if not level:
                break
        else:
            raise ValueError(f"it is nested more than {_MAX_NESTING} times")
    return value


def read_json_value(path: Path, limit: int = MAX_JSON_BYTES, what: str = "it") -> Any:
    """A JSON value from a file, whose size is looked at first; OSError and ValueError as for [`read_json`].

    `what` is how the error about the size calls the file.
    """
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{what} has {size:,} bytes, more than {limit:,}")
    return parse_json(path.read_bytes())


def read_json(folder: str | os.PathLike[str], name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a folder.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a regular file of at most `limit` bytes with a JSON object.
    """
    file_inside(folder, name)
    content = read_json_value(Path(folder) / name, limit)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of an object")
    return content


# ── characters ────────────────────────────────────────────────────────────────────────────────────────────────────────


def printable(text: str) -> str:
    r"""Text for a terminal, a card or a report: characters that control it are written out, such as `\x1b`.

    Line breaks and tabs stay.
    """
    return _HIDDEN.sub(lambda match: repr(match.group())[1:-1], text)


def printable_json(value: Any, **options: Any) -> str:
    """JSON in readable UTF-8, with the same characters as JSON escapes."""
    return _HIDDEN.sub(lambda match: json.dumps(match.group())[1:-1], json.dumps(value, ensure_ascii=False, **options))


# ── files that transformers and sentence-transformers open ────────────────────────────────────────────────────────────

# Where these libraries would load another thing that a file names.
_CODE = re.compile(r"sentence_transformers(?:\.\w+)+")


def check_pretrained(read: Callable[[str], Any]) -> None:
    """Check what the files of a model or tokenizer name, only other files of it or repositories on the Hub, and its sizes.

    Args:
        read (`Callable`): the content of a JSON file by name, None if there is none.
    """
    for name in ("config.json", "tokenizer_config.json"):
        content = read(name)
        _check_values(name, content)
        check_sizes(content, name)
    modules = read("modules.json")
    for module in modules if isinstance(modules, list) else []:
        path = module.get("path") or "" if isinstance(module, dict) else None
        if not isinstance(path, str) or not (path == "" or is_file_name(path)):
            raise ValueError(f"modules.json names the folder {path!r:.200}")
        settings = [read(f"{path}/{name}") for name in ("config.json", "router_config.json")] if path else []
        for part in settings:
            check_sizes(part, f"{path}/config.json")
        routes = [part.get("types") for part in settings if isinstance(part, dict)]
        kinds = [module.get("type"), *(kind for route in routes if isinstance(route, dict) for kind in route.values())]
        for kind in kinds:
            # Any other name would be imported, and so run, whatever it is.
            if not isinstance(kind, str) or not _CODE.fullmatch(kind):
                raise ValueError(
                    f"modules.json names the class {kind!r:.200}, which is not one of sentence-transformers"
                )


def check_base(read: Callable[[str], Any]) -> None:
    """Check the name of the base in an adapter of PEFT, which transformers loads without a question."""
    adapter = read("adapter_config.json")
    if isinstance(adapter, dict) and adapter.get("base_model_name_or_path"):
        check_hub_name(adapter["base_model_name_or_path"])


def _check_values(name: str, content: Any) -> None:
    """Check the fields of a configuration, also of nested ones, that name a file or code."""
    for part in objects_in(content):
        for key, value in part.items():
            files = value if isinstance(value, list) else [value]
            is_file = key in ("transformers_weights", "fast_tokenizer_files")
            # Old repositories record where a file was on the machine of their author, which does no harm elsewhere.
            is_path = key.endswith("_file") and isinstance(value, str) and os.path.lexists(value)
            if (is_file and value is not None or is_path) and not all(is_file_name(file) for file in files):
                raise ValueError(f"{name} names the file {value!r:.200} in {key!r}")
            if key.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
                raise ValueError(f"{name} names the code {value!r:.200} in {key!r}")
            if key == "init_inputs" and value:
                raise ValueError(f"{name} passes {value!r:.200} to the tokenizer")


def check_pretrained_folder(folder: str | os.PathLike[str]) -> None:
    """Check a local folder before transformers opens it: its files, what they name, and their weight maps."""
    check_folder(folder)
    for entry in os.scandir(folder):
        if entry.name.endswith(_PARSED) and (size := entry.stat().st_size) > _MAX_PARSED_BYTES:
            raise ValueError(f"{entry.name!r} has {size:,} bytes, more than {_MAX_PARSED_BYTES:,}")
    templates = Path(folder) / "additional_chat_templates"
    if templates.is_dir():
        check_folder(templates)

    def read(name: str) -> Any:
        path = Path(folder) / name
        try:
            return read_json_value(path) if path.is_file() else None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    check_pretrained(read)
    for index in Path(folder).glob("*.index.json"):
        content = read_json(folder, index.name, _MAX_WEIGHT_MAP_BYTES) if is_file_name(index.name) else {}
        weights = content.get("weight_map")
        if not isinstance(weights, dict):
            raise ValueError(f"{index.name} has no weight map")
        for name in sorted({str(value) for value in weights.values()}):
            if Path(folder, name).name != name or os.path.lexists(Path(folder, name)):
                file_inside(folder, name)
