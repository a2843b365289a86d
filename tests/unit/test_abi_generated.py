"""The Python mirror of the shared structs is what the generator makes from the C, to the byte."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from portwright.dataplane import abi, generate

RUFF = Path(sys.executable).with_name("ruff")


def test_abi_py_is_generated_from_the_object() -> None:
    """abi.py is what `python -m portwright.dataplane.generate` prints now, formatted."""
    if not generate.OBJECT.exists() or shutil.which("bpftool") is None:
        pytest.fail("build the objects first: make build")
    text = generate.render(generate.Btf(generate.OBJECT), generate.HEADER.read_text())
    done = subprocess.run(
        [str(RUFF), "format", "--stdin-filename", str(abi.__file__), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(str(abi.__file__)).read_text() == done.stdout, "run the generator (see its docstring)"


def test_both_sides_assert_the_same_sizes() -> None:
    """Each struct of abi.h has the size that it says there, which the build asserts, and packs to it."""
    asserted = dict(re.findall(r"struct (pw_\w+) \{ /\* (\d+) bytes \*/", generate.HEADER.read_text()))
    del asserted["pw_addr"]  # bytes in Python
    assert {generate.camel(name): int(size) for name, size in asserted.items()} == abi.SIZES
    for name, size in abi.SIZES.items():
        struct = getattr(abi, name)
        value = struct.unpack(bytes(range(256))[:size].ljust(size, b"\x5a"))
        packed = value.pack()
        assert len(packed) == size
        assert struct.unpack(packed) == value


def test_the_enums_are_those_of_the_header() -> None:
    """Every enum of abi.h is there with every value's name; the shared numbers have one source."""
    header = re.sub(r"/\*.*?\*/", "", generate.HEADER.read_text(), flags=re.DOTALL)
    enums = re.findall(r"enum (pw_\w+) \{(.*?)\}", header, flags=re.DOTALL)
    assert len(enums) >= 9
    for name, body in enums:
        values = {m.removeprefix("PW_"): int(v, 0) for m, v in re.findall(r"(\w+)\s*=\s*(\w+)", body)}
        assert {v.name: v.value for v in getattr(abi, generate.camel(name))} == values


def test_every_reason_has_a_word() -> None:
    """The reasons are numbered without a gap, and each has a name that people are shown."""
    reasons = [r for r in abi.PwReason if r is not abi.PwReason.R_MAX]
    assert [int(r) for r in reasons] == list(range(abi.PwReason.R_MAX))
    assert len({r.name for r in reasons}) == len(reasons)
