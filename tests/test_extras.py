"""Optional packages: the base needs none of them, and each that is missing is named with the line that installs it."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from retro_hf import ChunkEmbedder, extras, precompute_neighbors
from retro_hf.datastore import LexicalSearcher, near_duplicates
from retro_hf.errors import MissingExtraError
from retro_hf.training import retrieve_passages, tokenize_questions
from retro_hf_cli.main import app


ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py")}
# What is imported under another name than it is installed under.
IMPORT_NAMES = {"faiss-cpu": "faiss", "llama-index-core": "llama_index"}


def names_in(requirements: list[str]) -> set[str]:
    """The names, without versions and extras, under which requirements are installed."""
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def calls_of_load() -> list[str]:
    """The modules that the package asks `extras.load` for."""
    calls = [node for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "extras.load"]


@pytest.fixture
def hide(monkeypatch):
    """A function that makes a package look as if it were not installed."""

    def hide(package: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.mark.parametrize("package", extras.EXTRAS)
def test_every_optional_package_is_in_the_extra_that_its_error_names(package):
    installed = names_in(PROJECT["optional-dependencies"][extras.EXTRAS[package]])
    assert package in {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in installed}
    assert package in {module.partition(".")[0] for module in calls_of_load()}, f"nothing loads {package}"


@pytest.mark.parametrize("module", sorted(set(calls_of_load())))
def test_missing_package_is_named_with_the_line_that_installs_it(module, hide):
    package = module.partition(".")[0]
    hide(package)
    with pytest.raises(MissingExtraError, match=rf'`{package}`.*`pip install "retro-hf\[{extras.EXTRAS[package]}\]"`'):
        extras.load(module, "This test")


def test_package_that_lacks_one_of_its_own_is_not_called_missing(tmp_path, monkeypatch, hide):
    (tmp_path / "bm25s.py").write_text("import a_package_that_does_not_exist\n")
    hide("bm25s")
    monkeypatch.delitem(sys.modules, "bm25s")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_does_not_exist") as raised:
        extras.load("bm25s", "This test")
    assert not isinstance(raised.value, MissingExtraError)


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("bm25s", lambda: LexicalSearcher.build(None)),
        ("datasets", lambda: precompute_neighbors([], None)),
        ("datasets", lambda: retrieve_passages([], None)),
        ("datasets", lambda: tokenize_questions([], None, neighbor_size=8)),
        ("datasketch", lambda: near_duplicates([], None)),
    ],
)
def test_feature_says_which_extra_it_needs(package, use, hide):
    hide(package)
    with pytest.raises(MissingExtraError, match=re.escape(f"retro-hf[{extras.EXTRAS[package]}]")):
        use()


def test_embedder_with_another_recipe_says_which_extra_it_needs(tmp_path, hide):
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.StaticEmbedding"}]')
    hide("sentence_transformers")
    with pytest.raises(MissingExtraError, match=r"retro-hf\[sentence-transformers\]"):
        ChunkEmbedder.from_pretrained(tmp_path)


def test_every_extra_that_a_text_names_exists():
    """In messages, docstrings, documentation and examples."""
    pages = [*SOURCES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    named = {
        extra.strip(): page
        for page in pages
        for extras_of in re.findall(r"retro-hf\[([\w, -]+)\]", page.read_text(encoding="utf-8"))
        for extra in extras_of.split(",")
    }
    assert named.keys() <= PROJECT["optional-dependencies"].keys(), named


def test_every_command_that_a_message_names_exists():
    texts = [node.value for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    messages = "\n".join(text for text in texts if isinstance(text, str))
    named = set(re.findall(r"`retro ([a-z]\w*)", messages))
    assert "build" in named and named <= typer.main.get_command(app).commands.keys()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", messages)) <= set(targets)


def test_package_imports_nothing_that_the_base_does_not_install():
    """But through `extras.load`, after it, or for type checkers."""
    installed = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names_in(PROJECT["dependencies"])}
    allowed = installed | sys.stdlib_module_names | {"retro_hf", "retro_hf_cli", "retro_hf_server"}
    # The server is imported after its extras have been looked for; they bring the last three.
    serving = {"fastapi", "prometheus_client", "uvicorn", "mcp", "pydantic", "starlette", "h11"}
    loaded = {module.partition(".")[0] for module in calls_of_load()}
    wrong = []
    for file, tree in SOURCES.items():
        for_checkers = [
            node for branch in ast.walk(tree) if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
            for node in ast.walk(branch)
        ]  # fmt: skip
        own = ast.unparse(tree)
        for node in ast.walk(tree):
            if node in for_checkers or not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "level", 0):
                continue
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for package in (module.partition(".")[0] for module in modules):
                if package in serving and file.parent.name == "retro_hf_server":
                    continue
                if package not in allowed and not (package in loaded and f"extras.load('{package}" in own):
                    wrong.append(f"{file.relative_to(ROOT)}: {package}")
    assert not wrong


HIDE_ABSENT = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *o: None if name.partition(".")[0] in ABSENT else find(name, *o))
"""


def base_distributions() -> set[str]:
    """The names of all that `pip install retro-hf` installs, with what that needs in its turn."""
    found, waiting = set(), sorted(names_in(PROJECT["dependencies"]))
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        needs = [Requirement(line) for line in metadata.requires(name) or ()]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_every_public_name_is_there_without_the_extras():
    base = base_distributions() | {"retro-hf"}
    packages = metadata.packages_distributions()
    absent = {name for name, owners in packages.items() if base.isdisjoint(map(canonicalize_name, owners))}
    assert {"accelerate", "datasets", "pandas", "sentence_transformers", "sklearn"} <= absent
    code = f"ABSENT = {absent!r}\n{HIDE_ABSENT}\nimport retro_hf, retro_hf.evaluation, retro_hf.training\n"
    code += "print([getattr(retro_hf, name).__name__ for name in retro_hf.__all__])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "ChunkEmbedder" in result.stdout
