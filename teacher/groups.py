"""Which items wait for one reply: items by what is asked about them, in arrays.

A data set has 50,000 items; as objects they would take 60 MB, here about 60 bytes each (benchmarks/bench_teacher.py
measures it). Knows neither files nor Teachers. Standard library only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from teacher.handoff import Item

_OPEN, _ANSWERED = 1, 2


class Numbers:
    """Digest (hex digits) -> a number, in an open-addressed table of 18 to 36 bytes an entry.

    Only 64 bits of a digest are kept: among 100,000 of them two agree by chance once in four billion runs.
    """

    def __init__(self) -> None:
        self._count = 0
        self._make(1024)

    def get(self, digest: str) -> int | None:
        number = self._numbers[self._slot(int(digest[:16], 16))]
        return number if number >= 0 else None

    def put(self, digest: str, number: int) -> None:
        """Set or replace the number, 0 to 2**31 - 1."""
        if 3 * self._count > 2 * len(self._numbers):
            digests, numbers = self._digests, self._numbers
            self._make(2 * len(numbers))
            for old, at in zip(digests, numbers, strict=True):
                if at >= 0:
                    self._set(old, at)
        self._count += self._set(int(digest[:16], 16), number)

    def __contains__(self, digest: str) -> bool:
        return self.get(digest) is not None

    def _make(self, size: int) -> None:
        self._digests, self._numbers = array("Q", bytes(8 * size)), array("i", [-1]) * size

    def _set(self, digest: int, number: int) -> bool:
        """True if the digest is new."""
        slot = self._slot(digest)
        new = self._numbers[slot] < 0
        self._digests[slot], self._numbers[slot] = digest, number
        return new

    def _slot(self, digest: int) -> int:
        last = len(self._numbers) - 1  # the size is a power of two
        slot = digest & last
        while self._numbers[slot] >= 0 and self._digests[slot] != digest:
            slot = (slot + 1) & last
        return slot


class Groups:
    """Iterates over the open groups, each named by the number of its first item; `len` counts them.

    The first item of a group gets the reply, the others copies of it. Items that come later join a group that is open,
    or wait for a copy of an answered one's reply (`is_answered`); a group that was given up is asked about anew.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._first = Numbers()  # digest of the request -> number of the group
        self._next = array("i")  # number of an item -> the next one of its group
        self._state = bytearray()
        self._open = 0

    def add(self, item: Item, digest: str, answered: bool) -> int:
        """The item's group. `answered`: it has its reply already, which others of the group may copy."""
        number, first = len(self.items), self._first.get(digest)
        self.items.append(item)
        self._next.append(-1)
        self._state.append(0)
        if first is not None and not self._state[first]:
            first = None  # given up
        if first is None:
            self._first.put(digest, number)
            self._set(number, _ANSWERED if answered else _OPEN)
            return number
        if not answered:
            self._next[number], self._next[first] = self._next[first], number
            self._set(first, self._state[first] | _OPEN)
        elif not self.is_answered(first):  # asked about so far: this reply serves them all
            self._first.put(digest, number)
            self._next[number] = first
            self._set(first, 0)
            self._set(number, _ANSWERED | _OPEN)
            return number
        return first

    def __len__(self) -> int:
        return self._open

    def __iter__(self) -> Iterator[int]:
        """Open groups in the order of their first items; groups may be closed meanwhile."""
        return (number for number in range(len(self._state)) if self._state[number] & _OPEN)

    def __contains__(self, group: int | None) -> bool:
        return group is not None and bool(self._state[group] & _OPEN)

    def is_answered(self, group: int) -> bool:
        """Whether the group's first item has a reply that the others can copy."""
        return bool(self._state[group] & _ANSWERED)

    def waiting(self, group: int) -> list[Item]:
        """The items of an open group that have no reply yet, the first one first."""
        number = self._next[group] if self.is_answered(group) else group
        found = []
        while number >= 0:
            found.append(self.items[number])
            number = self._next[number]
        return found

    def close(self, group: int, answered: bool) -> None:
        """All its items have their reply, or (`answered` False) it is given up."""
        self._next[group] = -1
        self._set(group, _ANSWERED if answered else 0)

    def _set(self, number: int, state: int) -> None:
        self._open += (state & _OPEN) - (self._state[number] & _OPEN)
        self._state[number] = state
