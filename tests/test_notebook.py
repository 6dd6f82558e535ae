"""The notebook runs as it stands, and prints what it shows."""

import json
from pathlib import Path

import hub_cache
import pytest

from .test_docs import Block, prints_what_it_says, run_python


NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


@pytest.mark.timeout(600)
def test_quickstart_prints_what_it_shows(monkeypatch, tmp_path):
    """Every cell but the one that installs, in an empty folder; outputs are compared with those in the file."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    hub_cache.fill(text)
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert "".join(cells[0]["source"]).startswith("%pip install")
    namespace = {}
    for number, cell in enumerate(cells[1:], start=1):
        code = "".join(cell["source"])
        printed = run_python(code, f"cell {number}", 0, namespace)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert shown, f"cell {number} shows nothing"
        assert prints_what_it_says(Block("", 0, "python", code, shown), printed), printed
