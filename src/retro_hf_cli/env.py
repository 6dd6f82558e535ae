"""The command that shows what a bug report needs: env."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import typer

from .output import say


commands = typer.Typer()

_PACKAGES = (
    "retro-hf",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "faiss-cpu",
    "numpy",
    "pyarrow",
    "accelerate",
    "datasets",
    "peft",
    "sentence-transformers",
    "fastapi",
    "uvicorn",
)


@commands.command(rich_help_panel="Help", epilog="retro env")
def env() -> None:
    """Show versions and hardware for a bug report. It shows no names of files, machines or users."""
    import os

    import torch

    lines = {"python": platform.python_version(), "platform": platform.platform(), "cores": str(os.cpu_count())}
    for package in _PACKAGES:
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    lines["threads of torch"] = str(torch.get_num_threads())
    available = torch.cuda.is_available()
    lines["GPU"] = (
        ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())) if available else "none"
    )
    lines["virtual environment"] = "yes" if sys.prefix != sys.base_prefix else "no"
    for name, value in lines.items():
        say(f"{name:<22} {value}")
