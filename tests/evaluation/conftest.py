"""The tiny store and its training windows, built once; tests must not change them."""

from types import SimpleNamespace

import pytest
from tiny_training import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_world(tmp_path_factory.mktemp("world"))
