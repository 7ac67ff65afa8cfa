"""Items in arrays: the compact tables behave like the lists and dicts that they stand for."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.groups import Groups, Numbers
from teacher.handoff import Item

QUESTIONS = Path("q")


def item_of(number: int) -> Item:
    action, rank, qid = number % 4, number % 3, str(number // 4)
    return Item(QUESTIONS, action, rank, qid)


def digest_of(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def test_numbers_are_a_dict():
    numbers, plain = Numbers(), {}
    for number in range(5000):
        digest = digest_of(number % 3500)  # some are set twice
        numbers.put(digest, number)
        plain[digest] = number
    assert {digest: numbers.get(digest) for digest in plain} == plain
    assert digest_of("never put") not in numbers and numbers.get(digest_of("never put")) is None


_STEP = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("close"), st.integers(0, 5), st.booleans()),
)


@settings(max_examples=300)
@given(st.lists(_STEP, max_size=30))
def test_groups_serve_every_item_once(steps):
    """Against a plain model: which items wait per request, and whether one of them has the reply."""
    groups = Groups()
    waiting: dict[int, list[Item]] = {}
    answered: set[int] = set()
    for number, (what, request, flag) in enumerate(steps):
        if what == "add":
            groups.add(item_of(number), digest_of(request), flag)
            if flag:
                answered.add(request)
            else:
                waiting.setdefault(request, []).append(item_of(number))
        elif request in waiting:
            (group,) = [each for each in groups if waiting[request][0] in groups.waiting(each)]
            assert groups.is_answered(group) == (request in answered)
            groups.close(group, flag)
            assert group not in groups
            del waiting[request]
            if flag:
                answered.add(request)
            elif request in answered:
                answered.discard(request)
        found = sorted(sorted(item.folder for item in groups.waiting(group)) for group in groups)
        assert found == sorted(sorted(item.folder for item in items) for items in waiting.values())
        assert len(groups) == len(waiting)
        for group in groups:
            if groups.is_answered(group):
                assert groups.items[group] not in groups.waiting(group)
            else:
                assert groups.items[group] == groups.waiting(group)[0]


def test_an_item_takes_a_few_bytes():
    """12,000 items of 3,000 questions; as objects in lists and dicts they took 900 bytes each."""
    tracemalloc.start()
    try:
        groups = Groups()
        for number in range(12_000):
            groups.add(item_of(number), digest_of(number), False)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list(groups)) == len(groups) == 12_000
    assert size / 12_000 < 250
