"""HTML from Python: elements whose text is always escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
Cell = str
"""A text, or HTML, which alone is not escaped."""


class Html(str):
    """A piece of HTML; other strings are text."""

    __slots__ = ()


def text(content: str) -> Html:
    """Return `content` escaped; control characters and halves of surrogate pairs become escape sequences."""
    if isinstance(content, Html):
        return content
    return Html(escape(content).translate(_CONTROLS).encode("utf-8", "backslashreplace").decode())


def element(name: str, *content: Cell, **attributes: str | float) -> Html:
    """Return an element; `class_` and `stroke_width` become attributes `class` and `stroke-width`."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{named}>{''.join(map(text, content))}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """Return the parts, one after the other."""
    return Html("".join(parts))


def definitions(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return a list of names with their values, but for empty ones."""
    terms = [join([element("dt", name), element("dd", value)]) for name, value in pairs if value]
    return element("dl", *terms)


def table(head: Iterable[str], rows: Iterable[Iterable[Cell]], numbers: Iterable[str] = ()) -> Html:
    """Return a table, in which the columns of the names in `numbers` are right-aligned; it scrolls where it is wide."""
    head, numbers = list(head), set(numbers)
    kinds = ["number" if name in numbers else "words" for name in head]

    def row(kind: str, cells: Iterable[Cell]) -> Html:
        return element("tr", *(element(kind, cell, class_=of) for cell, of in zip(cells, kinds, strict=True)))

    content = element("thead", row("th", head)), element("tbody", *(row("td", cells) for cells in rows))
    return element("div", element("table", *content), class_="scroll")
