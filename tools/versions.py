"""Run the tests with the oldest, the locked and the newest versions of what retro-hf needs, and with each release of transformers.

    python tools/versions.py                    the sets lowest, constraints and newest
    python tools/versions.py newest --python 3.13
    python tools/versions.py transformers-5.20 --pytest "tests/test_generation.py -x"

Each set gets a virtual environment of its own below .versions, made by uv. A set that has been run with the same versions, the
same code and the same tests is not run again; `--again` does. The results are written into the table of docs/compatibility.md.
The exit code is 1 if a test failed, or a set could not be installed.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".versions"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- Made by tools/versions.py: -->", "<!-- until here. -->"

SETS = ("lowest", "constraints", "newest")
SHOWN = ("transformers", "torch", "numpy", "huggingface-hub", "datasets", "accelerate", "faiss-cpu", "peft", "trl")
# What touches transformers most.
TESTS = (
    "tests/test_compatibility_retro.py",
    "tests/test_oracle.py",
    "tests/test_generation.py",
    "tests/test_cache_retro.py",
    "tests/test_retrofit.py",
    "tests/test_saving.py",
    "tests/test_loading.py",
    "tests/test_gradient_checkpointing.py",
    "tests/training/test_trainer.py",
)


def uv(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run uv, which is installed beside this Python."""
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, **{"check": True, **options})


def torch_backend(python: str) -> list[str]:
    """Options for PyTorch's builds for the CPU; none where their index cannot be reached, and PyPI has to do."""
    probe = ["pip", "compile", "-", "--quiet", "--no-deps", "--torch-backend", "cpu", "--python-version", python]
    environment = {**os.environ, "UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}
    found = uv(*probe, input="torch", capture_output=True, env=environment, check=False)
    return ["--torch-backend", "cpu"] if found.returncode == 0 else []


def resolve(name: str, python: str, folder: Path, backend: list[str]) -> Path:
    """Write the exact versions of a set, and return the file that lists them."""
    inputs = [ROOT / "pyproject.toml"]
    options = ["--resolution", "lowest-direct"] if name == "lowest" else []
    if name == "constraints" or name.startswith("transformers-"):
        release = name.removeprefix("transformers-")
        locked = (ROOT / "constraints.txt").read_text().splitlines()
        if release != name:  # one release of transformers, with whatever of the rest it allows
            locked = [line for line in locked if not re.match(r"(transformers|tokenizers|huggingface_hub)==", line)]
            (folder / "release.in").write_text(f"transformers=={release}.*\n")
            inputs.append(folder / "release.in")
        (folder / "constraints.txt").write_text("\n".join(locked) + "\n")
        options += ["--constraints", folder / "constraints.txt"]
    versions = folder / "requirements.txt"
    versions.unlink(missing_ok=True)  # uv would prefer what it lists
    fixed = ["--extra", "test", "--python-version", python, "--no-annotate", "--no-header", "--quiet"]
    uv("pip", "compile", *inputs, *options, *fixed, *backend, "--output-file", versions)
    return versions


def install(versions: Path, python: str, folder: Path, backend: list[str]) -> Path:
    """Make the environment of a set, and return its Python."""
    environment = folder / "venv"
    interpreter = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv("venv", "--quiet", "--allow-existing", "--python", python, environment)
    uv("pip", "sync", "--quiet", "--python", interpreter, *backend, versions)
    uv("pip", "install", "--quiet", "--python", interpreter, "--no-deps", "--editable", ROOT)
    return interpreter


def run_tests(interpreter: Path, tests: list[str], folder: Path, workers: int) -> dict:
    """Run the tests, and return their numbers and the names of those that failed."""
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-n", str(workers), "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={report}"]
    with open(folder / "tests.log", "w") as log:
        subprocess.run([interpreter, "-m", "pytest", *options, *tests], cwd=ROOT, stdout=log, stderr=log, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest wrote no report; see {folder / 'tests.log'}.")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def state_of_the_code() -> str:
    """A digest of every file that a test could read."""
    listed = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "src",
        "tests",
        "examples",
        "pyproject.toml",
    ]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        if (ROOT / file).is_file():
            digest.update(file.encode() + b"\0" + (ROOT / file).read_bytes())
    return digest.hexdigest()


def run_set(name: str, python: str, tests: list[str], workers: int, again: bool) -> dict:
    """Run one set, unless its result is there already."""
    folder = WORK / f"{name}-py{python}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    which = "all" if not tests else "model" if tests == list(TESTS) else " ".join(tests)
    row = {"set": name, "python": python, "date": f"{datetime.now(UTC):%Y-%m-%d}", "tests": which}
    try:
        backend = torch_backend(python)
        versions = resolve(name, python, folder, backend)
        inputs = [versions.read_text(), state_of_the_code(), " ".join(tests)]
        row["inputs"] = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
        if result.exists() and not again and json.loads(result.read_text()).get("inputs") == row["inputs"]:
            print(f"{name}, Python {python}: kept")
            return json.loads(result.read_text())
        print(f"{name}, Python {python}: installing", flush=True)
        interpreter = install(versions, python, folder, backend)
    except subprocess.CalledProcessError as error:
        row = {name: value for name, value in row.items() if name != "inputs"}  # so that it is tried again
        command = " ".join(part for part in error.cmd[3:6] if not part.startswith("-"))
        row["problem"] = f"not installed: `uv {command}` failed"
        result.write_text(json.dumps(row, indent=1))
        return row
    listed = uv("pip", "list", "--quiet", "--format", "json", "--python", interpreter, capture_output=True)
    packages = json.loads(listed.stdout)
    row["versions"] = {package["name"]: package["version"] for package in packages}
    code = "import platform; print(platform.python_version())"
    row["python_version"] = subprocess.run([interpreter, "-c", code], capture_output=True, text=True).stdout.strip()
    print(f"{name}, Python {python}: running the tests", flush=True)
    row |= run_tests(interpreter, tests, folder, workers)
    result.write_text(json.dumps(row, indent=1))
    return row


def table() -> str:
    """The results of all sets that have been run, as Markdown."""
    rows = [json.loads(file.read_text()) for file in WORK.glob("*/result.json")]
    rows.sort(key=lambda row: (*(SETS.index(row["set"]) if row["set"] in SETS else 9,), row["set"], row["python"]))
    lines = [
        f"| set | Python | {' | '.join(SHOWN)} | tests | passed | failed | skipped | date |",
        "|" + "---|" * (len(SHOWN) + 7),
    ]
    failures = []
    for row in rows:
        if "problem" in row:
            blank = " | ".join("–" for _ in SHOWN)
            lines.append(
                f"| {row['set']} | {row['python']} | {blank} | {row['tests']} | {row['problem']} | – | – | {row['date']} |"
            )
            continue
        versions = " | ".join(row["versions"].get(package, "–") for package in SHOWN)
        numbers = f"{row['passed']} | {len(row['failed'])} | {row['skipped']}"
        lines.append(
            f"| {row['set']} | {row['python_version']} | {versions} | {row['tests']} | {numbers} | {row['date']} |"
        )
        failures += [f"- {row['set']}, Python {row['python_version']}: `{test}`" for test in row["failed"]]
    machine = f"{platform.system()} {platform.machine()}"
    lines += ["", f"Run on {machine}, on the CPU."]
    if failures:
        lines += ["", "Tests that failed:", "", *failures]
    return "\n".join(lines)


def main() -> int:
    """Run the sets that were asked for, write the page, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"{', '.join(SETS)}, or a release such as transformers-5.20")
    parser.add_argument("--python", default="3.11", help="version of the interpreter, which uv finds or fetches")
    parser.add_argument("--all", action="store_true", help="run all tests, not only those that touch transformers")
    parser.add_argument("--again", action="store_true", help="run sets again that have a result")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--pytest", default="", help="files of tests, or other arguments, instead of the usual ones")
    options = parser.parse_args()
    unknown = [name for name in options.sets if name not in SETS and not re.fullmatch(r"transformers-\d+\.\d+", name)]
    if unknown:
        parser.error(f"no set is called {unknown[0]!r}; there are {', '.join(SETS)} and transformers-X.Y")
    tests = options.pytest.split() or ([] if options.all else list(TESTS))
    rows = [run_set(name, options.python, tests, options.workers, options.again) for name in options.sets or SETS]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
    for row in rows:
        outcome = row.get("problem") or f"{row['passed']} passed, {len(row['failed'])} failed"
        print(f"{row['set']}, Python {row['python']}: {outcome}")
    return int(any(row.get("problem") or row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
