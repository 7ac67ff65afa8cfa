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
from teacher.parsing import Refused, read_text

# in a sentence: could be taken for the name of a part, or for lists of scores
_TRAP = re.compile(r"rationale[\s_]?\d|\[\s*\[", re.IGNORECASE)
_MOST_LISTS = 20  # each is read to its end, so their number must be bounded
_LABEL = re.compile(r'(?<!\\)"rationale[\s_]?([0-9]{1,4})"\s?:\s?(?=[{\[])', re.IGNORECASE)
_LISTS = re.compile(r"\[\s?\[")
_OTHER_SCORES = re.compile(r'\[\s?\[|"\s?:\s?"?(?:[0-9]|\.[0-9])')  # beside the named parts
_BETWEEN = re.compile(r"[\s,{}\[\]]*")  # between two parts, also where each has an object of its own
# after the last part: the object ends, or the reply is cut off within a name
_BEHIND = re.compile(r'\s?,?\s?(?:[}\]]|"?\w*+"?\s?:?\s?\Z)')
_TWO_ENDS = re.compile(r"\}\s?,?\s?\}[^{}]*\Z")


# -- the request -----------------------------------------------------------------------------------------


def shared_text(request: Request) -> str | None:
    """The text of a scoring request without its rationale; None for a request that has to be sent by itself: the
    rationale does not stand at its end, or holds what could be taken for a part of the reply."""
    own, text = form(request.sentences), request.text.rstrip()
    apart = request.kind != SCORE or not text.endswith(own) or any(map(_TRAP.search, request.sentences))
    return None if apart else text.removesuffix(own)


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


def split(reply: str, count: int) -> list[str | Refused]:
    """The part of each of `count` rationales, or why it has none."""
    try:
        text = read_text(reply)
        return _named(text, count) or _in_order(text, count)
    except Refused as refused:
        return [refused] * count


def _named(text: str, count: int) -> list[str | Refused]:
    """The parts by their names; [] if none is named. Raises Refused where no name can be trusted."""
    labels = list(_LABEL.finditer(text))
    if not labels:
        return []
    numbers = [int(label[1]) for label in labels]
    if len(labels) > 2 * count:
        raise Refused("ambiguous", f"it holds {len(labels)} names of rationales, and {count} were sent")
    if strange := [number for number in numbers if not 1 <= number <= count]:
        raise Refused("ambiguous", f"it holds a rationale_{strange[0]}, and {count} rationales were sent")
    spans = list(_spans(text, labels))
    behind = text[spans[-1][1] :]
    behind = behind[_BEHIND.match(behind).end() :] if _BEHIND.match(behind) else ""  # else the last part is refused
    if _OTHER_SCORES.search(text[: labels[0].start()]) or _OTHER_SCORES.search(behind):
        raise Refused("ambiguous", "it holds other scores beside those by name")
    found: dict[int, str | Refused] = {}
    for number, times in Counter(numbers).items():
        if times > 1:
            found[number] = Refused("ambiguous", f"it holds rationale_{number} {times} times")
    inside = False  # the part before
    for number, (start, end, certain, goes_on) in zip(numbers, spans, strict=True):
        if inside or not certain:
            found[number] = Refused("ambiguous", f"where rationale_{number} begins or ends is not clear")
        found.setdefault(number, text[start:end])
        inside = goes_on
    missing = (number for number in range(1, count + 1) if number not in found)
    found |= {number: Refused("wrong_count", f"it holds no rationale_{number}") for number in missing}
    return [found[number] for number in range(1, count + 1)]


def _spans(text: str, labels: Sequence[re.Match]) -> Iterator[tuple[int, int, bool, bool]]:
    """(start, end, whether the end is certain, whether the next name is within) of the value behind each name."""
    for label, after in itertools.zip_longest(labels, labels[1:]):
        start, limit = label.end(), after.start() if after else len(text)
        end = _json_end(text, start)
        if end is not None:
            certain = bool(_BETWEEN.fullmatch(text, end, limit) if after else _BEHIND.match(text, end))
            yield start, end, certain and end <= limit, end > limit
        elif after:  # no JSON: sentences are quoted with quotes of their own
            end = start + len(text[start:limit].rstrip(" \n,"))
            closed = text[end - 1] in "}]"
            yield start, end, closed, not closed
        else:
            ends = _TWO_ENDS.search(text, start)
            yield start, ends.start() + 1 if ends else limit, True, False  # the parser of one reply wants its end


def _json_end(text: str, start: int) -> int | None:
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _in_order(text: str, count: int) -> list[str | Refused]:
    """The parts of lists without names. Raises Refused unless there is one for each rationale."""
    answers, position = [], 0
    for tried, match in enumerate(_LISTS.finditer(text)):
        if tried >= _MOST_LISTS:
            raise Refused("ambiguous", f"more than {_MOST_LISTS} lists of lists")
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
        usage = {name: (place + 1) * n // count - place * n // count for name, n in reply.usage.items()}
        yield dataclasses.replace(reply, usage=usage, cost_usd=reply.cost_usd and reply.cost_usd / count)
