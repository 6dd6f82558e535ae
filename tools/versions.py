"""Run the tests with the oldest, the locked and the newest versions of what retro-hf needs, and with each release of transformers.

    python tools/versions.py                    the sets lowest, constraints and newest
    python tools/versions.py newest --python 3.13
    python tools/versions.py transformers-5.20 --pytest "tests/test_generation.py -x"

Each set gets a virtual environment of its own below .versions, made by uv. A set that has been run with the same versions, the
same code and the same tests is not run again; `--again` does. The results are kept in benchmarks/results/versions.json and shown in
the table of docs/compatibility.md.
The exit code is 1 if a test failed, or a set could not be installed.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".versions"
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- Made by tools/versions.py: -->", "<!-- until here. -->"

SETS = ("lowest", "constraints", "newest")
SHOWN = ("transformers", "torch", "numpy", "huggingface-hub", "datasets", "accelerate", "faiss-cpu", "peft", "trl")
TESTS = {
    # What touches transformers most.
    "model": (
        "tests/test_compatibility_retro.py",
        "tests/test_oracle.py",
        "tests/test_generation.py",
        "tests/test_cache_retro.py",
        "tests/test_retrofit.py",
        "tests/test_saving.py",
        "tests/test_loading.py",
        "tests/test_gradient_checkpointing.py",
        "tests/training/test_trainer.py",
    ),
    # What touches an optional package: each extra of pyproject.toml that the tests install, PEFT and TRL.
    "extras": (
        "tests/test_peft.py",
        "tests/test_trl.py",
        "tests/server/test_engine.py",
        "tests/server/test_server.py",
        "tests/server/test_tools.py",
        "tests/integrations",
        "tests/datastore/test_embedder.py",
        "tests/datastore/test_lexical.py",
        "tests/datastore/test_duplicates.py",
        "tests/evaluation/test_lm_eval.py",
        "tests/evaluation/test_questions.py::test_scores_equal_a_naive_transcription",
        "tests/evaluation/test_report.py",
    ),
}


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


def run_set(name: str, python: str, label: str, tests: list[str], workers: int, kept: dict | None) -> dict:
    """Run tests, which are called `label`, with one set, unless `kept` is the result for the same versions, code and tests."""
    folder = WORK / f"{name}-py{python}"
    folder.mkdir(parents=True, exist_ok=True)
    row = {"set": name, "python": python, "tests": label, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    try:
        backend = torch_backend(python)
        versions = resolve(name, python, folder, backend)
        inputs = "\n".join([versions.read_text(), state_of_the_code(), *tests])
        digest = hashlib.sha256(inputs.encode()).hexdigest()
        if kept is not None and kept.get("inputs") == digest:
            print(f"{name}, Python {python}: kept")
            return kept
        print(f"{name}, Python {python}: installing", flush=True)
        interpreter = install(versions, python, folder, backend)
    except subprocess.CalledProcessError as error:
        command = " ".join(part for part in error.cmd[3:6] if not part.startswith("-"))
        return row | {"problem": f"not installed: `uv {command}` failed"}
    listed = uv("pip", "list", "--quiet", "--format", "json", "--python", interpreter, capture_output=True)
    installed = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    print(f"{name}, Python {python}: running the tests", flush=True)
    outcome = run_tests(interpreter, tests, folder, workers)
    return row | {"versions": {package: installed[package] for package in SHOWN}, "inputs": digest} | outcome


def table(results: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        f"| set | Python | {' | '.join(SHOWN)} | tests | passed | failed | skipped | date |",
        "|" + "---|" * (len(SHOWN) + 7),
    ]
    failures = []
    for row in results:
        versions = row.get("versions", {})
        numbers = [row.get("problem", row.get("passed")), len(row.get("failed", [])), row.get("skipped", 0)]
        cells = [
            row["set"],
            row["python"],
            *(versions.get(one, "–") for one in SHOWN),
            row["tests"],
            *numbers,
            row["date"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        failures += [f"- {row['set']}, Python {row['python']}: `{test}`" for test in row.get("failed", [])]
    if failures:
        lines += ["", "Tests that failed:", "", *failures]
    return "\n".join(lines)


def summary(row: dict) -> str:
    """The numbers of a set in one line."""
    return f"{row['passed']} passed, {len(row['failed'])} failed, {row['skipped']} skipped"


def write_page(results: list[dict]) -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}")


def order(row: dict) -> tuple:
    """Where a result stands in the table."""
    python = [int(part) for part in row["python"].split(".")]
    return (
        SETS.index(row["set"]) if row["set"] in SETS else len(SETS),
        row["set"],
        python,
        row["tests"] != "model",
        row["tests"],
    )


def main() -> int:
    """Run the sets that were asked for, write the page, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"{', '.join(SETS)}, or a release such as transformers-5.20")
    parser.add_argument("--python", default="3.11", help="version of the interpreter, which uv finds or fetches")
    parser.add_argument(
        "--all", action="store_true", help="run all tests, not only those of the model and of the extras"
    )
    parser.add_argument("--only", choices=TESTS, help="run the tests of the model, or those of the extras, alone")
    parser.add_argument("--again", action="store_true", help="run sets again that have a result")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--pytest", default="", help="files of tests, or other arguments, instead of the usual ones")
    options = parser.parse_args()
    unknown = [name for name in options.sets if name not in SETS and not re.fullmatch(r"transformers-\d+\.\d+", name)]
    if unknown:
        parser.error(f"no set is called {unknown[0]!r}; there are {', '.join(SETS)} and transformers-X.Y")
    runs = {label: list(tests) for label, tests in TESTS.items() if options.only in (None, label)}
    if options.all or options.pytest:
        tests = options.pytest.split()
        runs = {", ".join(Path(one).stem for one in tests) or "all": tests}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    problems = 0
    for name, (label, tests) in itertools.product(options.sets or SETS, runs.items()):
        key = name, options.python, label
        same = [row for row in results if (row["set"], row["python"], row["tests"]) == key]
        kept = same[0] if same and not options.again else None
        row = run_set(*key, tests, options.workers, kept)
        results = sorted([*(one for one in results if one not in same), row], key=order)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_page(results)
        print(f"{name}, Python {options.python}, {label}: {row.get('problem') or summary(row)}", flush=True)
        problems += "problem" in row or bool(row["failed"])
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
