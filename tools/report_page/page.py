"""Build the page: page.html with style, scripts, figures and data in one file that needs no network.

Texts of models, questions and Teachers are JSON in `<script type="application/json">` blocks, in which every `<` is
escaped, and reach the page through textContent only. The Content-Security-Policy names the hash of our script, so that
no other script runs, and lets the page load nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = ("base.js", "data.js", "list.js", "detail.js", "overview.js", "main.js")

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: file: 'self'"


def build_page(title: str, parts: Mapping[str, Any], drawings: Mapping[str, str]) -> str:
    """The whole HTML text. `parts`: id -> JSON-able data; `drawings`: name -> SVG (ours, with its texts escaped)."""
    script = "(() => {\n'use strict';\n" + "\n".join(_read(name) for name in SCRIPTS) + "\n})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    block = '<script type="application/json" id="{}">{}</script>'
    blocks = [block.format(name, as_json(value)) for name, value in parts.items()]
    figures = [f'<template id="figure-{html.escape(name)}">{svg}</template>' for name, svg in drawings.items()]
    fields = {
        "title": html.escape(title),
        "policy": f"{POLICY}; script-src 'sha256-{digest}'",
        "style": _read("style.css"),
        "figures": "\n".join(figures),
        "data": "\n".join(blocks),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _read("page.html"))


def as_json(value: Any) -> str:
    r"""Compact JSON that cannot end a script element: `<` is written as \u003c. NaN and infinity become null, as
    JSON.parse would refuse the whole block for one of them; half a surrogate pair, which damaged JSON can hold and
    UTF-8 cannot, becomes U+FFFD."""
    form = {"ensure_ascii": False, "separators": (",", ":")}
    text = json.dumps(value, **form)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda name: None), **form)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("<", "\\u003c")


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8").replace("\r\n", "\n")
