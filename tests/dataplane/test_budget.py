"""What the data path may cost: the verifier's work, instructions, lines. The table is printed (-s)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from portwright.kernel.bpf import Collection, CollectionSpec
from portwright.kernel.bpf._fd import object_info
from portwright.node.switch import OBJECT

pytestmark = pytest.mark.netns

VERIFIED = 20_000
"""Instructions that the verifier looks at, of a million: the rest is room for policy, and for older
verifiers, which see more states."""
TRANSLATED = 3_000
"""Instructions of a program with its functions, after the kernel's rewriting."""
LINES = 2_000


class _Info(ctypes.Structure):
    """``struct bpf_prog_info`` (linux/bpf.h) as far as verified_insns; what is not asked for is padding."""

    _fields_ = (
        ("head", ctypes.c_ubyte * 16),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("between", ctypes.c_ubyte * 192),
        ("verified_insns", ctypes.c_uint32),
    )


def test_the_programs_keep_to_their_budget() -> None:
    """Each program is verified in at most VERIFIED steps and has at most TRANSLATED instructions."""
    over = []
    with Collection.load(CollectionSpec.load(OBJECT)) as collection:
        for name, program in sorted(collection.programs.items()):
            info = _Info()
            object_info(program.fd, info, name)
            size = info.xlated_prog_len // 8
            print(f"{name:14} verified {info.verified_insns:6} of {VERIFIED}, instructions {size:5} of")
            print(f"{'':14} {TRANSLATED}, {info.jited_prog_len} bytes of machine code")
            assert info.verified_insns > 100, "the kernel did not say"
            if info.verified_insns > VERIFIED or size > TRANSLATED:
                over.append(name)
    assert over == []


def test_the_data_path_stays_readable() -> None:
    """Its C, headers and comments included, has fewer than LINES lines."""
    files = [*OBJECT.parent.glob("*.[ch]")]
    total = sum(len(Path(f).read_text().splitlines()) for f in files)
    print(f"{total} lines in {len(files)} files")
    assert 500 < total < LINES
