"""The matrix as a picture: an SVG grid, a row for each pod that connects, a column for each port of a pod.

Readable in light and in dark, and without colour: what is allowed is full, what is denied is hatched. The
tooltip of a field has the pair, the verdict and what decided. The same cells make the same bytes. All text is
set by the XML library and made printable before, so that no name in a manifest is markup, or hides another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from xml.etree.ElementTree import Element, SubElement, tostring

from portwright.model.errors import InvalidInput
from portwright.policy.matrix import Cell

#: What a browser still shows without delay (it is about 15 MB).
MOST_CELLS = 40_000

#: Pixels: a field, and the margin.
_WIDE, _HIGH, _MARGIN = 18, 20, 16
#: Pixels between two ports of a pod, two pods, two namespaces.
_PORTS, _PODS, _NAMESPACES = 1, 4, 12
#: Pixels a character takes, at most, of labels and of ports' labels; and the most characters of a label.
_LABEL, _PORT, _MOST_LABEL = 7.0, 5.8, 44

_STYLE = """
.page { fill: #ffffff } text { fill: #1c2330; font: 11px system-ui, sans-serif }
.port { fill: #4a5568; font-size: 9px } .head { font-size: 14px; font-weight: 600 }
.allowed { fill: #0072b2 } .denied { fill: url(#pw-hatch); stroke: #c25400 } .itself { fill: #b8c0cc }
.paper { fill: #ffffff } .stripe { stroke: #c25400; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  .page { fill: #14171d } text { fill: #e6eaf0 } .port { fill: #a9b4c4 }
  .allowed { fill: #56b4e9 } .denied { stroke: #f0a040 } .itself { fill: #4a5362 }
  .paper { fill: #14171d } .stripe { stroke: #f0a040 }
}
"""


def picture(cells: Sequence[Cell]) -> str:
    """An SVG document of a matrix. Raises InvalidInput for more cells than MOST_CELLS."""
    if len(cells) > MOST_CELLS:
        why = f"a picture has room for {MOST_CELLS:,}; give it a part of the pods"
        raise InvalidInput("cells", f"{len(cells):,}", why)
    rows = _spaced(sorted({cell.source for cell in cells}, key=_by_namespace), _HIGH)
    columns = sorted(set(map(_column, cells)), key=_by_target)
    targets = _spaced([f"{target}" for target, _, _ in columns], _WIDE)
    left = _MARGIN + _width(map(_label, rows.names), _LABEL) + 8
    ports_high = _width((_port(column) for column in columns), _PORT) + 6
    top = _MARGIN + 40 + _width(map(_label, targets.names), _LABEL) + 4 + ports_high
    bottom = top + rows.length + 30 + _MARGIN
    svg = _document(max(left + targets.length + _MARGIN, _MARGIN * 2 + 400), bottom)
    _heading(svg, cells)
    for name, at in zip(rows.names, rows.places, strict=True):
        text = _text(svg, left - 8, top + at + _HIGH * 0.7, _label(name), anchor="end")
        _tip(text, name)
    of_target = groupby(zip(columns, targets.places, strict=True), key=lambda column: column[0][0])
    for target, group in of_target:
        those = list(group)
        middle = left + (those[0][1] + those[-1][1] + _WIDE) / 2
        text = _text(svg, middle + 4, top - ports_high - 4, _label(target), upward=True)
        _tip(text, target)
        for column, at in those:
            _text(svg, left + at + _WIDE / 2 + 3, top - 4, _port(column), upward=True, kind="port")
    across = dict(zip(columns, targets.places, strict=True))
    down = dict(zip(rows.names, rows.places, strict=True))
    for cell in cells:
        x, y = left + across[_column(cell)], top + down[cell.source]
        _tip(_field(svg, x, y, _kind(cell)), _told(cell))
    _legend(svg, top + rows.length + 30)
    for element in svg:
        element.tail = "\n"
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(svg, encoding="unicode") + "\n"


class _Line:
    """Names along an edge, each with its place in pixels, and the edge's length."""

    def __init__(self, names: Sequence[str], places: Sequence[int], length: int) -> None:
        self.names, self.places, self.length = names, places, length


def _spaced(names: Sequence[str], size: int) -> _Line:
    """Fields of that size side by side, with more room where another pod or namespace begins."""
    places: list[int] = []
    at = 0
    for number, name in enumerate(names):
        if number:
            before = names[number - 1]
            alike = _by_namespace(name)[0] == _by_namespace(before)[0]
            at += size + (_PORTS if name == before else _PODS if alike else _NAMESPACES)
        places.append(at)
    return _Line(names, places, at + size)


def _by_namespace(title: str) -> tuple[str, str]:
    namespace, _, name = title.partition("/")
    return namespace, name


def _column(cell: Cell) -> tuple[str, str, int]:
    """A port of a target; by each host endpoint that routes to it for itself."""
    return f"{cell.target} via {cell.via}" if cell.via else cell.target, cell.protocol, cell.port


def _by_target(column: tuple[str, str, int]) -> tuple[tuple[str, str], str, int]:
    return _by_namespace(column[0]), column[1], column[2]


def _kind(cell: Cell) -> str:
    if cell.source == cell.target:
        return "itself"
    return "allowed" if cell.allowed else "denied"


def _told(cell: Cell) -> str:
    verdict = "allowed" if cell.allowed else "denied"
    return f"{cell.source} to {_column(cell)[0]} {cell.protocol}/{cell.port}: {verdict}\n{cell.rule}"


def _port(column: tuple[str, str, int]) -> str:
    return f"{column[1]}/{column[2]}"


def _label(name: str) -> str:
    """The name, its middle left out where it is long; the tooltip has all of it."""
    text = _printable(name)
    half = _MOST_LABEL // 2
    return text if len(text) <= _MOST_LABEL else f"{text[:half]}…{text[1 - half :]}"


def _printable(text: str) -> str:
    """The text with what can't be seen, or turns text round, written as an escape; lines stay lines.

    Of the rest XML can hold everything.
    """
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)


def _width(texts: Iterable[str], of_one: float) -> int:
    return round(max(map(len, texts), default=0) * of_one)


def _document(width: float, height: float) -> Element:
    size = {"width": _number(width), "height": _number(height)}
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            **size,
            "viewBox": f"0 0 {size['width']} {size['height']}",
            "role": "img",
        },
    )
    SubElement(svg, "title").text = "Who may reach whom"
    SubElement(svg, "style").text = _STYLE
    pattern = SubElement(
        SubElement(svg, "defs"),
        "pattern",
        {
            "id": "pw-hatch",
            "width": "5",
            "height": "5",
            "patternUnits": "userSpaceOnUse",
            "patternTransform": "rotate(45)",
        },
    )
    SubElement(pattern, "rect", {"class": "paper", "width": "5", "height": "5"})
    SubElement(pattern, "line", {"class": "stripe", "y2": "5"})
    SubElement(svg, "rect", {"class": "page", "width": "100%", "height": "100%"})
    return svg


def _heading(svg: Element, cells: Sequence[Cell]) -> None:
    allowed = sum(cell.allowed for cell in cells)
    _text(
        svg, _MARGIN, _MARGIN + 10, f"Who may reach whom: {allowed:,} of {len(cells):,} allowed", kind="head"
    )
    _text(svg, _MARGIN, _MARGIN + 27, "rows connect to columns", kind="port")


def _legend(svg: Element, y: float) -> None:
    x = float(_MARGIN)
    for kind, text in (("allowed", "allowed"), ("denied", "denied"), ("itself", "itself, always allowed")):
        _field(svg, x, y - 16, kind)
        _text(svg, x + _WIDE + 6, y - 2, text)
        x += _WIDE + 24 + len(text) * _LABEL


def _field(svg: Element, x: float, y: float, kind: str) -> Element:
    place = {"x": _number(x), "y": _number(y), "width": _number(_WIDE), "height": _number(_HIGH)}
    return SubElement(svg, "rect", {"class": kind, "rx": "2", **place})


def _text(
    svg: Element, x: float, y: float, text: str, *, kind: str = "", anchor: str = "", upward: bool = False
) -> Element:
    at = {"x": _number(x), "y": _number(y)}
    if upward:
        at = {"transform": f"translate({at['x']} {at['y']}) rotate(-90)"}
    if anchor:
        at["text-anchor"] = anchor
    element = SubElement(svg, "text", {"class": kind, **at} if kind else at)
    element.text = text
    return element


def _tip(element: Element, text: str) -> None:
    SubElement(element, "title").text = _printable(text)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
