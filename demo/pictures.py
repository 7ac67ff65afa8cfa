"""Picture questions of the demo data set: only the picture decides the answer.

Same interface as `demo.questions`. Shapes vary in place and size; what answers a question is drawn large and in plain
colours, so that features of a small vision model, even with random weights, contain it.
"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from demo.questions import Question, a, conclude, in_order

RGB = tuple[int, int, int]
SIDE = 96  # pixels, width and height of every picture
COLORS = {
    "red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 150, 50), "yellow": (240, 210, 20),
    "purple": (140, 40, 170),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")


def canvas(background: RGB = (255, 255, 255)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), background)
    return image, ImageDraw.Draw(image)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, color: RGB) -> None:
    """Draw one shape centred on (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)


def larger_shape(rng: Random) -> Question:
    """Which colour the larger of two shapes has."""
    gold, other = rng.sample(list(COLORS), 2)
    big, small = rng.sample(SHAPES, 2)
    image, draw = canvas()
    left = rng.random() < 0.5
    big_x, small_x = (32, 80) if left else (64, 16)
    draw_shape(draw, big, big_x, rng.randint(36, 60), rng.randint(26, 30), COLORS[gold])
    draw_shape(draw, small, small_x, rng.randint(20, 76), rng.randint(8, 11), COLORS[other])
    category, skill = "Units and measurement", "Compare the size of objects"
    return Question(
        about=("natural science", "units-and-measurement", category, skill),
        grades=(1, 2),
        question="What color is the larger shape?",
        **in_order(COLORS, gold),
        solution=f"Look at the size of each shape. The larger shape is a {gold} {big}. "
        f"The {other} {small} is smaller. {conclude(gold)}",
        lecture=rng.choice(("", "Size tells you how large or how small an object is.")),
        caption=rng.choice(("A drawing of two shapes on a white background.", "Two shapes, one large and one small.")),
        images={"image.png": image},
    )


def solutions(rng: Random) -> Question:
    """Which of two flasks holds more particles; the flasks are choice images too."""
    answer = rng.randrange(2)
    color = rng.choice(("green", "purple"))
    few, many = rng.choice(((2, 7), (2, 8), (3, 9)))
    flasks = []
    for index in range(2):
        flask, draw = canvas((235, 235, 235))
        draw.rectangle((10, 8, 85, 88), fill=((250, 225, 190), (185, 220, 250))[index], outline=(60, 60, 60), width=3)
        cells = [(x, y) for x in (22, 39, 56, 73) for y in (20, 36, 52, 68)]
        for x, y in rng.sample(cells, many if index == answer else few):
            draw_shape(draw, "circle", x, y + rng.randint(0, 6), 6, COLORS[color])
        flasks.append(flask)
    image, _ = canvas((235, 235, 235))
    for index, flask in enumerate(flasks):
        image.paste(flask.resize((SIDE // 2, SIDE)), (index * SIDE // 2, 0))
    names = ("Solution A", "Solution B")
    gold, other = names[answer], names[1 - answer]
    return Question(
        about=("natural science", "chemistry", "Solutions", "Compare concentrations of solutions"),
        grades=(6, 8),
        question=f"Which solution has a higher concentration of {color} particles?",
        hint=f"The picture shows two solutions. Each flask holds 35.5 mL. Each {color} ball is one particle.",
        **in_order(names, gold),
        solution=f"Each flask holds the same volume. {gold} has more {color} particles than {other}. "
        f"So, {gold} has a higher concentration of {color} particles.",
        lecture="The concentration of a solution is higher when more particles are in the same volume.",
        caption="Two flasks with small balls in them.",
        images={"image.png": image, "choice_0.png": flasks[0], "choice_1.png": flasks[1]},
    )


REGIONS = {  # part of the map -> (left, top) of its quarter, colour of its land
    "north-west": ((0, 0), (245, 205, 130)),
    "north-east": ((1, 0), (150, 205, 245)),
    "south-west": ((0, 1), (165, 220, 150)),
    "south-east": ((1, 1), (245, 175, 205)),
}


def shaded_region(rng: Random) -> Question:
    """Which quarter of a map is shaded."""
    gold = rng.choice(list(REGIONS))
    image, draw = canvas((225, 240, 250))
    middle_x, middle_y = rng.randint(44, 52), rng.randint(44, 52)
    for name, ((left, top), color) in REGIONS.items():
        box = [4, 4, 92, 92]
        box[0 if left else 2], box[1 if top else 3] = middle_x, middle_y
        draw.rectangle(box, fill=(50, 50, 60) if name == gold else color, outline=(255, 255, 255), width=2)
    left, top = REGIONS[gold][0]
    where = f"It is at the {('top', 'bottom')[top]} and on the {('left', 'right')[left]}."
    found = rng.choice((f"The {gold} part of the map is shaded.", f"The shaded part is in the {gold}."))
    return Question(
        about=("social science", "geography", "Maps", "Read a map: cardinal directions"),
        grades=(2, 5),
        question="Which part of the map is shaded?",
        hint=rng.choice(("", "On this map, north is at the top.")),
        **in_order(REGIONS, gold),
        solution=f"Look at the dark part of the map. {where} {found} {conclude(gold)}",
        lecture=rng.choice(("", "Maps have four cardinal directions: north, south, east, and west.")),
        caption="A map with four parts. One part is dark.",
        images={"image.png": image},
    )


def magnets(rng: Random) -> Question:
    """Whether the facing poles of two magnets attract or repel: north is red, south is blue."""
    poles = {"north": (215, 40, 40), "south": (40, 70, 215)}
    one, two = rng.choice(("north", "south")), rng.choice(("north", "south"))
    image, draw = canvas()
    top = rng.randint(18, 30)
    gap = rng.randint(3, 6)
    draw.rectangle((0, top, 47 - gap, top + 48), fill=poles[one])
    draw.rectangle((48 + gap, top, 95, top + 48), fill=poles[two])
    if one == two:
        gold, alike, like, facing = "repel", "the same", "Like", f"Both poles that face each other are {one} poles."
    else:
        gold, alike, like, facing = "attract", "different", "Unlike", "A north pole faces a south pole."
    rule = rng.choice((f"Poles that are {alike} {gold}.", f"{like} poles {gold}."))
    skill = "Predict whether magnets will attract or repel each other"
    return Question(
        about=("natural science", "physics", "Magnets", skill),
        grades=(3, 8),
        question="Will these magnets attract or repel each other?",
        hint="Two magnets are placed as shown. North poles are red. South poles are blue.",
        **in_order(("attract", "repel"), gold),
        solution=f"Look at the two facing poles. {facing} {rule} So, these magnets will {gold} each other.",
        lecture="Magnets can pull or push on each other without touching. Different poles attract. "
        "Poles that are the same repel.",
        caption="The ends of two magnets are close to each other.",
        images={"image.png": image},
    )


LEVELS = {"5.5°C": "very cold", "15.5°C": "cool", "25.5°C": "warm", "35.5°C": "hot"}


def thermometer(rng: Random) -> Question:
    """Read the height of the red column."""
    gold = rng.choice(list(LEVELS))
    level = list(LEVELS).index(gold)
    image, draw = canvas()
    left = rng.randint(28, 38)
    draw.rectangle((left, 4, left + 28, 92), fill=(230, 230, 235), outline=(60, 60, 60), width=2)
    draw.rectangle((left + 3, 74 - 21 * level, left + 25, 90), fill=(220, 20, 20))
    for step in range(4):
        draw.line((left + 30, 74 - 21 * step, left + 38, 74 - 21 * step), fill=(20, 20, 20), width=2)
    return Question(
        about=("natural science", "units-and-measurement", "Weather and climate", "Read a thermometer"),
        grades=(2, 3),
        question="What temperature does this thermometer show?",
        hint=rng.choice(("", "The marks on the thermometer stand for 5.5°C, 15.5°C, 25.5°C, and 35.5°C.")),
        **in_order(LEVELS, gold),
        solution=f"Find the top of the red column. The top of the red column is at {gold}. "
        f"This is a {LEVELS[gold]} temperature. {conclude(gold)}",
        lecture=rng.choice(("", "A thermometer is a tool that measures temperature.")),
        caption="A thermometer on a white background.",
        images={"image.png": image},
    )


def which_picture(rng: Random) -> Question:
    """Choice images only, as some ScienceQA questions have: one of two pictures shows what is asked for."""
    answer = rng.randrange(2)
    gold, other = rng.sample(list(COLORS), 2)
    shape = rng.choice(SHAPES)
    images = {}
    for index in range(2):
        images[f"choice_{index}.png"], draw = canvas()
        color = COLORS[gold if index == answer else other]
        draw_shape(draw, shape, rng.randint(42, 54), rng.randint(42, 54), rng.randint(26, 34), color)
    names = ("the first picture", "the second picture")
    return Question(
        about=("natural science", "physics", "Materials", "Compare properties of objects"),
        grades=(1, 2),
        question=f"Which picture shows a {gold} {shape}?",
        **in_order(names, names[answer]),
        # only the conclusion has the words of a choice: a tiny adapter does not tell which of two names comes last
        solution=f"Look at the color in each picture. Picture {answer + 1} shows a {gold} {shape}. "
        f"Picture {2 - answer} shows {a(other)} {shape}. {conclude(names[answer])}",
        lecture=rng.choice(("", "Color and shape are properties of an object.")),
        caption="A shape on a white background.",
        images=images,
    )


PICTURE_KINDS = (larger_shape, solutions, shaded_region, magnets, thermometer, which_picture)
