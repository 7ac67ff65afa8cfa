"""Text questions of the demo data set, similar to ScienceQA's: one function per kind.

A kind is a function `(rng: random.Random) -> Question` that draws the facts and writes the rationale; `demo.make_data`
places the gold choice, numbers the questions and makes the splits. Rationales have two to five sentences, several
wordings per step, and end with the answer; they contain decimals, abbreviations and newlines, as the real texts do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

PEOPLE = (
    ("Ann", "her"), ("Ben", "his"), ("Cara", "her"), ("Dan", "his"),
    ("Mr. Cole", "his"), ("Mrs. Lane", "her"), ("Dr. Reed", "her"), ("Ms. Park", "her"),
)  # fmt: skip
HOURS = ("7 a.m.", "9 a.m.", "2 p.m.", "6 p.m.")


@dataclass
class Question:
    """One question as drawn: `choices[0]` is the gold answer unless `answer` names another.

    `ordered` choices (Solution A, Solution B) are not shuffled. `images` maps file names to Pillow images.
    """

    about: tuple[str, str, str, str]  # subject, topic, category, skill
    grades: tuple[int, int]  # from, to
    question: str
    choices: list[str]
    solution: str
    hint: str = ""
    lecture: str = ""
    answer: int = 0
    ordered: bool = False
    caption: str = ""
    images: dict[str, Any] = field(default_factory=dict)


def conclude(answer: str) -> str:
    """The last sentence of a rationale, which names the answer. It has one form only: with "So, it is the answer." as
    another, a tiny model generates "So, the answer is the answer is ..."."""
    return f"So, the answer is {answer}."


def in_order(names: Iterable[str], gold: str) -> dict[str, Any]:
    """Choices in the same order in every question of a kind, as scales and lists of terms often are.

    Then the conclusion alone determines the letter, which even a model too small to search the options can learn:
    answers get better where rationales do.
    """
    choices = list(names)
    return {"choices": choices, "answer": choices.index(gold), "ordered": True}


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# -- natural science -------------------------------------------------------------------------------------


def speed(rng: Random) -> Question:
    """Compare distances covered in the same time."""
    thing = rng.choice(("car", "train", "boat", "bus", "truck", "bike"))
    hours, unit, tail = rng.choice((2, 4, 5)), rng.choice(("miles", "km")), rng.choice(("", ".5"))
    values = rng.sample(range(10, 100, 10), rng.choice((2, 2, 3)))
    fast = rng.random() < 0.6
    gold, *others = (f"{value}{tail} {unit}" for value in sorted(values, reverse=fast))
    word, compare = ("high", "farther") if fast else ("low", "shorter")
    same = rng.choice((f"Each {thing} moved for the same time.", f"Each {thing} spent {hours} hours moving."))
    count, ending, rest = ("three", "est", "the others") if others[1:] else ("two", "er", others[0])
    return Question(
        about=("natural science", "physics", "Force and motion", "Compare the speeds of moving objects"),
        grades=(2, 4),
        question=f"Compare the motion of {count} {thing}s. Which {thing} was moving at the {word}{ending} speed?",
        choices=[f"a {thing} that moved {value} in {hours} hours" for value in (gold, *others)],
        solution=f"Look at the distance each {thing} moved.\n"
        f"{same} The {thing} that moved {gold} moved a {compare} distance than {rest}.\n"
        f"So, the {thing} that moved {gold} had the {word}er speed.",
        lecture="An object's speed tells you how fast it is moving. Speed depends on distance and time.\n"
        "When the time is the same, the object that moves a farther distance has the higher speed.",
    )


CLASSES = {
    "mammal": (("bear", "wolf", "rabbit", "horse", "monkey"), "It has fur and feeds its young milk."),
    "bird": (("owl", "robin", "eagle", "duck", "penguin"), "It has feathers, two wings, and a beak."),
    "fish": (("salmon", "shark", "tuna", "eel"), "It lives underwater and has fins."),
    "reptile": (("snake", "turtle", "lizard", "gecko"), "It has dry skin with scales."),
    "insect": (("bee", "ant", "moth", "beetle"), "It has six legs and a hard outer body."),
}


def animals(rng: Random) -> Question:
    """Classify an animal: facts that are remembered, not read."""
    group, (who, _) = rng.choice(list(CLASSES)), rng.choice(PEOPLE)
    animal = rng.choice(CLASSES[group][0])
    space = rng.choice((" ", " ", " ", "\n"))  # ScienceQA's have lines
    return Question(
        about=("natural science", "biology", "Classification", "Identify mammals, birds, fish, reptiles, and insects"),
        grades=(2, 5),
        question=f"{who} saw {a(animal)}. What kind of animal is it?",
        **in_order(map(a, CLASSES), a(group)),
        # no "A wolf is a mammal, not a reptile." after the facts: a tiny model confuses a second such sentence with
        # the first and generates both over and over
        solution=f"Think about the traits of each animal.{space}{a(animal).capitalize()} is {a(group)}. "
        f"{CLASSES[group][1]} {conclude(a(group))}",
        lecture=rng.choice(("", "Mammals, birds, fish, reptiles, and insects are groups of animals.")),
    )


TRAITS = (
    ("pea plant", "flowers", ("purple", "white", "red", "yellow")),
    ("rabbit", "fur", ("brown", "white", "black", "gray")),
    ("chicken", "feathers", ("black", "white", "brown", "gray")),
    ("horse", "coat", ("black", "brown", "red", "white")),
)


def genes(rng: Random) -> Question:
    """Read the dominant allele and the genotype out of the hint."""
    organism, part, colors = rng.choice(TRAITS)
    dominant, recessive = (f"{color} {part}" for color in rng.sample(colors, 2))
    big = dominant[0].upper()
    genotype = rng.choice((big * 2, big + big.lower(), big.lower() * 2, big.lower() * 2))
    shows = genotype[0] == big
    alleles = f"at least one allele for {dominant}" if shows else f"two alleles for {recessive}"
    traits = ("the dominant trait", "the recessive trait")
    return Question(
        about=(
            "natural science",
            "biology",
            "Genes to traits",
            "Use dominant and recessive alleles to find a phenotype",
        ),
        grades=(6, 9),
        question=f"Which trait does the {organism} show in the color of its {part}?",
        hint=f"The allele for {dominant} ({big}) is dominant over the allele for {recessive} ({big.lower()}). "
        f"This {organism} has the genotype {genotype}.",
        **in_order(traits, traits[0 if shows else 1]),
        # only the conclusion has the words of a choice, as in demo.pictures.which_picture
        solution=f"Look at the genotype of the {organism}. The genotype {genotype} has {alleles}. "
        f"The allele for {dominant} hides the allele for {recessive}. "
        f"{conclude(traits[0 if shows else 1])}",
        lecture="An organism's genotype affects its phenotype. One dominant allele is enough to show a dominant trait."
        "\nA recessive trait shows only when both alleles are recessive.",
    )


PROPERTIES = {
    "stretchy": (("rubber band", "sock", "spring"), "gets longer when you pull on it"),
    "fragile": (("glass cup", "egg", "light bulb"), "breaks when you drop it"),
    "sticky": (("honey", "tape", "glue"), "sticks to other things"),
    "soft": (("pillow", "wool scarf", "bread"), "changes shape when you press it"),
    "hard": (("rock", "steel nail", "brick"), "keeps its shape when you press it"),
}


def properties(rng: Random) -> Question:
    """Match an object with its property."""
    word, (who, _) = rng.choice(list(PROPERTIES)), rng.choice(PEOPLE)
    thing = rng.choice(PROPERTIES[word][0])
    means = f"{a(word).capitalize()} object {PROPERTIES[word][1]}."
    applies = f"The {thing} {PROPERTIES[word][1]}."
    return Question(
        about=("natural science", "physics", "Materials", "Identify properties of an object"),
        grades=(1, 3),
        question=f"{who} looks at {thing if thing in ('honey', 'tape', 'glue', 'bread') else a(thing)}. "
        "Which word describes it best?",
        **in_order(PROPERTIES, word),
        solution=f"Look at the object. {applies} {means} {conclude(word)}",
        lecture=rng.choice(("", "A property tells you how an object looks, feels, or acts.")),
    )


# -- social science --------------------------------------------------------------------------------------

CAPITALS = {
    "Texas": "Austin", "Ohio": "Columbus", "Maine": "Augusta", "Iowa": "Des Moines", "Utah": "Salt Lake City",
}  # fmt: skip


def capitals(rng: Random) -> Question:
    """Remember a capital."""
    state, (who, _), hour = rng.choice(list(CAPITALS)), rng.choice(PEOPLE), rng.choice(HOURS)
    gold = CAPITALS[state]
    return Question(
        about=("social science", "geography", "State capitals", "Identify the capitals of U.S. states"),
        grades=(3, 5),
        question=f"{who} flies to the capital of {state} at {hour} Which city is it?",
        **in_order(CAPITALS.values(), gold),
        solution=f"Think about the capital of each U.S. state. The capital of {state} is {gold}. {conclude(gold)}",
        lecture=rng.choice(("", "Each U.S. state has one capital. The capital is where the government meets.")),
    )


GOODS = ("apple", "pear", "banana", "carrot", "sandwich", "cookie", "cake", "juice")


def trade(rng: Random) -> Question:
    """Read who has and wants what out of the hint."""
    (one, her), (two, his) = rng.sample(PEOPLE, 2)
    mine, yours, extra, spare = rng.sample(GOODS, 4)
    gold = f"{one} can trade {her} {mine} for {two}'s {yours}."
    wrong = [
        f"{one} can trade {her} {extra} for {two}'s {yours}.",
        f"{two} can trade {his} {spare} for {one}'s {mine}.",
        f"{two} can trade {his} {yours} for {one}'s {extra}.",
    ]
    return Question(
        about=("social science", "economics", "Basic economic principles", "Trade and specialization"),
        grades=(5, 8),
        question=f"What can {one} and {two} trade to each get what they want?",
        hint=f"{one} has {a(mine)} and {a(extra)} and wants {a(yours)}. "
        f"{two} has {a(yours)} and {a(spare)} and wants {a(mine)}. They meet at {rng.choice(HOURS)}",
        choices=[gold, *rng.sample(wrong, rng.choice((1, 2, 3)))],
        solution=f"Look at what each person has and wants. {one} wants the {yours}, and {two} has the {yours}. "
        f"{two} wants the {mine}, and {one} has the {mine}. So, {gold}",
        lecture="People trade when they give up one thing to get another.",
    )


# -- language science ------------------------------------------------------------------------------------

VERBS = (
    ("bake", "bakes", "baked", "bread"), ("paint", "paints", "painted", "a fence"),
    ("clean", "cleans", "cleaned", "the garage"), ("buy", "buys", "bought", "a book"),
    ("write", "writes", "wrote", "a letter"), ("drink", "drinks", "drank", "tea"),
    ("find", "finds", "found", "a coin"), ("sell", "sells", "sold", "a lamp"),
    ("wash", "washes", "washed", "the car"), ("sing", "sings", "sang", "a song"),
)  # fmt: skip
TENSES = {
    "past tense": "something that has already happened",
    "present tense": "something that is happening now",
    "future tense": "something that is going to happen",
}


def tense(rng: Random) -> Question:
    """Classify the verb of a sentence."""
    (who, _), (verb, verbs, past, thing) = rng.choice(PEOPLE), rng.choice(VERBS)
    gold = rng.choice(list(TENSES))
    form, sign = {
        "past tense": (past, f"The verb {past} is in the past tense."),
        "present tense": (verbs, f"The verb {verbs} ends in s."),
        "future tense": (f"will {verb}", f"The sentence uses will before the verb {verb}."),
    }[gold]
    when = rng.choice(("", f" at {rng.choice(HOURS)[:-1]}", " at home"))
    return Question(
        about=("language science", "verbs", "Verb tense", "Is the sentence in the past, present, or future tense?"),
        grades=(2, 4),
        question=f"Which tense does the sentence use?\n{who} {form} {thing}{when}.",
        **in_order(TENSES, gold),
        solution=f"Look at the verb in the sentence. {sign} It tells you about {TENSES[gold]}. {conclude(gold)}",
        lecture="\n".join(f"A {name} verb tells you about {meaning}." for name, meaning in TENSES.items()),
    )


def sentence_kind(rng: Random) -> Question:
    """Tell the four kinds of sentence apart."""
    (who, _), (verb, verbs, _, thing) = rng.choice(PEOPLE), rng.choice(VERBS)
    texts = {
        "statement": (f"{who} {verbs} {thing}.", "It makes a statement and ends with a period."),
        "question": (f"Will {who} {verb} {thing}?", "It asks a question and ends with a question mark."),
        "command": (f"Please {verb} {thing}.", "It tells you to do something and ends with a period."),
        "exclamation": (f"How well {who} {verbs}!", "It shows strong feeling and ends with an exclamation point."),
    }
    gold = rng.choice(list(texts))
    category, skill = "Sentences, fragments, and run-ons", "Identify the four kinds of sentences"
    return Question(
        about=("language science", "grammar", category, skill),
        grades=(4, 12),
        question=f"What kind of sentence is this?\n{texts[gold][0]}",
        **in_order(texts, gold),
        solution=f"Look at how the sentence ends. {texts[gold][1]} {conclude(gold)}",
        lecture=rng.choice(("", "There are four kinds of sentences: statement, question, command, and exclamation.")),
    )


TEXT_KINDS = (speed, animals, genes, properties, capitals, trade, tense, sentence_kind)
