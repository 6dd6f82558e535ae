"""`tools/versions.py`: the sets of versions, and the table of their results."""

import json
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def versions() -> dict:
    """The functions of the script."""
    return runpy.run_path(str(ROOT / "tools" / "versions.py"))


def result(name: str, python: str, **more) -> dict:
    """The result of one set."""
    return {"set": name, "python": python, "tests": "model", "date": "2026-11-30", **more}


def test_table_has_a_row_for_each_result_and_names_what_failed(versions):
    shown = dict.fromkeys(versions["SHOWN"], "1.2.3")
    results = [
        result("lowest", "3.11", versions=shown, passed=7, skipped=1, failed=[]),
        result("newest", "3.11", versions=shown, passed=6, skipped=1, failed=["test_saving::test_round_trip"]),
        result("newest", "3.14", problem="not installed"),
    ]
    table = versions["table"](results)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row[:2] == "| "]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert [row[0] for row in cells] == ["set", "lowest", "newest", "newest"]
    assert [row[cells[0].index("passed")] for row in cells[1:]] == ["7", "6", "not installed"]
    assert [row[cells[0].index("failed")] for row in cells[1:3]] == ["0", "1"]
    assert "test_saving::test_round_trip" in table


def test_rows_are_ordered_by_set_and_python(versions):
    rows = [
        result(*key)
        for key in (("newest", "3.9"), ("transformers-5.20", "3.11"), ("newest", "3.11"), ("lowest", "3.12"))
    ]
    found = [(row["set"], row["python"]) for row in sorted(rows, key=versions["order"])]
    assert found == [("lowest", "3.12"), ("newest", "3.9"), ("newest", "3.11"), ("transformers-5.20", "3.11")]


def test_every_test_exists(versions):
    assert list(versions["TESTS"]) == ["model", "extras"]
    assert all((ROOT / path.partition("::")[0]).exists() for paths in versions["TESTS"].values() for path in paths)


def test_a_row_of_the_extras_follows_that_of_the_model(versions):
    rows = [result("newest", "3.11") | {"tests": tests} for tests in ("all", "extras", "model")]
    assert [row["tests"] for row in sorted(rows, key=versions["order"])] == ["model", "all", "extras"]


def test_the_page_shows_the_results(versions):
    """`python tools/versions.py` writes both."""
    page = versions["PAGE"].read_text()
    shown = page.partition(versions["BEGIN"])[2].partition(versions["END"])[0]
    assert shown.strip() == versions["table"](json.loads(versions["RESULTS"].read_text()))
