"""What the data path may cost: the verifier's work, instructions, lines. The table is printed (-s)."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from portwright.kernel.bpf import Collection, CollectionSpec
from portwright.kernel.bpf._fd import object_info
from portwright.node.switch import OBJECT

pytestmark = pytest.mark.netns

VERIFIED = 20_000
"""Instructions that the verifier looks at, of a million; older verifiers see more states."""
TRANSLATED = 5_000
"""Instructions of a program with its functions, policy's among them, after the kernel's rewriting."""
LINES = 2_000
"""Of code: comments and blank lines are free."""
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


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
    """Its C, headers included, has fewer than LINES lines of code."""
    files = [*OBJECT.parent.glob("*.[ch]")]
    texts = [_COMMENT.sub("", Path(f).read_text()) for f in files]
    total = sum(1 for text in texts for line in text.splitlines() if line.strip())
    print(f"{total} lines in {len(files)} files")
    assert 500 < total < LINES
