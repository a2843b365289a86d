"""The matrix as a picture: well-formed whatever names there are, with a field for each cell."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.policy.matrix import Cell, matrix
from portwright.policy.picture import MOST_CELLS, picture
from tests.fix_policy import DATA, states

SVG = "{http://www.w3.org/2000/svg}"
#: What tries to be markup, to end the document, to hide, or to be no XML at all.
HOSTILE = (
    "</title><script>alert(1)</script>",
    '" onload="alert(1)',
    "]]><!--",
    "&lt;&amp;&#60;",
    "\x00\x1b[31m\ufffe\ud800",
    "\u202egnp.exe",
    "x" * 5000,
)
ELEMENTS = {"svg", "title", "style", "defs", "pattern", "line", "rect", "text"}


def cell(source: str, target: str, *, allowed: bool = True, port: int = 80, rule: str = "r") -> Cell:
    """One cell."""
    return Cell(source=source, target=target, protocol="TCP", port=port, allowed=allowed, rule=rule)


def drawn(svg: str) -> Element:
    """The document, read as a browser reads it."""
    return fromstring(svg.encode())  # noqa: S314 - what we wrote ourselves a line above


def fields(root: Element) -> list[tuple[str, str]]:
    """(kind, tooltip) of each field."""
    found = [(rect.get("class", ""), rect.findtext(f"{SVG}title")) for rect in root.iter(f"{SVG}rect")]
    return [(kind, tip) for kind, tip in found if tip is not None]


@pytest.mark.parametrize("name", ["own", "e2e", "recipes"])
def test_every_cell_is_a_field(name: str) -> None:
    """A field for each cell, of the cell's verdict, whose tooltip has the pair, the port and the rule."""
    for state in states(name)[:10]:
        cells = matrix(state.policies, state.snapshot)
        found = fields(drawn(picture(cells)))
        wanted = []
        for each in cells:
            kind = "itself" if each.source == each.target else "allowed" if each.allowed else "denied"
            verdict = "allowed" if each.allowed else "denied"
            told = f"{each.source} to {each.target} {each.protocol}/{each.port}: {verdict}\n{each.rule}"
            wanted.append((kind, told))
        assert Counter(found) == Counter(wanted)


def test_fields_do_not_overlap() -> None:
    """Each field has a place of its own inside the picture, below and beside all labels."""
    [state] = states("e2e")[:1]
    root = drawn(picture(matrix(state.policies, state.snapshot)))
    rects = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    places = [(float(r.get("x", "")), float(r.get("y", ""))) for r in rects]

    assert len(places) == len(set(places)) == 486
    columns, rows = (sorted({place[axis] for place in places}) for axis in (0, 1))
    assert min(b - a for a, b in pairwise(columns)) > float(rects[0].get("width", ""))
    assert min(b - a for a, b in pairwise(rows)) > float(rects[0].get("height", ""))
    assert columns[-1] < float(root.get("width", "")) > 0 < rows[-1] < float(root.get("height", ""))


def test_same_cells_same_bytes() -> None:
    """The order in which cells come says nothing, and so nothing changes."""
    [state] = states("recipes")[:1]
    cells = matrix(state.policies, state.snapshot)

    assert picture(cells) == picture(cells)
    assert sorted(fields(drawn(picture(cells[::-1])))) == sorted(fields(drawn(picture(cells))))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_no_markup(name: str) -> None:
    """A hostile name is text: the document has only our elements and attributes, and stays well-formed."""
    svg = picture([cell(f"{name}/{name}", f"a/{name}", rule=name, allowed=False)])
    root = drawn(svg)

    assert {element.tag.removeprefix(SVG) for element in root.iter()} == ELEMENTS
    assert not [key for element in root.iter() for key in element.attrib if key.startswith("on")]
    assert all(c.isprintable() or c == "\n" for c in svg)
    labels = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert max(map(len, labels)) <= 50


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), st.booleans()), min_size=1, max_size=6))
def test_any_names_make_a_picture(pairs: list[tuple[str, str, bool]]) -> None:
    """Whatever the texts are, the result is XML."""
    cells = [cell(source, target, allowed=allowed, rule=source) for source, target, allowed in pairs]
    assert len(fields(drawn(picture(cells)))) == len(cells)


def test_a_picture_has_a_bound() -> None:
    """More cells than a browser shows are an error that says how many it may be."""
    many = [cell("a/a", "b/b")] * (MOST_CELLS + 1)
    with pytest.raises(InvalidInput, match=r"room for 40,000.*40,001"):
        picture(many)


def test_the_command_writes_it(tmp_path: Path) -> None:
    """``policy matrix --svg`` writes the picture beside its table; a file that can't be is an error."""
    files = ["-f", str(DATA / "recipes" / "topology.yaml")]

    def run(to: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("portwright"), "policy", "matrix", *files, "--svg", str(to)],
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(tmp_path / "m.svg")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) - 1 == len(fields(drawn((tmp_path / "m.svg").read_text()))) > 0
    failed = run(tmp_path / "no" / "m.svg")
    assert failed.returncode == 1
    assert "can't be written" in failed.stderr
