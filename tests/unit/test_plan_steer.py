"""The scripts that steer look-ups, and the routing rule that goes with them, by value."""

from __future__ import annotations

import errno
import socket

from portwright.kernel.rtnl_rule import rule_add, rule_del
from portwright.plan import steer


def test_look_ups_go_to_the_proxy_or_nowhere() -> None:
    """In this order: too many are dropped, each family goes to its listener; with no listener, dropped."""
    script = steer.steer("abc", ["pw2", "pw1"], 4053).splitlines()

    assert 'add element inet portwright_abc steered { "pw1", "pw2" }' in script
    rules = [line.rpartition('comment "')[2].rstrip('"') for line in script if "add rule" in line]
    assert rules == ["too many", "to the proxy4", "to the proxy6", "no proxy", "replies"]
    to_proxy = [line for line in script if "tproxy" in line]
    mark = f"meta mark set {steer.mark_of('abc'):#x}"
    assert [mark in line and "notrack" in line for line in to_proxy] == [True, True]
    assert "tproxy ip to 127.0.0.1:4053 accept" in to_proxy[0]
    assert "tproxy ip6 to [::1]:4053 accept" in to_proxy[1]
    assert script.index("flush chain inet portwright_abc steer") < script.index(to_proxy[0])


def test_what_is_steered_changes_without_its_rules() -> None:
    """One element each; what goes is added first, so that deleting it can't fail."""
    assert steer.change("", ["pw3"], ["pw1"]).splitlines() == [
        'add element inet portwright steered { "pw1" }',
        'add element inet portwright steered { "pw3" }',
        'delete element inet portwright steered { "pw1" }',
    ]
    assert steer.change("", [], []) == ""


def test_daemons_beside_each_other_have_marks_of_their_own() -> None:
    """A mark is of 32 bits and an instance's; the routing rule has it whole."""
    marks = {steer.mark_of(instance) for instance in ("", "0a1b2c3d", "ffffffff")}

    assert len(marks) == 3
    assert all(mark >> 16 == 0x7077 for mark in marks)


def test_a_rule_is_added_once_and_deleted_if_it_is_there() -> None:
    """As ``ip rule`` would, exclusively; one that is there already, or gone, is no error."""
    added = rule_add(socket.AF_INET6, mark=0x70770001, table=0x70770001, priority=77)
    deleted = rule_del(socket.AF_INET, mark=0x70770001, table=0x70770001, priority=77)

    assert added.name == "ip -6 rule add fwmark 0x70770001 lookup 1886846977 priority 77"
    assert deleted.name == "ip rule del fwmark 0x70770001 lookup 1886846977 priority 77"
    assert (added.type, added.tolerate) == (32, (errno.EEXIST,))
    assert (deleted.type, deleted.tolerate) == (33, (errno.ENOENT,))
    assert (added.body[0], deleted.body[0]) == (socket.AF_INET6, socket.AF_INET)
    assert added.body[1:] == deleted.body[1:]
    by_lo = rule_add(socket.AF_INET, mark=1, table=254, priority=76, iif="lo")
    assert by_lo.name == "ip rule add iif lo fwmark 0x1 lookup 254 priority 76"
    assert b"lo\0" in by_lo.body
