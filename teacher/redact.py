"""The API key in texts that are shown or saved: replaced by `***`, however it is written.

Standard library only.
"""

from __future__ import annotations

import base64
import functools
import html
import re

PART = 12  # characters; shorter parts of a key are not replaced
ESCAPE = re.compile(r"%[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\(?=[^\sa-zA-Z0-9])|&#?\w{1,8};")


def redact(text: str, key: str) -> str:
    """`text` with `***` for the API key and its parts of 12 characters and more.

    Also where it is written in base64 (standard or URL-safe, at any alignment), hex, or with characters escaped as in
    URLs, JSON, HTML or Python. Of a key below 12 characters only the whole is replaced, and not at all where it may
    be a word (local servers take any key).
    """
    parts = _parts(key)
    if not parts or not text:
        return text
    length = min(PART, len(key))
    marks = bytearray(len(text))
    view, places = text, list(range(len(text) + 1))  # place of each character of `view` in `text`
    for _ in range(4):  # escapes of escapes
        for i in range(len(view) - length + 1):
            if view[i : i + length] in parts:
                start, end = places[i], places[i + length]
                marks[start:end] = b"\1" * (end - start)
        plain, where, at = [], [], 0  # one level of escapes undone
        for escape in ESCAPE.finditer(view):
            word = escape[0]
            if word[0] == "&":
                word = html.unescape(word)
            else:
                word = chr(int(word.lstrip("%\\ux"), 16)) if word != "\\" else ""
            plain += [view[at : escape.start()], word]
            where += places[at : escape.start()] + [places[escape.start()]] * len(word)
            at = escape.end()
        if not plain:
            break
        view, places = "".join([*plain, view[at:]]), where + places[at:]
    pieces, at = [], 0
    for run in re.finditer(b"\1+", bytes(marks)):
        pieces += [text[at : run.start()], "***"]
        at = run.end()
    return "".join([*pieces, text[at:]])


@functools.lru_cache(maxsize=4)
def _parts(key: str) -> frozenset[str]:
    """All pieces of PART characters of the key as it is and as encoded."""
    if len(key) < PART:
        secret = len(key) >= 8 and any(map(str.isdigit, key)) and not key.isdigit()
        return frozenset([key]) if secret else frozenset()
    raw = key.encode()
    forms = [key, raw.hex(), raw.hex().upper()]
    for shift in range(3):
        # the first and last characters also hold bits of the neighbours
        inner = base64.b64encode(bytes(shift) + raw).decode().rstrip("=")[4 if shift else 0 : -1]
        forms += [inner, inner.translate(str.maketrans("+/", "-_"))]
    return frozenset(form[i : i + PART] for form in forms for i in range(len(form) - PART + 1))
