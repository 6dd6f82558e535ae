"""`tools/versions.py`: sets of versions, and the table of their results."""

import json
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def versions(tmp_path):
    """The functions of the script, which read and write below a folder of the test."""
    functions = runpy.run_path(str(ROOT / "tools" / "versions.py"))
    functions["table"].__globals__["WORK"] = tmp_path
    return functions


def write_result(folder: Path, name: str, failed: list[str]) -> None:
    folder.mkdir(parents=True)
    row = {"set": name, "python": "3.11", "python_version": "3.11.7", "date": "2026-11-30", "tests": "model"}
    row |= {"versions": {"transformers": "5.20.2", "torch": "2.13.0"}, "passed": 7, "skipped": 1, "failed": failed}
    (folder / "result.json").write_text(json.dumps(row))


def test_table_has_a_row_for_each_result_and_names_what_failed(versions, tmp_path):
    write_result(tmp_path / "a", "transformers-5.20", ["tests.test_saving::test_round_trip"])
    write_result(tmp_path / "b", "lowest", [])
    rows = [line for line in versions["table"]().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["set", "lowest", "transformers-5.20"]
    assert len({len(row) for row in cells}) == 1
    failed = cells[0].index("failed")
    assert [row[failed] for row in cells[1:]] == ["0", "1"]
    assert cells[2][cells[0].index("transformers")] == "5.20.2"
    assert "tests.test_saving::test_round_trip" in versions["table"]()


def test_table_shows_a_set_that_could_not_be_installed(versions, tmp_path):
    row = {"set": "newest", "python": "3.14", "date": "2026-11-30", "tests": "all", "problem": "not installed"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps(row))
    header, _, line = versions["table"]().splitlines()[:3]
    assert line.count("|") == header.count("|")
    assert "newest" in line and "3.14" in line and "not installed" in line


def test_every_test_of_the_model_exists(versions):
    assert all((ROOT / path).exists() for path in versions["TESTS"])


def test_page_has_a_place_for_the_table(versions):
    page = versions["PAGE"].read_text()
    assert page.count(versions["BEGIN"]) == page.count(versions["END"]) == 1
    assert page.index(versions["BEGIN"]) < page.index(versions["END"])
