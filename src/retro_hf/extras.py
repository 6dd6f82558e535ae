"""Optional packages: which extra installs each, and an import that says so where one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import MissingExtraError


# The name under which a package is imported, and the extra of pyproject.toml that installs it.
EXTRAS = {
    "accelerate": "train",
    "bm25s": "bm25",
    "datasets": "train",
    "datasketch": "dedup",
    "fastapi": "serve",
    "lancedb": "lancedb",
    "langchain_core": "langchain",
    "llama_index": "llama-index",
    "lm_eval": "lm-eval",
    "matplotlib": "plot",
    "mcp": "mcp",
    "prometheus_client": "serve",
    "psutil": "train",
    "pypdf": "pdf",
    "qdrant_client": "qdrant",
    "ray": "ray",
    "sentence_transformers": "sentence-transformers",
    "torchmetrics": "qa",
    "uvicorn": "serve",
}


def load(module: str, purpose: str) -> Any:
    """Import a module of an optional package when it is first needed.

    Args:
        module (`str`): a package of `EXTRAS`, or a module inside one, such as `"matplotlib.figure"`.
        purpose (`str`): what needs it; the error message begins with it.
    Returns:
        The module.
    Raises:
        MissingExtraError: if the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        import_module(package)
        return import_module(module)
    except ModuleNotFoundError as error:
        # Another name is a package that the optional one lacks; its extra would not install that.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f'{purpose} needs the package `{package}`. Install it with `pip install "retro-hf[{EXTRAS[package]}]"`.'
        ) from error
