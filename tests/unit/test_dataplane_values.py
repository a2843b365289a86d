"""Words of the model as bytes of the maps."""

from __future__ import annotations

import ipaddress
from array import array

import pytest

from portwright.dataplane import policy_values, values
from portwright.dataplane.abi import PwPolicyConst, PwSet


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "255.255.255.255", "::", "fd00::1", "::ffff:192.0.2.1", "fe80::1%eth0"]
)
def test_addresses(text: str) -> None:
    """As Python's own reading of them has them, IPv4 mapped; a zone is no part of an address."""
    packed = ipaddress.ip_address(text).packed
    assert values.address(text) == (packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed)


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.256", "010.0.0.1", "fd00:::1", "10.0.0.0/8", "1.2.3.4\0"]
)
def test_what_is_no_address(text: str) -> None:
    """ValueError, whatever the reason."""
    with pytest.raises(ValueError, match=r"."):
        values.address(text)


def test_cell_keys_are_cell_keys() -> None:
    """Many at once are the same as one after the other."""
    numbers = [(1, 2, 3), (65_535, 1 << 18, 254), (0, 0, 0)]
    columns = [array("I", column) for column in zip(*numbers, strict=True)]
    assert policy_values.cell_keys(*columns) == b"".join(policy_values.cell_key(*each) for each in numbers)
    assert policy_values.cell_keys(*(array("I") for _ in range(3))) == b""


def test_a_set_with_intervals_to_spare() -> None:
    """What is not used never matches: its starts are above every service, its words and classes 0."""
    count = int(PwPolicyConst.SET_STARTS)
    entry = PwSet.unpack(policy_values.set_value(starts=(0, 80, 81), classes=(0, 1, 0), defaults=(7, 9)))
    assert array("I", entry.starts).tolist() == [0, 80, 81] + [0xFFFFFFFF] * (count - 3)
    assert array("I", entry.defaults).tolist() == [7, 9, 7] + [0] * (count - 3)
    assert entry.classes == bytes([0, 1, 0]) + bytes(count - 3)
    split = PwSet.unpack(policy_values.split_value(starts=(0, 80), sets=(4, 5)))
    assert array("I", split.starts).tolist() == [1, 80] + [0xFFFFFFFF] * (count - 2)
    assert array("I", split.defaults).tolist() == [4, 5] + [0] * (count - 2)
