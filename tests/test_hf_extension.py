"""The extension of the Hub's command that docs/hf_extension.md describes."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint, version
from pathlib import Path


PAGE = Path(__file__).resolve().parents[1] / "docs" / "hf_extension.md"


def test_the_package_of_the_page_builds_and_its_script_is_ours(tmp_path):
    """`hf` looks for a console script of this name."""
    content = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "pyproject.toml").write_text(content)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        scripts = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    (target,) = re.findall(r"^hf-retro = (.+)$", scripts, re.MULTILINE)
    assert callable(EntryPoint("hf-retro", target, "console_scripts").load())
    assert tomllib.loads(content)["project"]["dependencies"] == ["retro-hf[serve]"]


def test_hf_calls_an_installed_extension(tmp_path):
    """In the folder where `hf extensions install` puts it, with the arguments as they are."""
    folder = tmp_path / ".local/share/hf/extensions/hf-retro"
    folder.mkdir(parents=True)
    programs = Path(sys.executable).parent
    manifest = {
        "owner": "me",
        "repo": "hf-retro",
        "repo_id": "me/hf-retro",
        "short_name": "retro",
        "executable_path": str(programs / "retro"),
        "type": "python",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = os.environ | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run([programs / "hf", "retro", "--version"], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == f"retro-hf {version('retro-hf')}", ran.stderr
