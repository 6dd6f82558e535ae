"""What is published: the wheel, the source distribution, and the page that the package index makes of README.md."""

import email
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import hub_cache
import pytest
import torch
import yaml
from test_docs import prints_what_it_says, read_blocks

import retro_hf


ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/retro-hf/retro-hf"
FOLDERS = ("benchmarks", "docs", "examples", "hub_configs", "src", "tests", "tools")


def files_below(folder: Path) -> set[str]:
    """The files of a folder by their paths in the repository, but for what running them leaves there."""
    files = (path.relative_to(ROOT) for path in folder.rglob("*") if path.is_file())
    left = {"__pycache__", "demo_output"}
    return {file.as_posix() for file in files if left.isdisjoint(file.parts) and ".egg-info" not in str(file)}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source distribution, built from this tree without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def described(distributions) -> email.message.Message:
    """The metadata of the wheel, whose payload is the page on the package index."""
    with zipfile.ZipFile(distributions[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_wheel_has_the_packages_with_all_their_files_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = wheel.namelist()
    info = f"retro_hf-{retro_hf.__version__}.dist-info"
    packages = {name for name in names if not name.startswith(f"{info}/")}
    assert packages == {name.removeprefix("src/") for name in files_below(ROOT / "src")}
    assert {name.partition("/")[0] for name in packages} == {"retro_hf", "retro_hf_cli", "retro_hf_server"}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)
    assert "retro_hf/py.typed" in packages and any("/templates/" in name for name in packages)


def test_source_distribution_has_all_but_the_weights(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {file for folder in FOLDERS for file in files_below(ROOT / folder) if not file.endswith(".safetensors")}
    assert wanted <= names
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "CITATION.cff",
        "Makefile",
        "pyproject.toml",
    } <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert distributions[1].stat().st_size < 5e6


def test_page_on_the_package_index_has_only_links_that_work_there(described):
    page = described.get_payload(decode=True).decode()
    assert described["Description-Content-Type"].startswith("text/markdown")
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert all(target.startswith(("https://", "#")) for target in targets)
    tag = f"v{retro_hf.__version__}"
    bases = (f"{REPOSITORY}/blob/{tag}/", f"https://raw.githubusercontent.com/retro-hf/retro-hf/{tag}/")
    own = [target.removeprefix(base) for target in targets for base in bases if target.startswith(base)]
    assert len(own) > 20 and all((ROOT / path.partition("#")[0]).exists() for path in own)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert pictures and all(picture.startswith(bases[1]) for picture in pictures)


def test_metadata_names_the_project_s_pages(described):
    urls = dict(line.split(", ") for line in described.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Documentation", "Repository", "Changelog", "Issues"}
    for url in urls.values():
        assert url.startswith(REPOSITORY)
        path = url.partition("/main/")[2]
        assert not path or (ROOT / path).exists(), url


def test_version_and_date_are_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[(\d\S*)\] - (\S+)$", changes, re.MULTILINE).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert version == citation["version"] == retro_hf.__version__
    assert date == str(citation["date-released"])
    assert citation["repository-code"] == REPOSITORY


@pytest.mark.slow
def test_installed_wheel_runs_the_first_example_of_the_readme(distributions, tmp_path):
    """In a new environment, with nothing of the repository and an empty home."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    home = tmp_path / "home"
    home.mkdir()

    def run(*arguments: str, **options) -> str:
        done = subprocess.run([python, *arguments], capture_output=True, text=True, cwd=home, check=False, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"] if "+cpu" not in torch.__version__ else []
    run("-m", "pip", "install", "-q", "--no-compile", *index, f"torch=={torch.__version__}")
    run("-m", "pip", "install", "-q", "--no-compile", "-c", str(ROOT / "constraints.txt"), str(distributions[0]))
    installed = {line.split("==")[0].lower() for line in run("-m", "pip", "freeze").splitlines()}
    assert installed.isdisjoint({"accelerate", "datasets", "pandas", "scipy", "sentence-transformers"})
    assert len(installed) < 50

    clean = {"HOME": str(home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    clean["HF_HOME"] = os.environ["HF_HOME"]
    block = next(
        one for one in read_blocks((ROOT / "README.md").read_text(encoding="utf-8")) if one.language == "python"
    )
    hub_cache.fill(block.code)
    assert prints_what_it_says(block, run("-c", block.code, env=clean))
    assert "Datastore" in run("-m", "retro_hf_cli", "--help", env=clean)
