"""transformers' own test files, of the release that is installed, out of its source distribution on the package index.

The distribution holds `tests/*.py` but none of the folders below it. What a file imports from there is empty here
(`_Absent`), or is ours (`_OURS`). Nothing of transformers' tests is copied into this repository.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers

from .generation import GenerationTesterMixin
from .pipelines import FeatureExtractionPipelineTests, TextGenerationPipelineTests


PACKAGE = "transformers_suites"

# Fields that every config has, with values that are no defaults, for `ConfigTester`.
_CONFIG_FIELDS = {
    "architectures": ["RetroDecoderForCausalLM"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "is_encoder_decoder": True,
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
_OURS = {
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "pipelines.test_pipelines_feature_extraction": {"FeatureExtractionPipelineTests": FeatureExtractionPipelineTests},
    "pipelines.test_pipelines_text_generation": {"TextGenerationPipelineTests": TextGenerationPipelineTests},
    "utils.test_configuration_utils": {"config_common_kwargs": _CONFIG_FIELDS},
}


def load(name: str) -> ModuleType:
    """The module `tests/<name>.py` of the installed transformers' source distribution.

    Raises:
        RuntimeError: if there is no client of the package index, or it cannot download the distribution.
    """
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(fetch(transformers.__version__))]
        sys.modules[PACKAGE] = package
        sys.meta_path.append(_AbsentFinder())
    with tempfile.TemporaryDirectory() as folder:
        # The tests of pipelines read a list of models on the Hub; there are none here.
        summary = Path(folder) / "reports" / "tiny_model_summary.json"
        summary.parent.mkdir()
        summary.write_text("{}")
        hub = mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=folder)
        # They also look for the sources of transformers beside them; the installed ones are the same.
        sources = mock.patch("transformers.utils.direct_transformers_import", lambda *args, **kwargs: transformers)
        with hub, sources:
            return import_module(f"{PACKAGE}.{name}")


def fetch(version: str) -> Path:
    """The folder `tests` of a release, downloaded into `$RETRO_HF_DATA` (by default `.data`) unless it is there.

    The client checks the archive against the sha256 that the index gives. The folder is moved into place in one step.
    """
    data = Path(os.environ.get("RETRO_HF_DATA") or Path(__file__).resolve().parents[2] / ".data")
    folder = data / "transformers-tests" / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        options = ["--no-deps", "--no-binary", "transformers", "--quiet", "--disable-pip-version-check"]
        command = [*_pip(), "download", *options, "--dest", scratch, f"transformers=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(
                f"The source distribution of transformers {version} could not be downloaded:\n{result.stderr.strip()}\n"
                "Check the connection to the package index."
            )
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            files = [member for member in archive if member.isfile() and Path(member.name).parts[1] == "tests"]
            archive.extractall(scratch, members=files, filter="data")
        tests = next(Path(scratch).glob("*/tests"))
        try:
            os.replace(tests, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _pip() -> list[str]:
    """The command that runs pip: that of this environment, or for environments made by uv, uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise RuntimeError("This environment has neither pip nor uv. Install one of them: `python -m ensurepip`.")


class _Absent(ModuleType):
    """A module or folder that the source distribution lacks: whatever is imported from it is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _AbsentFinder:
    """Finds the modules of the package that are in no file; asked last."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{PACKAGE}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _Absent(spec.name)
        vars(module).update(_OURS.get(spec.name.removeprefix(f"{PACKAGE}."), {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""
