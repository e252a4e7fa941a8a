"""A self-contained HTML page: styles and scripts are inside, nothing is loaded from elsewhere."""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from moa_train.runtime.text import escape


def page(title: str, body: str, *, data: Any = None, scripts: Sequence[str] = ()) -> str:
    """Return a page.

    Args:
        title: plain text.
        body: HTML.
        data: JSON for the scripts, which read it as ``DATA``. Its strings must be `printable`.
        scripts: names of files of this package that run after the body.
    """
    package = files(__package__)
    # "<" could end the element; U+2028 and similar characters are escaped by json.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    code = "\n".join(package.joinpath(name).read_text("utf-8") for name in ("page.js", *scripts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{package.joinpath("page.css").read_text("utf-8")}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{text}</script>
<script>
{code}</script>
</body>
</html>
"""


def section(anchor: str, title: str, body: str, lead: str = "") -> str:
    """Return a section. ``title`` is plain text, ``lead`` and ``body`` are HTML."""
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{intro}\n{body}\n</section>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return large numbers: (name, number, small print), in plain text."""
    cells = (
        f'<div class="tile"><dt>{escape(name)}</dt><dd><strong>{escape(number)}</strong> '
        f"<small>{escape(note)}</small></dd></div>"
        for name, number, note in entries
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), name: str = "") -> str:
    """Return a table that a click on a column's title sorts.

    Args:
        head: titles of the columns, plain text.
        rows: cells as HTML. A cell may start with ``<!--VALUE-->``, the value that it is sorted by.
        numbers: the columns that are aligned to the right and start with the largest value when sorted.
        name: id of the table.
    """
    titles = "".join(
        f'<th scope="col"{_right(column, numbers)}><button type="button">{escape(text)}</button></th>'
        for column, text in enumerate(head)
    )
    lines = "\n".join(
        f"<tr>{''.join(f'<td{_right(column, numbers)}>{cell}</td>' for column, cell in enumerate(row))}</tr>"
        for row in rows
    )
    mark = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"{mark}><thead><tr>{titles}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _right(column: int, numbers: Sequence[int]) -> str:
    return ' class="number"' if column in numbers else ""


def plots(elements: Iterable[str]) -> str:
    """Return SVG elements next to each other."""
    return f'<div class="plots">{"".join(f"<div>{element}</div>" for element in elements)}</div>'


def facts(entries: Iterable[tuple[str, object]]) -> str:
    """Return names and values in plain text as a description list."""
    return f"<dl class=facts>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in entries)}</dl>"


def details(summary: str, body: str) -> str:
    """Return a part that is shown on request. ``summary`` is plain text, ``body`` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def preformatted(text: str) -> str:
    """Return lines of plain text."""
    lines = "\n".join(map(escape, text.split("\n")))
    return f'<pre tabindex="0">{lines}</pre>'
