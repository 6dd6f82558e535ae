"""transformers' suites are collected only where they are asked for (`pytest -m suites`); a line per target ends the run."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from .targets import TARGETS


# Marks of transformers' tests, which its own configuration declares.
_MARKS = (
    *("accelerate_tests", "all_flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_kernels_test"),
    *("flash_attn_test", "is_pipeline_test", "torch_compile_test"),
)


def pytest_configure(config: pytest.Config) -> None:
    for name in _MARKS:
        config.addinivalue_line("markers", f"{name}: a mark of transformers' own tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing the suites downloads them, so a run that would not run them leaves the file alone."""
    return True if config.option.markexpr != "suites" and collection_path.name == "test_suites.py" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_suites.py":
            item.add_marker("suites")


@pytest.fixture(autouse=True)
def deprecations_may_be_logged():
    """transformers' suites call deprecated names on purpose."""
    logger = logging.getLogger("transformers")
    raising = [handler for handler in logger.handlers if type(handler).__name__ == "_DeprecationError"]
    for handler in raising:
        logger.removeHandler(handler)
    yield
    for handler in raising:
        logger.addHandler(handler)


def pytest_terminal_summary(terminalreporter) -> None:
    """One line per target: passed, failed, not applicable."""
    outcomes: dict[str, dict[str, str]] = {}
    names = {
        "passed": "passed",
        "skipped": "not applicable",
        "failed": "failed",
        "error": "failed",
    }  # the worst is last
    for outcome, name in names.items():
        for report in terminalreporter.getreports(outcome):
            if "test_suites.py::" in report.nodeid:
                _, suite, test = report.nodeid.split("::")
                outcomes.setdefault(suite, {})[test] = name
    if not outcomes:
        return
    terminalreporter.section(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for target in (target for target in TARGETS if target.suite_name in outcomes):
        counts = Counter(outcomes[target.suite_name].values())
        columns = (f"{counts[name]:4} {name}" for name in ("passed", "failed", "not applicable"))
        terminalreporter.write_line(f"{target.name:40}" + " | ".join(columns))
