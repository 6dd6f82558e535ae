"""Questions as people ask them, about lead paragraphs of Wikipedia's vital articles.

| kind | a question                                             | its answer           |
| ---- | ------------------------------------------------------ | -------------------- |
| year | In which year was Serengeti National Park established? | the year in the text |
| name | Who or what is this: 1968 film by Stanley Kubrick?     | the article's title  |

A year question is a sentence of the article turned around: "The park was established in 1940." Only sentences with one year and
one of a few forms of verbs are taken, so there are about 120. The sha256 of an article's id says whether its questions are for
the test, for validation (to choose settings by) or for training.

    python benchmarks/natural_questions.py    # counts and samples
"""

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from wiki_questions import YEAR, load_articles  # noqa: E402


# Upper ends in the range of the hash of an article's id.
PARTS = {"test": 0.5, "validation": 0.7, "train": 1.0}
# Past tenses, and what stands after "did".
ACTIVE = dict(
    pair.split(":")
    for pair in """
    achieved:achieve acquired:acquire became:become began:begin came:come captured:capture completed:complete
    conquered:conquer created:create declared:declare died:die discovered:discover ended:end entered:enter
    established:establish fell:fall formed:form founded:found gained:gain hosted:host introduced:introduce
    invented:invent joined:join launched:launch led:lead left:leave made:make married:marry moved:move opened:open
    premiered:premiere published:publish reached:reach received:receive released:release returned:return sank:sink
    signed:sign started:start took:take went:go won:win wrote:write
    """.split()
)
PASSIVE = r"(?:\w+ly |first |later )?(?:\w+ed|built|born|written|made|sunk|won|known|begun|held)"
WHEN = rf"(?:in (?:(?:early|late|mid) )?(?:\w+ )?|on \w+ \d{{1,2}}, |on \d{{1,2}} \w+ )(?P<year>{YEAR.pattern})"
SENTENCE_END = re.compile(r"(?<=[a-z)\]0-9][.!?]) (?=[A-Z])")


def year_question(article: dict) -> tuple[str, str] | None:
    """A question for a year in an article, and the year; None if no sentence can be turned around."""
    name = article["title"].split(" (")[0]
    subject = rf"(?:It|He|She|They|{re.escape(name)}|The (?!first|same|two|term|name|word|other)\w+)"
    verb = rf"(?: \w+ly| first)? (?:(?P<be>was|were) (?P<passive>{PASSIVE})|(?P<active>{'|'.join(ACTIVE)}))"
    pattern = re.compile(rf"{subject}{verb}(?P<more>(?: [^,;.]{{0,70}}?)?) {WHEN}")
    for sentence in SENTENCE_END.split(article["text"]):
        found = pattern.match(sentence)
        if found and len(YEAR.findall(sentence)) == 1:
            asked = (
                f"{found['be']} {name} {found['passive']}" if found["be"] else f"did {name} {ACTIVE[found['active']]}"
            )
            return f"In which year {asked}{found['more']}?", found["year"]
    return None


def natural_questions() -> list[dict]:
    """All questions, in a fixed order.

    Returns:
        `list[dict]`: with `kind`, `question`, `answers` (a list), `article` (the id) and `part`.
    """
    articles = load_articles()
    frequency = Counter(article["description"] for article in articles)
    rows = []
    for article in articles:
        asked = {"year": year_question(article)}
        description, name = article["description"], article["title"].split(" (")[0]
        # A description that several articles share, or that gives the title away, is no question.
        if 12 < len(description) < 110 and frequency[description] == 1 and name.lower() not in description.lower():
            asked["name"] = f"Who or what is this: {description}?", name
        share = int.from_bytes(hashlib.sha256(article["id"].encode()).digest()[:4], "big") / 2**32
        part = next(part for part, end in PARTS.items() if share < end)
        rows += [
            {"kind": kind, "question": pair[0], "answers": [pair[1]], "article": article["id"], "part": part}
            for kind, pair in asked.items()
            if pair
        ]
    return rows


if __name__ == "__main__":
    found = natural_questions()
    for key, count in sorted(Counter((row["kind"], row["part"]) for row in found).items()):
        print(*key, count)
    for kind in ("year", "name"):
        for row in [row for row in found if row["kind"] == kind][:10]:
            print(row["question"], "→", row["answers"][0])
