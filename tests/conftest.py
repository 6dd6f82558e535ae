"""What every test starts from: no network, fixed seeds, few threads, and no deprecated call of transformers."""

import atexit
import gc
import logging
import os
import random
import shutil
import tempfile
from pathlib import Path


# Before the first import of torch or transformers: both read these once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    # One throw-away cache for this run and its workers, which inherit the variable; HOME may be missing or read-only.
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="retro-hf-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

import datasets  # noqa: E402
import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hub_server import running_hub  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from hypothesis import settings  # noqa: E402


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
# A test may kill a process, which leaves what it has written, but it never takes the power away: to wait for the disk, ten
# times for each small store, shows nothing. `test_content_is_on_the_disk_before_its_name` watches the calls.
os.fsync = lambda descriptor: None
# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


_SOURCE_DISTRIBUTION = (Path(__file__).resolve().parents[1] / "PKG-INFO").exists()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, in a source distribution, what reads the weights that only the repository has."""
    if _SOURCE_DISTRIBUTION and item.get_closest_marker("weights"):
        pytest.skip("reads *.safetensors of hub_configs/, which are in the repository, not in the source distribution")


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collections to come: each full one would look through all of it."""
    gc.collect()
    gc.freeze()


class _DeprecationError(logging.Handler):
    """Raise where transformers only logs that something is deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            raise AssertionError(f"transformers logged a deprecation: {message}")


logging.getLogger("transformers").addHandler(_DeprecationError(logging.WARNING))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every source of random numbers before each test."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(0)
    return 0


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub, which the client of this process talks to, with a cache of its own."""
    with running_hub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        # Transformers keeps one client, which another test may have made for the real Hub.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses before it tries again
        yield server
        huggingface_hub.close_session()
