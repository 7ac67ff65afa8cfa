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
    ("Ann", "her"),
    ("Ben", "his"),
    ("Cara", "her"),
    ("Dan", "his"),
    ("Mr. Cole", "his"),
    ("Mrs. Lane", "her"),
    ("Dr. Reed", "her"),
    ("Ms. Park", "her"),
)
HOURS = ("7 a.m.", "9 a.m.", "2 p.m.", "6 p.m.")


@dataclass
class Question:
    """One question as drawn: `choices[0]` is the gold answer unless `answer` names another.

    `ordered` choices (Solution A, Solution B) are not shuffled. `images` maps file names to Pillow images. `facts`
    decides the answer together with choices and images, where question and hint have several wordings.
    """

    question: str
    choices: list[str]
    solution: str
    subject: str
    topic: str
    category: str
    skill: str
    grades: tuple[int, int]
    hint: str = ""
    lecture: str = ""
    answer: int = 0
    ordered: bool = False
    caption: str = ""
    images: dict[str, Any] = field(default_factory=dict)
    facts: str = ""


def conclude(answer: str) -> str:
    """The last sentence of a rationale, which names the answer. It has one form only: with "So, it is the answer." as
    another, a tiny model generates "So, the answer is the answer is ..."."""
    return f"So, the answer is {answer}."


def in_order(names: Iterable[str], gold: str) -> dict[str, Any]:
    """Choices in the same order in every question of a kind, as scales and lists of terms often are.

    Then the conclusion alone determines the letter, which even a model too small to search the options can learn.
    """
    choices = list(names)
    return {"choices": choices, "answer": choices.index(gold), "ordered": True}


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# -- natural science -------------------------------------------------------------------------------------

VEHICLES = ("car", "train", "boat", "bus", "truck", "bike")


def speed(rng: Random) -> Question:
    """Compare distances covered in the same time."""
    thing, hours, unit = rng.choice(VEHICLES), rng.choice((2, 4, 5)), rng.choice(("miles", "km"))
    tail = rng.choice(("", ".5"))
    values = rng.sample(range(10, 100, 10), rng.choice((2, 2, 3)))
    fast = rng.random() < 0.6
    gold, *others = sorted(values, reverse=fast)
    word, compare = ("higher", "farther") if fast else ("lower", "shorter")
    moved = [f"{value}{tail} {unit} in {hours} hours" for value in (gold, *others)]
    same = rng.choice((f"Each {thing} moved for the same time.", f"Each {thing} spent {hours} hours moving."))
    steps = [
        f"Look at the distance each {thing} moved.",
        same,
        f"The {thing} that moved {gold}{tail} {unit} moved a {compare} distance than the others."
        if others[1:]
        else f"The {thing} that moved {gold}{tail} {unit} moved a {compare} distance than {others[0]}{tail} {unit}.",
        f"So, the {thing} that moved {gold}{tail} {unit} had the {word} speed.",
    ]
    most = "est" if len(values) > 2 else "er"
    return Question(
        question=f"Compare the motion of {('two', 'three')[len(values) - 2]} {thing}s. "
        f"Which {thing} was moving at the {('high' if fast else 'low') + most} speed?",
        choices=[f"a {thing} that moved {way}" for way in moved],
        solution=f"{steps[0]}\n{steps[1]} {steps[2]}\n{steps[3]}",
        lecture="An object's speed tells you how fast it is moving. Speed depends on distance and time.\n"
        "When the time is the same, the object that moves a farther distance has the higher speed.",
        subject="natural science",
        topic="physics",
        category="Force and motion",
        skill="Compare the speeds of moving objects",
        grades=(2, 4),
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
    group, *rest = rng.sample(list(CLASSES), rng.choice((2, 3, 4)))
    gold, *others = (rng.choice(CLASSES[name][0]) for name in (group, *rest))
    # no "A wolf is a mammal, not a reptile." after them: a tiny model confuses a second such sentence with the first
    # and generates both over and over
    facts = [f"{a(gold).capitalize()} is {a(group)}.", CLASSES[group][1]]
    opening = "Think about the traits of each animal." + rng.choice((" ", " ", " ", "\n"))  # ScienceQA's have lines
    steps = [*facts, f"So, the {gold} is the {group}."]
    return Question(
        question=rng.choice((f"Select the {group}.", f"Which of these animals is {a(group)}?")),
        choices=[gold, *others],
        facts=group,
        solution=opening + " ".join(steps),
        lecture=rng.choice(("", "Mammals, birds, fish, reptiles, and insects are groups of animals.")),
        subject="natural science",
        topic="biology",
        category="Classification",
        skill=f"Identify {group}{'' if group == 'fish' else 's'}",
        grades=(2, 5),
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
    dominant, recessive = rng.sample(colors, 2)
    big = dominant[0].upper()
    genotype = rng.choice((big * 2, big + big.lower(), big.lower() * 2, big.lower() * 2))
    shows = genotype[0] == big
    gold, other = (dominant, recessive) if shows else (recessive, dominant)
    reason = (
        f"The genotype {genotype} has at least one allele for {dominant} {part}."
        if shows
        else f"The genotype {genotype} has two alleles for {recessive} {part}."
    )
    steps = [
        f"Look at the genotype of the {organism}.",
        reason,
        f"The allele for {dominant} {part} is dominant over the allele for {recessive} {part}.",
        f"So, the {organism} has {gold} {part}.",
    ]
    return Question(
        question=f"Based on this information, what is the {organism}'s phenotype for the color of its {part}?",
        hint=f"The allele for {dominant} {part} ({big}) is dominant over the allele for {recessive} {part} "
        f"({big.lower()}). This {organism} has the genotype {genotype}.",
        choices=[f"{gold} {part}", f"{other} {part}"],
        solution=" ".join(steps),
        lecture="An organism's genotype affects its phenotype. One dominant allele is enough to show a dominant trait."
        "\nA recessive trait shows only when both alleles are recessive.",
        subject="natural science",
        topic="biology",
        category="Genes to traits",
        skill="Use dominant and recessive alleles to find a phenotype",
        grades=(6, 9),
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
    word, *rest = rng.sample(list(PROPERTIES), rng.choice((3, 3, 4)))
    gold, *others = (rng.choice(PROPERTIES[name][0]) for name in (word, *rest))
    means = f"{a(word).capitalize()} object {PROPERTIES[word][1]}."
    steps = [
        "Look at each object.",
        means,
        rng.choice((f"The {gold} is {word}.", f"The {gold} {PROPERTIES[word][1]}.")),
        conclude(f"the {gold}"),
    ]
    return Question(
        question=f"Which object is {word}?",
        hint=rng.choice(("", means, "Select the better answer.")),
        choices=[gold, *others],
        facts=word,
        solution=" ".join(steps),
        lecture=rng.choice(("", "A property tells you how an object looks, feels, or acts.")),
        subject="natural science",
        topic="physics",
        category="Materials",
        skill="Identify properties of an object",
        grades=(1, 3),
    )


# -- social science --------------------------------------------------------------------------------------

CAPITALS = {
    "Texas": "Austin",
    "Ohio": "Columbus",
    "Maine": "Augusta",
    "Iowa": "Des Moines",
    "Utah": "Salt Lake City",
    "Georgia": "Atlanta",
}


def capitals(rng: Random) -> Question:
    """Remember a capital."""
    count = rng.choice((3, 4, 4))
    state, *others = rng.sample(list(CAPITALS), count)
    gold = CAPITALS[state]
    steps = [
        "Think about the capital of each U.S. state.",
        f"The capital of {state} is {gold}.",
        conclude(gold),
    ]
    return Question(
        question=f"What is the capital of {state}?",
        choices=[gold, *(CAPITALS[other] for other in others)],
        solution=" ".join(steps),
        lecture=rng.choice(("", "Each U.S. state has one capital. The capital is where the government meets.")),
        subject="social science",
        topic="geography",
        category="State capitals",
        skill="Identify the capitals of U.S. states",
        grades=(3, 5),
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
    steps = [
        "Look at what each person has and wants.",
        f"{one} wants the {yours}, and {two} has the {yours}.",
        f"{two} wants the {mine}, and {one} has the {mine}.",
        f"So, {gold}",
    ]
    return Question(
        question=f"What can {one} and {two} trade to each get what they want?",
        hint=f"{one} has {a(mine)} and {a(extra)} and wants {a(yours)}. "
        f"{two} has {a(yours)} and {a(spare)} and wants {a(mine)}. They meet at {rng.choice(HOURS)}",
        choices=[gold, *rng.sample(wrong, rng.choice((1, 2, 3)))],
        solution=" ".join(steps),
        lecture="People trade when they give up one thing to get another.",
        subject="social science",
        topic="economics",
        category="Basic economic principles",
        skill="Trade and specialization",
        grades=(5, 8),
    )


# -- language science ------------------------------------------------------------------------------------

VERBS = (
    ("bake", "bakes", "baked", "bread"),
    ("paint", "paints", "painted", "a fence"),
    ("clean", "cleans", "cleaned", "the garage"),
    ("buy", "buys", "bought", "a book"),
    ("write", "writes", "wrote", "a letter"),
    ("drink", "drinks", "drank", "tea"),
    ("find", "finds", "found", "a coin"),
    ("sell", "sells", "sold", "a lamp"),
    ("wash", "washes", "washed", "the car"),
    ("sing", "sings", "sang", "a song"),
)
TENSES = {
    "past tense": "something that has already happened",
    "present tense": "something that is happening now",
    "future tense": "something that is going to happen",
}


def tense(rng: Random) -> Question:
    """Classify the verb of a sentence."""
    (who, _), verb = rng.choice(PEOPLE), rng.choice(VERBS)
    gold = rng.choice(list(TENSES))
    form = {"past tense": verb[2], "present tense": verb[1], "future tense": f"will {verb[0]}"}[gold]
    when = rng.choice(("", f" at {rng.choice(HOURS)[:-1]}", " at home"))
    sign = {
        "past tense": f"The verb {form} is in the past tense.",
        "present tense": f"The verb {form} ends in s.",
        "future tense": f"The sentence uses will before the verb {verb[0]}.",
    }[gold]
    steps = [
        "Look at the verb in the sentence.",
        sign,
        f"It tells you about {TENSES[gold]}.",
        conclude(gold),
    ]
    return Question(
        question=f"Which tense does the sentence use?\n{who} {form} {verb[3]}{when}.",
        **in_order(TENSES, gold),
        solution=" ".join(steps),
        lecture="\n".join(f"A {name} verb tells you about {meaning}." for name, meaning in TENSES.items()),
        subject="language science",
        topic="verbs",
        category="Verb tense",
        skill="Is the sentence in the past, present, or future tense?",
        grades=(2, 4),
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
    steps = [
        "Look at how the sentence ends.",
        texts[gold][1],
        conclude(gold),
    ]
    return Question(
        question=f"What kind of sentence is this?\n{texts[gold][0]}",
        **in_order(texts, gold),
        solution=" ".join(steps),
        lecture=rng.choice(("", "There are four kinds of sentences: statement, question, command, and exclamation.")),
        subject="language science",
        topic="grammar",
        category="Sentences, fragments, and run-ons",
        skill="Identify the four kinds of sentences",
        grades=(4, 12),
    )


TEXT_KINDS = (speed, animals, genes, properties, capitals, trade, tense, sentence_kind)
