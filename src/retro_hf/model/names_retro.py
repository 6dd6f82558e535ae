# Copyright 2026 The retro-hf authors. Apache License 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Names in a saved folder, which may be a stranger's: what they may name, so that nothing else of this machine is read."""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, cached_file

from .values_retro import shown


HUB_ARGUMENTS = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "proxies", "token")
"""Arguments of `from_pretrained` that say where a checkpoint is. `revision` and `subfolder` belong to an adapter; the others also
apply to its backbone."""
_MAX_WEIGHT_MAP_BYTES, _MAX_CONFIG_BYTES = 64 << 20, 16 << 20
_MOST_CHARACTERS = 1 << 14
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_FILE = re.compile(r"\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/[\w.-]+)*", re.ASCII)
# Numbers by which layers are made and memory is taken, and the largest of each: several times that of any model.
LARGEST = (
    dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 1 << 9
    )
    | dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"), 1 << 12)
    | {"cross_attention_num_heads": 1 << 12, "cross_attention_head_dim": 1 << 18}
    | dict.fromkeys(("in_features", "out_features"), 1 << 14)
    | dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "head_dim"), 1 << 18)
    | dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "num_labels", "type_vocab_size"), 1 << 21)
    | dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 1 << 28)
)


def is_local(name: str) -> bool:
    """Whether a name is that of a folder of this machine."""
    return os.path.isabs(name) or os.path.isdir(name) or name.startswith(".") or name.count("/") > 1


def is_hub_name(name: Any) -> bool:
    """Whether a name can be one on the Hub, such as `"org/name"` or `"name"`."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_saved_names(saved: Mapping[str, Any]) -> None:
    """Check the names in a saved config: they are on the Hub, and only the caller names folders of this machine.

    Args:
        saved (`Mapping`): fields of a [`RetroConfig`] that the caller has not given.
    Raises:
        ValueError: for a name that is a path, or that is also something in the current folder.
    """
    for field in ("backbone_name_or_path", "retriever_name_or_path"):
        name = saved.get(field)
        if name is None:
            continue
        is_name = is_hub_name(name)
        if not is_name or os.path.lexists(name):
            reason = "also something in the current folder" if is_name else "no name on the Hub, such as 'org/name'"
            raise ValueError(
                f"The saved {field} is {name!r:.200}, {reason}. Only you name folders of this machine: say which one it is with "
                f"`from_pretrained(..., {field}=...)`."
            )
    revision = saved.get("backbone_revision")
    is_revision = isinstance(revision, str) and _REVISION.fullmatch(revision) and ".." not in revision
    if revision is not None and not is_revision:
        raise ValueError(
            f"The saved backbone_revision is {revision!r:.200}, which is no branch, tag or commit. Say which one is right: "
            "`from_pretrained(..., backbone_revision=...)`."
        )


def check_peft_base(folder: Any, base: Any) -> None:
    """Check the name of the model that the folder of a PEFT adapter says it belongs on, as that of any other saved name.

    Raises:
        ValueError: as [`check_saved_names`].
    """
    if folder is None or base == folder or (is_hub_name(base) and not os.path.lexists(base)):
        return
    raise ValueError(
        f"The PEFT adapter '{folder}' names the model {base!r:.200}, which is no name on the Hub, or is also something in the "
        "current folder. Only you name folders of this machine: load that model yourself, and then "
        f"`PeftModel.from_pretrained(model, '{folder}')`; `merge_and_unload()` makes one model of both, which can be saved."
    )


def check_folder_name(folder: Any, saves: bool = False, what: str = "The folder of the model") -> None:
    """Check what a caller names as the folder of a model: a text or a path and, to save there, no file.

    Args:
        folder (`str` or `os.PathLike`, *optional*): what was named; None if nothing is to be loaded by it.
        saves (`bool`): whether to save there.
        what (`str`): its name in a message.
    Raises:
        FileExistsError: for a file, since transformers would save nothing, and only log it.
        ValueError: for anything else than a text or a path, and for a text that is empty, has a NUL, or is a whole book.
    """
    if folder is None and not saves:  # a state dict is loaded
        return
    name = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_CHARACTERS or "\0" in name:
        raise ValueError(f"{what} is {shown(folder)}. Pass a text or a path.")
    if saves and os.path.lexists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f"'{folder}' is a file, so no model can be saved there. Choose a folder.")


def check_weights(name: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
    """Check where weights will be read from: regular files, configs that are objects, and weight maps that name files of their own
    folder.

    Args:
        name (`str` or `os.PathLike`): a folder, or a name on the Hub. Of the latter, configs and weight map are downloaded.
        arguments (`Mapping`): those of [`~transformers.PreTrainedModel.from_pretrained`], such as `revision` and `variant`.
    Raises:
        ValueError: for anything else, with its name.
    """
    if os.path.isdir(name):
        _check_files(os.path.join(name, arguments.get("subfolder") or ""))
        return
    where = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    variant = arguments.get("variant")
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    maps = [os.path.splitext(index) for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)]
    for file in (*_CONFIGS, *(f"{stem}.{variant}{end}" if variant else stem + end for stem, end in maps)):
        with suppress(OSError):  # without the repository, loading the weights fails, and says why
            found = cached_file(name, file, **where, **quiet)
            if found is not None:
                _check_json(found)


def _check_files(folder: str) -> None:
    for entry in os.scandir(folder):
        mode = os.stat(entry.path).st_mode if os.path.exists(entry.path) else stat.S_IFREG
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{entry.name!r} in '{folder}' is a pipe or a device, not a file. Remove it.")
        if (entry.name.endswith(".index.json") or entry.name in _CONFIGS) and entry.is_file():
            _check_json(entry.path)


def _check_json(file: str) -> None:
    """Check the size and the form of a config or a weight map, and what the latter names."""
    is_map = file.endswith(".index.json")
    kind, limit = ("weight map", _MAX_WEIGHT_MAP_BYTES) if is_map else ("configuration", _MAX_CONFIG_BYTES)
    if (size := os.path.getsize(file)) > limit:
        raise ValueError(f"'{file}' has {size:,} bytes, more than {limit:,}.")
    try:
        with open(file, encoding="utf-8") as opened:
            content = json.load(opened)
        names = list(content["weight_map"].values()) if is_map else []
        if not isinstance(content, dict) or not isinstance(content.get("metadata", {}), dict) or is_map and not names:
            raise ValueError("it does not hold what it should")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{file}' is no {kind} ({type(error).__name__}). Copy or download it again.") from error
    if strange := [name for name in names if not isinstance(name, str) or not _FILE.fullmatch(name)]:
        raise ValueError(
            f"'{file}' names the file {strange[0]!r:.200}; a weight map names files of its own folder only. Copy or "
            "download the model again."
        )
    if os.path.basename(file) == "config.json":
        check_sizes(content)


def check_sizes(config: Any, file: str = "config.json") -> None:
    """Check the numbers of a config, also of nested ones, before layers are counted and memory is taken by them.

    Raises:
        ValueError: for the first that no model has, with its field.
    """
    for part in objects_in(config):
        for field in sorted(part.keys() & LARGEST.keys()):
            values = part[field] if isinstance(part[field], list) else [part[field]]  # of each layer, or of all
            least, most = int(field.endswith("heads")), LARGEST[field]
            if not all(value is None or type(value) is int and least <= value <= most for value in values):
                raise ValueError(
                    f"{file} has {part[field]!r:.100} in {field!r}, but it must be an integer of at least {least} and at most {most:,}. "
                    "Copy or download it again."
                )


def objects_in(content: Any) -> Iterator[dict[str, Any]]:
    """The objects of a JSON value, at any depth and in lists, too."""
    todo = [content]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
            yield part


@contextmanager
def explaining(name: Any) -> Iterator[None]:
    """Explain what transformers raises for values that a config cannot have, such as a dtype that is none.

    Raises:
        ValueError: for errors that name neither the file nor a remedy.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"'{name}' cannot be loaded ({type(error).__name__}: {error}). Its config is damaged, or an argument has a value that "
            "it cannot have: look at these, or copy or download the model again."
        ) from error


__all__ = [
    "HUB_ARGUMENTS",
    "LARGEST",
    "check_folder_name",
    "check_peft_base",
    "check_saved_names",
    "check_sizes",
    "check_weights",
    "explaining",
    "is_hub_name",
    "is_local",
    "objects_in",
]
