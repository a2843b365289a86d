"""Hostile CNI input through the real shim into a real daemon (issue, "What must be shown", 5).

Every field of a configuration gets every value of a table. A value is either harmless, and then the ADD
works and a DEL takes all of it away, or it is refused with one error object that names the field. After each
field the daemon is the same process, nothing is left, and the ports of others pass packets.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from portwright.cni.errors import CniCode
from tests.netns.hostile import REFUSALS, Answer, Json, Target, as_bytes, fields, replaced, target

pytestmark = pytest.mark.netns

CONF: Json = {
    "cniVersion": "1.1.0",
    "name": "evil",
    "type": "portwright",
    "ipMasq": True,
    "mtu": 1400,
    "mac": "02:00:00:00:00:01",
    "reach": ["calm"],
    "routes": [
        {"dst": "198.51.100.0/24", "gw": "169.254.1.1", "mtu": 1400, "advmss": 1360}
        | {"priority": 7, "table": 254, "scope": 0}
    ],
    "dns": {"nameservers": ["192.0.2.53"], "domain": "d", "search": ["s"], "options": ["o"]},
    "bandwidth": {"ingressRate": 10**9, "ingressBurst": 10**9, "egressRate": 10**9, "egressBurst": 10**9},
    "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.2"}],
    "ipam": {
        "type": "portwright",
        "ranges": [
            [{"subnet": "10.66.0.0/16", "rangeStart": "10.66.0.10", "rangeEnd": "10.66.90.90"}],
            [{"subnet": "fd00:66::/64"}],
        ],
        "routes": [{"dst": "0.0.0.0/0"}],
        "reserved": ["10.66.0.20", "10.66.0.32/30"],
    },
    "runtimeConfig": {
        "portMappings": [{"hostPort": 8081, "containerPort": 81, "protocol": "udp"}],
        "bandwidth": {"ingressRate": 10**9, "ingressBurst": 10**9},
        "ips": ["10.66.0.50"],
        "ipRanges": [[{"subnet": "10.67.0.0/16", "gateway": "10.67.0.1"}]],
        "mac": "02:00:00:00:00:02",
        "dns": {"searches": ["x"], "servers": ["192.0.2.54"], "options": ["y"]},
        "deviceID": "",
    },
    "args": {
        "cni": {"ips": ["10.66.0.51"], "mac": "02:00:00:00:00:03", "labels": [{"key": "k", "value": "v"}]}
    },
    "prevResult": {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": "/x", "mtu": 1500}],
        "ips": [{"address": "127.0.0.1/8", "gateway": "127.0.0.2", "interface": 0}],
        "routes": [{"dst": "203.0.113.0/24", "gw": "127.0.0.3"}],
        "dns": {"nameservers": ["192.0.2.55"]},
    },
}

DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]
#: A value of every type, and the worst of each.
VALUES: tuple[Any, ...] = (
    *(True, 0, -1, 1, 65536, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**400, 1.5, 1e308),
    *(
        "",
        " ",
        "x",
        "*",
        "0",
        "-1",
        "a\0b",
        "a\nb",
        "../../../etc/passwd",
        "/dev/null",
        "%s%n",
        "\ud800",
        "🦊" * 9,
    ),
    *(
        "10.66.0.999",
        "10.66.0.1/33",
        "::/0",
        "0.0.0.0",
        "255.255.255.255",
        "::1",
        "224.0.0.1",
        "fe80::1%eth0",
        "127.0.0.1",
    ),
    *("x" * 100_000, "'; drop table ports; --", "{ accept }", "$(reboot)"),
    *([], {}, [[]], [None], [{}], ["x"], [0], {"": ""}, {"x": {"y": []}}, DEEP, ["10.66.0.7"] * 500),
)


def with_value(path: tuple[str | int, ...], value: Any) -> Json:
    """The configuration with ``value`` at ``path``; a chain only where its result is what is attacked."""
    base = CONF if path[0] == "prevResult" else {k: v for k, v in CONF.items() if k != "prevResult"}
    return replaced(base, path, value)


PATHS = sorted(fields(CONF), key=str)


@pytest.fixture(scope="module")
def attacked() -> Iterator[Target]:
    """One target for all tests: what one breaks, the next one finds."""
    with target() as made:
        # What the daemon opens once, at the first use of a feature, is no leak.
        assert made.add(CONF | {"name": "first"}).status == 0
        assert made.delete(CONF | {"name": "first"}).status == 0
        made.clean()
        yield made


def judge(answer: Answer, named: tuple[str, ...], what: str) -> bool:
    """Whether an ADD worked; AssertionError unless it did or was refused clearly, naming one of ``named``."""
    if answer.status == 0:
        result = json.loads(answer.stdout)
        assert result["cniVersion"], what
        return True
    assert answer.status == 1, (what, answer)
    error = answer.error
    assert error["code"] in REFUSALS, (what, error)
    text = f"{error['msg']} {error.get('details', '')}".lower()
    # Code 6 is about the whole text: the parser has not come to fields.
    assert error["code"] == CniCode.DECODE or any(word.lower() in text for word in named), (what, error)
    assert "\n" not in error["msg"].strip(), (what, error)
    return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_with_every_value(
    attacked: Target, path: tuple[str | int, ...], record_property: Any
) -> None:
    """A hostile value in a field is refused with one error that names it, or it does no harm."""
    names = tuple(str(key) for key in path if isinstance(key, str))
    # What a value breaks may show in the field that it leads to.
    named = (
        names[-1],
        names[0],
        "ips",
        "IP version",
        "CNI version",
        *(("network",) if names[-1] == "name" else ()),
    )
    worked = 0
    with attacked.unharmed():
        for value in VALUES:
            conf = with_value(path, value)
            if judge(attacked.add(conf), named, f"{path} = {value!r:.60}"):
                worked += 1
                done = attacked.delete(conf)
                assert (done.status, done.stdout) == (0, ""), (value, done)
    record_property("hostile_values", len(VALUES))
    record_property("harmless_values", worked)


def test_the_configuration_that_is_attacked_is_a_good_one(attacked: Target) -> None:
    """Unchanged it works: a refusal in the other tests is that value's."""
    conf = with_value(("ipMasq",), True)
    with attacked.unharmed():
        assert attacked.add(conf).status == 0
        assert attacked.delete(conf).status == 0


STDIN: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(1000),
    "a number": b"7",
    "an array": b"[]",
    "a string": b'"evil"',
    "cut off": as_bytes(CONF)[:-20],
    "two objects": b'{"cniVersion":"1.1.0","name":"evil"}{}',
    "not UTF-8": b'{"cniVersion":"1.1.0","name":"\xff\xfe"}',
    "a BOM": b"\xef\xbb\xbf" + as_bytes(CONF),
    "UTF-16": json.dumps(CONF).encode("utf-16"),
    "NaN": b'{"cniVersion":"1.1.0","name":"evil","mtu":NaN}',
    "a key twice": b'{"cniVersion":"1.1.0","name":"evil","name":"calm"}',
    "a key twice in other case": b'{"cniVersion":"1.1.0","name":"evil","NAME":"calm"}',
    "10,000 levels of arrays": b'{"name":"evil","cniVersion":"1.1.0","x":'
    + b"[" * 10_000
    + b"]" * 10_000
    + b"}",
    "100,000 levels, not closed": b'{"name":"evil","x":' + b'{"a":' * 100_000,
    "a number of 200,000 digits": b'{"cniVersion":"1.1.0","name":"evil","mtu":' + b"9" * 200_000 + b"}",
    "one byte over the limit": b'{"cniVersion":"1.1.0","name":"evil","x":"' + b"y" * (1 << 20) + b'"}',
    "100,000 unknown keys": json.dumps({f"k{i}": i for i in range(70_000)}).encode(),
}


@pytest.mark.parametrize("what", list(STDIN))
@pytest.mark.parametrize("command", ["ADD", "CHECK", "GC", "STATUS", "DEL"])
def test_stdin_that_is_no_configuration(attacked: Target, what: str, command: str) -> None:
    """Every verb refuses it with one error object, and forgets it."""
    with attacked.unharmed():
        answer = attacked.shim(command, STDIN[what])
        assert answer.status == 1
        assert answer.error["code"] in {CniCode.DECODE, CniCode.INVALID_CONFIG}


LISTS: dict[str, tuple[str, Any]] = {
    "5,000 port mappings": (
        "portMappings",
        [{"hostPort": 10_000 + i, "containerPort": 80, "protocol": "tcp"} for i in range(5_000)],
    ),
    "5,000 routes": ("routes", [{"dst": f"100.{64 + i // 250}.{i % 250}.0/24"} for i in range(5_000)]),
    "20,000 networks to reach": ("reach", [f"n{i}" for i in range(20_000)]),
    "20,000 name servers": ("dns", {"nameservers": ["192.0.2.1"] * 20_000}),
    "10,000 labels": ("args", {"cni": {"labels": {f"k{i}": "v" * 50 for i in range(10_000)}}}),
    "5,000 range sets": (
        "ipam",
        {"ranges": [[{"subnet": f"11.{i // 250}.{i % 250}.0/24"}] for i in range(5_000)]},
    ),
    "5,000 reserved": (
        "ipam",
        {
            "ranges": [[{"subnet": "10.66.0.0/16"}]],
            "reserved": [f"10.66.{i // 250}.{i % 250}" for i in range(5_000)],
        },
    ),
    "a subnet of 2^128": ("ipam", {"ranges": [[{"subnet": "::/0"}]]}),
    "5,000 earlier interfaces": (
        "prevResult",
        {"cniVersion": "1.1.0", "interfaces": [{"name": f"x{i}"} for i in range(5_000)]},
    ),
}


@pytest.mark.parametrize("what", list(LISTS))
def test_a_huge_list_is_served_or_refused_while_others_are_served(attacked: Target, what: str) -> None:
    """It holds nobody else up for long, and whatever it made goes again."""
    key, value = LISTS[what]
    conf = with_value((key,), value)
    with attacked.unharmed(memory=64 << 20):
        outcome: list[Answer] = []
        attack = threading.Thread(target=lambda: outcome.append(attacked.add(conf)))
        attack.start()
        while attack.is_alive():
            with attacked.daemon.client() as client:
                assert client.node_status().ready
            attack.join(0.02)
        if judge(outcome[0], (key, "ranges", "interfaces", "labels", "reserved", "subnet"), what):
            assert attacked.delete(conf).status == 0


ENVIRONMENT: dict[str, dict[str, str | bytes]] = {
    "container id with a path": {"CNI_CONTAINERID": "../../../etc/passwd"},
    "container id of 100 kB": {"CNI_CONTAINERID": "c" * 100_000},
    "container id that is not UTF-8": {"CNI_CONTAINERID": b"c\xff"},
    "container id with a newline": {"CNI_CONTAINERID": "c\nd"},
    "ifname with a path": {"CNI_IFNAME": "../eth0"},
    "ifname of a format": {"CNI_IFNAME": "eth%d"},
    "ifname of 16 bytes": {"CNI_IFNAME": "e" * 16},
    "ifname of 4 foxes": {"CNI_IFNAME": "🦊" * 4},
    "ifname that is taken": {"CNI_IFNAME": "lo"},
    "ifname with control characters": {"CNI_IFNAME": "e\x1b[2J"},
    "ifname that is not UTF-8": {"CNI_IFNAME": b"e\xff"},
    "ifname with a right-to-left mark": {"CNI_IFNAME": "e\u202e0"},
    "args without a value": {"CNI_ARGS": "IP"},
    "args with two equal signs": {"CNI_ARGS": "IP=1=2"},
    "args of 100,000 pairs": {"CNI_ARGS": "IgnoreUnknown=1;" + "a=b;" * 30_000 + "IP=nope"},
    "args with a wrong address": {"CNI_ARGS": "IP=10.66.0.999"},
    "args with a wrong MAC": {"CNI_ARGS": "MAC=ff:ff:ff:ff:ff:ff"},
    "args with a label that is not UTF-8": {"CNI_ARGS": b"K8S_POD_NAME=\xff"},
    "a command with a newline": {"CNI_COMMAND": "ADD\n"},
    "a command in lower case": {"CNI_COMMAND": "add"},
    "no netns": {"CNI_NETNS": ""},
    "netns: a folder": {"CNI_NETNS": "/tmp"},
    "netns: a device that blocks": {"CNI_NETNS": "/dev/tty"},
    "netns: not there": {"CNI_NETNS": "/run/netns/none"},
    "netns: relative": {"CNI_NETNS": "../../proc/self/ns/net"},
    "netns: another kind of namespace": {"CNI_NETNS": "/proc/self/ns/mnt"},
    "netns: a file of /proc": {"CNI_NETNS": "/proc/self/status"},
    "netns: longer than a path may be": {"CNI_NETNS": "/" + "n" * 50_000},
    "netns: the host's own": {"CNI_NETNS": "/proc/self/ns/net"},
}


@pytest.mark.parametrize("what", list(ENVIRONMENT))
def test_hostile_variables(attacked: Target, what: str) -> None:
    """A wrong variable is named, and refused before anything is made."""
    key = next(iter(ENVIRONMENT[what]))
    conf = with_value(("ipMasq",), True)
    for name in ("mac", "portMappings", "runtimeConfig", "args"):
        conf.pop(name)
    with attacked.unharmed():
        answer = attacked.add(conf, env=ENVIRONMENT[what])
        if judge(
            answer, (key, key.removeprefix("CNI_"), "interface", "network namespace", "ip", "mac"), what
        ):
            assert what in {
                "container id of 100 kB",
                "ifname of a format",
                "ifname with a right-to-left mark",
            }
            assert attacked.delete(conf, env=ENVIRONMENT[what]).status == 0


def test_a_pipe_as_netns_keeps_nobody_waiting(attacked: Target) -> None:
    """A FIFO, whose opening waits for a writer, is refused at once (8)."""
    path = attacked.daemon.base / "fifo"
    os.mkfifo(path)
    with attacked.unharmed():
        answer = attacked.add(with_value(("ipMasq",), True), netns=str(path), timeout=10)
        assert answer.error["code"] == CniCode.INVALID_NETNS


def test_a_plugin_type_is_a_name_and_not_a_path(attacked: Target) -> None:
    """``ipam.type`` can't name a program outside CNI_PATH, and CNI_PATH's folders hold no surprise."""
    with attacked.unharmed():
        for kind in ("../../bin/sh", "/bin/sh", "..", ".", "a\0b", "portwright/../sh", "host-local\n"):
            answer = attacked.add(with_value(("ipam",), {"type": kind}))
            assert answer.error["code"] in {CniCode.INVALID_CONFIG, CniCode.BAD_ENVIRONMENT}, kind
            assert "ipam.type" in answer.error["msg"], kind
        # Recursion: ourselves as our IPAM plugin would call the daemon from the daemon.
        env: dict[str, str | bytes] = {"CNI_PATH": "/proc/self/cwd:.:/nowhere:" + "/x:" * 1000}
        answer = attacked.add(with_value(("ipam",), {"type": "host-local"}), env=env)
        assert answer.error["code"] in REFUSALS


def test_gc_does_not_take_a_hostile_list_for_an_empty_one(attacked: Target) -> None:
    """A list that is malformed deletes nothing."""
    conf = with_value(("ipMasq",), True)
    assert attacked.add(conf).status == 0
    lists: tuple[Any, ...] = (
        *(None, True, 0, "", "x", {}, [None], [[]], [{}], [{"containerID": ""}], [{"containerID": "x"}]),
        *([{"containerID": 1, "ifname": "eth0"}], [{"containerID": "evil", "ifname": ""}], {"0": {}}),
    )
    with attacked.unharmed():
        for value in lists:
            answer = attacked.shim("GC", as_bytes({**conf, "cni.dev/valid-attachments": value}))
            assert answer.error["code"] == CniCode.INVALID_CONFIG, value
    assert attacked.delete(conf).status == 0


def test_a_refused_add_leaves_no_network(attacked: Target) -> None:
    """What ADD makes on its way, down to the network's record, is taken back when a later step refuses."""
    conf = {key: value for key, value in CONF.items() if key != "prevResult"}
    refused: dict[str, Json] = {
        "an address outside": {"runtimeConfig": {"ips": ["203.0.113.7"]}},
        "a host port twice": {
            "runtimeConfig": {"portMappings": [{"hostPort": 9000, "containerPort": 1}] * 2}
        },
        "a model of later": {"model": "netkit"},
        "no room for IPv6": {"mtu": 1000},
    }
    with attacked.daemon.client() as client:
        before = {network.name for network in client.network_list()}
        for what, change in refused.items():
            assert attacked.add({**conf, "name": "brief", **change}).status == 1, what
            assert {network.name for network in client.network_list()} == before, what
