"""Several rationales of one question in one request (--together): joining their requests, splitting the reply.

The joined request has the images, the question and the rules once, and then every rationale in the form of its own
request. Its reply has one part per rationale, in one of three forms:

    {"scores": [[0.5, 1.0], [0.8]]}                                         a schema that fits any count: by order
    {"rationale_1": {"sentence_1": 0.5, ...}, "rationale_2": {...}}         an exact schema
    {"rationale_1": {"the first sentence": 0.5, ...}, "rationale_2": ...}   no schema

A part is a reply about its rationale alone, and is read as one (teacher/parsing.py). A score must never count for
another rationale, so lists without names are refused altogether unless there is one for each rationale, and a named
part unless its name and its bounds are certain.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from teacher.handoff import form
from teacher.interface import SCORE, TOGETHER, Reply, Request, Wording
from teacher.parsing import Refused, collapse, read_text

_LABEL = re.compile(r'(?<!\\)"rationale[\s_]?(\d{1,4})"\s?:\s?(?=[{\[])', re.IGNORECASE)
_LISTS = re.compile(r"\[\s?\[")
_BETWEEN = re.compile(r"[\s,{}\[\]]*")  # between two parts, also where each has an object of its own
_BEHIND = re.compile(r"\s?,?\s?(?:[}\]]|\Z)")  # after the last part: the object ends
_TWO_ENDS = re.compile(r"\}\s?,?\s?\}[^{}]*\Z")


# -- the request -----------------------------------------------------------------------------------------


def shared_text(request: Request) -> str | None:
    """The text of a scoring request without its rationale; None where that does not stand at its end."""
    own, text = form(request.sentences), request.text.rstrip()
    return text.removesuffix(own) if request.kind == SCORE and text.endswith(own) else None


def join(requests: Sequence[Request], wording: Wording) -> Request:
    """One request about the rationales of several that share text and images."""
    first, rationales = requests[0], tuple(request.sentences for request in requests)
    forms = ",\n".join(f'"rationale_{number}": {form(each)}' for number, each in enumerate(rationales, start=1))
    return dataclasses.replace(
        first,
        custom_id=f"{first.kind}{len(requests)}{first.custom_id.removeprefix(first.kind)}",
        text=f"{shared_text(first)}{wording.together}\n\n{{\n{forms}\n}}",
        sentences=tuple(itertools.chain.from_iterable(rationales)),
        rationales=rationales,
        form_note=wording.structured.get(TOGETHER, ""),
        exact_note=wording.exact.get(TOGETHER, ""),
    )


# -- the reply -------------------------------------------------------------------------------------------


def split(reply: str, rationales: Sequence[Sequence[str]]) -> list[str | Refused]:
    """The part of each rationale, or why it has none. `rationales`: their sentences, none where they are not known."""
    try:
        text = read_text(reply)
        named = _named(text, rationales)
        return named or _in_order(text, len(rationales))
    except Refused as refused:
        return [refused] * len(rationales)


def _named(text: str, rationales: Sequence[Sequence[str]]) -> list[str | Refused]:
    """The parts by their names; [] if none is named. Raises Refused where no name can be trusted."""
    count, hidden = len(rationales), _without_quotes(text, rationales)
    labels = list(_LABEL.finditer(hidden))
    if not labels:
        return []
    numbers = [int(label[1]) for label in labels]
    if strange := next((number for number in numbers if not 1 <= number <= count), None):
        raise Refused("ambiguous", f"it holds a rationale_{strange}, and {count} rationales were sent")
    if 0 in numbers:
        raise Refused("ambiguous", "it counts the rationales from 0")
    spans = list(_spans(text, labels))
    if _LISTS.search(hidden[: labels[0].start()]) or _LISTS.search(hidden[spans[-1][1] :]):
        raise Refused("ambiguous", "it holds the scores twice, by name and by order")
    found: dict[int, str | Refused] = {}
    for number, times in Counter(numbers).items():
        if times > 1:
            found[number] = Refused("ambiguous", f"it holds rationale_{number} {times} times")
    broken = False  # the part before has no certain end
    for number, (start, end, closed) in zip(numbers, spans, strict=True):
        if broken or not closed:
            found[number] = Refused("ambiguous", f"where rationale_{number} begins or ends is not clear")
        found.setdefault(number, text[start:end])
        broken = not closed
    missing = (number for number in range(1, count + 1) if number not in found)
    found |= {number: Refused("wrong_count", f"it holds no rationale_{number}") for number in missing}
    return [found[number] for number in range(1, count + 1)]


def _without_quotes(text: str, rationales: Sequence[Sequence[str]]) -> str:
    """The text where sentences that could be taken for a name are blanked; places stay the same."""
    traps = {collapse(sentence) for sentences in rationales for sentence in sentences if _LABEL.search(sentence)}
    for trap in sorted(traps, key=len, reverse=True):
        text = text.replace(f'"{trap}"', '"' + " " * len(trap) + '"')
    return text


def _spans(text: str, labels: Sequence[re.Match]) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether the end is certain) of the value behind each name."""
    for label, after in itertools.zip_longest(labels, labels[1:]):
        start, limit = label.end(), after.start() if after else len(text)
        end = _json_end(text, start)
        if end is not None and end <= limit:
            yield start, end, bool(_BETWEEN.fullmatch(text, end, limit) if after else _BEHIND.match(text, end))
        elif after:  # no JSON: sentences are quoted with quotes of their own
            end = start + len(text[start:limit].rstrip(" \n,"))
            yield start, end, text[end - 1] in "}]"
        else:
            ends = _TWO_ENDS.search(text, start)
            yield start, ends.start() + 1 if ends else limit, True  # the parser of one reply wants its end


def _json_end(text: str, start: int) -> int | None:
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _in_order(text: str, count: int) -> list[str | Refused]:
    """The parts of lists without names. Raises Refused unless there is one for each rationale."""
    answers, position = [], 0
    for match in _LISTS.finditer(text):
        if match.start() >= position and (end := _json_end(text, match.start())):
            answers.append(json.JSONDecoder(strict=False).raw_decode(text, match.start())[0])
            position = end
    if not answers:
        raise Refused("wrong_count" if "{" in text else "no_json", "no rationale with its scores was found")
    if any(answer != answers[0] for answer in answers):
        raise Refused("ambiguous", f"{len(answers)} answers that differ")
    lists = answers[0]
    if not all(isinstance(each, list) and not any(isinstance(x, (list, dict)) for x in each) for each in lists):
        raise Refused("wrong_count", "not one list of numbers for each rationale")
    if len(lists) != count:
        raise Refused("wrong_count", f"{len(lists)} lists of scores for {count} rationales")
    return [json.dumps({"scores": scores}) for scores in lists]


def shares(reply: Reply, count: int) -> Iterator[Reply]:
    """The reply `count` times, each with an equal share of the tokens and the dollars; their sums are the reply's."""
    for place in range(count):
        usage = {name: (place + 1) * all_ // count - place * all_ // count for name, all_ in reply.usage.items()}
        yield dataclasses.replace(reply, usage=usage, cost_usd=reply.cost_usd and reply.cost_usd / count)
