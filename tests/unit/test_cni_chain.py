"""Behind another CNI plugin: which devices get a tap, and what is answered, for results of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portwright.cni.chain import is_chained, result_of, wish_of
from portwright.cni.errors import CniError
from portwright.cni.request import CniRequest, parse
from portwright.model.errors import InvalidInput
from portwright.model.port import Chained, NetnsRef, Owner, Port, PortState

HOST = {"name": "veth1", "mac": "02:00:00:00:00:01"}


def request(netns: str, prev: dict[str, Any] | None, args: str = "", **conf: object) -> CniRequest:
    """An ADD of container ``vm`` with that prevResult."""
    body = {"cniVersion": "1.0.0", "name": "vms", "type": "portwright", "model": "tcfilter", **conf}
    if prev is not None:
        body["prevResult"] = {"cniVersion": "1.0.0", **prev}
    env = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "vm", "CNI_NETNS": netns, "CNI_IFNAME": "eth0"}
    return parse({**env, "CNI_ARGS": args}, json.dumps(body).encode())


def chained(name: str, number: int) -> Chained:
    """As the node has made it."""
    ref = NetnsRef(path="", cookie=1, boot_id="")
    port = Port(
        port_id=f"{number:016x}",
        network="vms",
        net_id=0,
        owner=Owner(kind="cni", network="vms", container_id="vm", ifname="eth0"),
        model="tcfilter",
        state=PortState.ATTACHED,
        ifname=name,
        rep_name="",
        mac=f"02:00:00:00:01:{number:02x}",
        mtu=1400,
        host=ref,
        sandbox=ref,
        tap=f"tap{number}",
    )
    return Chained(port=port, index=number)


def test_devices_of_the_sandbox_alone(tmp_path: Path) -> None:
    """Not the host's ends, not a guest's card of another plugin, not another namespace's; a path that leads
    to the same file is the same namespace."""
    netns = tmp_path / "ns"
    netns.touch()
    (tmp_path / "alias").symlink_to(netns)
    inside = [{"name": n, "sandbox": str(tmp_path / p)} for n, p in (("eth0", "ns"), ("net1", "alias"))]
    outside = [HOST, {"name": "tap9", "sandbox": "vm"}, {"name": "eth7", "sandbox": str(tmp_path / "other")}]
    asked = request(str(netns), {"interfaces": [*outside, *inside]})
    assert is_chained(asked)
    assert wish_of(asked).devices == ("eth0", "net1")


def test_without_a_device_before_us_it_is_a_port_as_ever() -> None:
    """No prevResult, or one without devices where CNI_IFNAME is not there; another model."""
    prev = {"interfaces": [HOST]}
    assert not is_chained(request("/n", None))
    assert not is_chained(request("/n", prev), ["lo"])
    assert is_chained(request("/n", prev), ["lo", "eth0"])
    assert not is_chained(request("/n", {"interfaces": [{"name": "e", "sandbox": "/n"}]}, model="veth"))


def test_each_card_has_its_devices_addresses() -> None:
    """By the index; by the kernel where there is none or none of that place; the host's end's are left."""
    prev: dict[str, Any] = {
        "interfaces": [HOST, {"name": "eth0", "sandbox": "/n"}, {"name": "net1", "sandbox": "/n"}],
        "ips": [
            {"address": "10.0.0.2/24", "interface": 1, "gateway": "10.0.0.1"},
            {"address": "fd00::2/64", "interface": None},
            {"address": "10.1.0.2/24", "interface": 2},
            {"address": "fd01::2/64"},
            {"address": "10.9.0.1/24", "interface": 0},
            {"address": "10.9.0.9/24", "interface": 99},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    asked = request("/n", prev)
    made = [chained("eth0", 1), chained("net1", 2)]
    result: Any = result_of(asked, made, [("eth0", "fd00::2"), ("net1", "fd01::2")]).to_dict("1.0.0")
    before = len(prev["interfaces"])
    assert result["interfaces"][:before] == prev["interfaces"]
    assert result["interfaces"][before:] == [
        {"name": "tap1", "sandbox": "/n"},
        {"name": "tap1", "mac": "02:00:00:00:01:01", "sandbox": "vm"},
        {"name": "tap2", "sandbox": "/n"},
        {"name": "tap2", "mac": "02:00:00:00:01:02", "sandbox": "vm"},
    ]
    assert "interface" not in result["ips"][5]  # of the one that points nowhere
    assert result["ips"][len(prev["ips"]) :] == [
        {"address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 4},
        {"address": "fd00::2/64", "interface": 4},
        {"address": "10.1.0.2/24", "interface": 6},
        {"address": "fd01::2/64", "interface": 6},
    ]
    assert (result["routes"], result["dns"]) == (prev["routes"], prev["dns"])


@pytest.mark.parametrize(
    ("args", "conf", "said"),
    [
        ("TC_REDIRECT_TAP_UID=-1", {}, "must be a number"),
        ("TC_REDIRECT_TAP_GID=4294967295", {}, "must be a number"),
        ("TC_REDIRECT_TAP_NAME=a/b", {}, "contains /"),
        ("", {"interfaces": [f"e{n}" for n in range(33)]}, "at most 32"),
        ("", {"interfaces": ["a b"]}, "interfaces[0]"),
        ("", {"dns": {"nameservers": ["192.0.2.1"]}}, "dns"),
        ("", {"routes": [{"dst": "0.0.0.0/0"}]}, "routes"),
    ],
)
def test_a_wish_is_judged(args: str, conf: dict[str, object], said: str) -> None:
    """Each wrong value is named."""
    asked = request("/n", {"interfaces": [{"name": "eth0", "sandbox": "/n"}]}, args, **conf)
    with pytest.raises((CniError, InvalidInput)) as refused:
        wish_of(asked)
    assert said in str(refused.value)


def test_a_taps_name_is_for_chained_ones() -> None:
    """It would be dropped in silence elsewhere."""
    with pytest.raises(CniError, match="TC_REDIRECT_TAP_NAME"):
        is_chained(request("/n", None, "TC_REDIRECT_TAP_NAME=t0"))
