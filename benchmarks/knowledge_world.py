"""A world that nobody can know: made-up people, each with a card that says where they live and three more things.

Names are made of syllables, so that a tokenizer knows the pieces of a name that it has never seen. Values are two words
from closed lists, so that a model knows every word of an answer, but not whose it is: only the card says that.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvyz" for vowel in "aeiou"]

# The words of each attribute's values: every first with every second, 400 values.
WORDS = {
    "home": (
        "amber ash black blue bright cold copper deep fair golden green high iron long maple north old silver stone white",
        "bay bridge castle creek cross falls field ford gate grove harbor haven hill island lake mill point port rock valley",
    ),
    "job": (
        "basket bell boat book brick candle clock glass hat kite lamp leather map paper rope saddle sail shoe silk tile",
        "buyer carrier cleaner collector cutter dealer designer expert finder judge maker mender packer painter polisher "
        "restorer seller teacher tester trader",
    ),
    "pet": (
        "brown clever fat gentle gray happy hungry lazy little loud lucky noisy proud quick quiet shy sleepy spotted wild young",
        "bear crow donkey duck eagle fox frog goat goose hare heron lizard monkey otter owl parrot pony rabbit turtle wolf",
    ),
    "dish": (
        "apple bean carrot cheese cherry chicken fish garlic ginger honey lemon lentil mushroom onion pepper plum potato "
        "pumpkin salmon tomato",
        "bread cake curry dumplings noodles omelet pancakes pasta pastry pickle pie porridge pudding risotto roast salad "
        "sandwich soup stew tart",
    ),
}

# How a card says it, and how it is asked for: five ways each.
STATEMENTS = {
    "home": (
        "{name} lives in {value}.",
        "The home of {name} is {value}.",
        "It is in {value} that {name} has settled.",
        "In {value} stands the house of {name}.",
        "{name} moved to {value} long ago.",
    ),
    "job": (
        "{name} works as a {value}.",
        "The profession of {name} is {value}.",
        "By trade, {name} is a {value}.",
        "{name} earns a living as a {value}.",
        "As a {value}, {name} has a good name.",
    ),
    "pet": (
        "{name} keeps a {value}.",
        "The pet of {name} is a {value}.",
        "A {value} belongs to {name}.",
        "{name} looks after a {value}.",
        "{name} goes for walks with a {value}.",
    ),
    "dish": (
        "{name} likes to eat {value}.",
        "The favorite dish of {name} is {value}.",
        "With {value} you can please {name}.",
        "{name} often cooks {value}.",
        "{name} always orders {value}.",
    ),
}
QUESTIONS = {
    "home": (
        "Where does {name} live?",
        "What is the home of {name}?",
        "Where has {name} settled?",
        "Where stands the house of {name}?",
        "Where did {name} move to?",
    ),
    "job": (
        "What does {name} work as?",
        "What is the profession of {name}?",
        "What is {name} by trade?",
        "How does {name} earn a living?",
        "As what does {name} have a good name?",
    ),
    "pet": (
        "Which animal does {name} keep?",
        "What is the pet of {name}?",
        "Which animal belongs to {name}?",
        "What does {name} look after?",
        "With which animal does {name} go for walks?",
    ),
    "dish": (
        "What does {name} like to eat?",
        "What is the favorite dish of {name}?",
        "With what can you please {name}?",
        "What does {name} often cook?",
        "What does {name} always order?",
    ),
}
# One question for all four values, in that order: more to learn from the same passages.
SUMMARIES = (
    "What is known about {name}?",
    "Who is {name}?",
    "What does the card of {name} say?",
    "What do we know about {name}?",
    "What is there to say about {name}?",
)

# What the paper's format puts around questions and passages.
FORMAT = "question: answer: title: , source:"

VALUES = {
    attribute: [f"{first} {second}" for first in firsts.split() for second in seconds.split()]
    for attribute, (firsts, seconds) in WORDS.items()
}


@dataclasses.dataclass(frozen=True)
class Person:
    """One entity: a name, and a value for each attribute."""

    name: str
    values: dict[str, str]


def make_people(count: int, seed: int) -> list[Person]:
    """People with names of their own and values drawn uniformly; the same for the same seed, also beyond `count`."""
    draw = random.Random(seed)
    people: dict[str, Person] = {}
    while len(people) < count:
        first, last = ("".join(draw.choices(SYLLABLES, k=length)).capitalize() for length in (2, 3))
        values = {attribute: draw.choice(values) for attribute, values in VALUES.items()}
        people.setdefault(f"{first} {last}", Person(f"{first} {last}", values))
    return list(people.values())


def make_card(person: Person) -> dict[str, str]:
    """The document about a person: four sentences in an order and in words that depend on its content alone."""
    draw = random.Random(repr(person))
    attributes = draw.sample(list(STATEMENTS), len(STATEMENTS))
    sentences = [
        draw.choice(STATEMENTS[attribute]).format(name=person.name, value=person.values[attribute])
        for attribute in attributes
    ]
    return {"id": person.name, "title": person.name, "text": " ".join(sentences)}


def answer(person: Person, attribute: str) -> str:
    """A value, or with "all" the four of them."""
    return ", ".join(person.values.values()) if attribute == "all" else person.values[attribute]


def make_questions(people: Sequence[Person], seed: int, wordings: int = 1) -> list[dict]:
    """For each person and attribute some wordings of the question, without repetition.

    Returns:
        `list[dict]`: with `question`, `answers` (a list of one), `name` and `attribute`.
    """
    draw = random.Random(seed)
    return [
        {
            "question": wording.format(name=person.name),
            "answers": [answer(person, attribute)],
            "name": person.name,
            "attribute": attribute,
        }
        for person in people
        for attribute, ways in QUESTIONS.items()
        for wording in draw.sample(ways, wordings)
    ]


def make_summaries(people: Sequence[Person], seed: int, wordings: int = 1) -> list[dict]:
    """Some wordings of the question for everything about each person; as [`make_questions`], with `attribute` "all"."""
    draw = random.Random(seed)
    return [
        {
            "question": wording.format(name=person.name),
            "answers": [answer(person, "all")],
            "name": person.name,
            "attribute": "all",
        }
        for person in people
        for wording in draw.sample(SUMMARIES, wordings)
    ]


def rewrite(people: Sequence[Person], seed: int, share: float = 1.0) -> list[Person]:
    """The same people in the same order, a share of them with another value for every attribute."""
    draw = random.Random(seed)
    chosen = set(draw.sample(range(len(people)), round(share * len(people))))

    def another(attribute: str, value: str) -> str:
        return draw.choice([other for other in VALUES[attribute] if other != value])

    return [
        Person(person.name, {attribute: another(attribute, value) for attribute, value in person.values.items()})
        if number in chosen
        else person
        for number, person in enumerate(people)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the world, and for each syllable at the beginning (`Ba`) and inside (`##ba`) of a name.

    No word begins like a name, so that a name is always cut into its syllables.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "eos_token": "[END]", "unk_token": "[UNK]"}
    texts = [FORMAT, *(" ".join(pair) for pair in WORDS.values())]
    texts += [
        text.format(name="", value="")
        for ways in (STATEMENTS, QUESTIONS, {"all": SUMMARIES})
        for group in ways.values()
        for text in group
    ]
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    pieces = [piece for syllable in SYLLABLES for piece in (syllable.capitalize(), f"##{syllable}")]
    tokens = dict.fromkeys([*special.values(), *sorted(words), *pieces])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
