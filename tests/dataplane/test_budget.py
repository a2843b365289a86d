"""What the data path may cost: the verifier's work, look-ups, instructions, lines. Printed by -s."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.costs import look_up_table, rows, size_table, sizes
from portwright.dataplane import OBJECT

pytestmark = pytest.mark.netns

VERIFIED = 20_000
"""Instructions that the verifier looks at, of a million; older verifiers see more states."""
TRANSLATED = 5_000
"""Instructions of a program with its functions, policy's among them, after the kernel's rewriting."""
LINES = 2_000
"""Of code, of all programs and headers: comments and blank lines are free."""
ESTABLISHED, NEW = 1, 5
"""Look-ups of hash tables and tries that judge a packet: of flows, addresses, networks and verdicts."""
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def test_the_programs_keep_to_their_budget() -> None:
    """Each program is verified in at most VERIFIED steps and has at most TRANSLATED instructions."""
    found = sizes()
    print("\n".join(size_table(found)))
    assert {size.program for size in found} == {"pw_from_port", "pw_to_port"}
    assert all(size.verified > 100 for size in found), "the kernel did not say"
    assert [size for size in found if size.verified > VERIFIED or size.instructions > TRANSLATED] == []


def test_a_packet_keeps_to_its_look_ups() -> None:
    """On every path, in both families: an established packet is judged by at most one look-up, of its flow;
    one that opens a flow, or is denied one, by at most five."""
    costs = rows()
    print("\n".join(look_up_table(costs)))
    established = [
        c for c in costs if c.path.endswith(("established", "answer", "about a flow", "later fragment"))
    ]
    assert len(established) >= 7
    assert [c for c in established if c.judged_by > ESTABLISHED or c.policy] == []
    new = [c for c in costs if c not in established and "about nothing" not in c.path]
    assert len(new) >= 10
    assert [c for c in new if c.judged_by > NEW] == []
    # What is no flow is looked for twice: as the packet that it quotes, and as itself.
    assert [c for c in costs if c.judged_by > NEW + 1] == []
    # Every kind of look-up was seen: none is counted under a name that the source has no more.
    assert all(sum(getattr(c, kind) for c in costs) for kind in ("flow", "policy", "fragment", "other"))


def test_the_data_path_stays_readable() -> None:
    """Its C, every program and header, has fewer than LINES lines of code."""
    lines = {file.name: _lines(file) for file in OBJECT.parent.glob("*.[ch]")}
    total = sum(lines.values())
    print(f"{total} lines in {len(lines)} files")
    assert {"portwright.bpf.c", "clone.bpf.c", "early.bpf.c", "join.bpf.c", "abi.h"} < lines.keys()
    assert 500 < total < LINES


def _lines(file: Path) -> int:
    return sum(1 for line in _COMMENT.sub("", file.read_text()).splitlines() if line.strip())
