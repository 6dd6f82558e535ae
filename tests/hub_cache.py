"""The cache of the Hub, filled from packages, so that the names in the docs load without a network.

What `huggingface_hub` would download is laid where it would put it: a snapshot per repository, and the name `main` for it.
"""

import os
import shutil
import sys
from functools import cache
from pathlib import Path
from unittest import mock

from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE


ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = "0" * 40


def _base() -> Path:
    import gguf
    from retrofit_smollm2 import load_base

    # transformers parses the file for the config, the weights and the tokenizer, and makes a table of names for each module.
    once = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **once):
        return load_base(ROOT / ".data" / "smollm2-base")


def _encoder() -> Path:
    from demo_data import minilm_path

    return minilm_path()


MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": _base, "sentence-transformers/all-MiniLM-L6-v2": _encoder}


def fill(text: str) -> None:
    """Put the models that a text names into `$HF_HOME`; others of the Hub stay out of reach."""
    for name in MODELS:
        if name in text:
            put(name)


def put(name: str) -> None:
    """Put one of `MODELS` into `$HF_HOME`; several processes may call it at once."""
    folder = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), FileLock(f"{ROOT / '.hub_cache.lock'}"):
        if (folder / "refs" / "main").exists():
            return
        sys.path.insert(0, str(ROOT / "examples"))
        try:
            source = MODELS[name]()
        finally:
            sys.path.remove(str(ROOT / "examples"))
        snapshot = folder / "snapshots" / SNAPSHOT
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            (snapshot / path.name).symlink_to(path.resolve())
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(SNAPSHOT)


def put_on_hub(name: str, folder: Path) -> str:
    """Lay a model where the Hub's client would have downloaded it."""
    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(folder, repository / "snapshots" / SNAPSHOT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SNAPSHOT)
    return name
