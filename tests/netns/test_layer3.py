"""What a namespace's devices have at layer 3 reaches a guest's kernel: read, said, set up, read again."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from portwright.model.errors import NotSupported
from portwright.vmm import initramfs
from portwright.vmm.inspect import read
from portwright.vmm.layer3 import Layer3
from tests.deadline import PATIENCE
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns

NICS = {"eth0": "02:00:00:00:01:01", "net1": "02:00:00:00:01:02"}
CONFIGURATIONS = 32


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with busybox's commands alone, and the part of init.sh that sets NICs up."""
    folder = tmp_path / "bin"
    folder.mkdir()
    subprocess.run([str(initramfs.BUSYBOX), "--install", "-s", str(folder)], check=True)
    (folder / "pwroute").symlink_to(initramfs.PWROUTE)
    text = initramfs.INIT.read_text()
    tools = text[text.index("# Run a command; what it says") : text.index("\nnetwork\n")]
    (tmp_path / "net.sh").write_text(
        tools.replace("/tmp/error", f"{tmp_path}/error").replace("/proc/cmdline", f"{tmp_path}/words")
        + "\nnetwork\n"
    )
    return tmp_path


@pytest.fixture
def two(netns_factory: NetnsFactory) -> tuple[TestNetns, TestNetns]:
    """A namespace, and one for a guest's kernel, with NICs of the same MACs."""
    made = netns_factory(), netns_factory()
    for ns in made:
        _nics(ns)
    return made


def _nics(ns: TestNetns) -> None:
    for name, mac in NICS.items():
        ns.run(["ip", "link", "add", name, "address", mac, "type", "veth", "peer", "name", f"p{name}"])
        ns.run(["ip", "link", "set", f"p{name}", "up"])


def guest_says(ns: TestNetns, tools: Path, words: list[str]) -> str:
    """Set a guest's kernel up by these words; what it complains of."""
    nics = [f"portwright.nic={name},{mac},1500" for name, mac in NICS.items()]
    (tools / "words").write_text(" ".join(["quiet", *nics, *words]) + "\n")
    script = f'say() {{ echo "$*"; }}; PATH={tools}/bin; . {tools}/net.sh'
    done = subprocess.run(
        ["ip", "netns", "exec", ns.name, str(tools / "bin/sh"), "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * PATIENCE,
    )
    said = [line for line in done.stdout.splitlines() if " is 02:" not in line]
    return "\n".join([*said, done.stderr]).strip()


def seen(ns: TestNetns) -> Layer3:
    """What its NICs have; routes and rules in one order, whatever the kernel's."""
    found = read(ns.fd, NICS)
    routes = tuple(sorted(found.routes, key=repr))
    return Layer3(
        addresses=found.addresses,
        routes=routes,
        rules=tuple(sorted(found.rules, key=repr)),
        neighbours=tuple(sorted(found.neighbours, key=repr)),
    )


def _configuration(dice: random.Random) -> list[str]:
    """Commands for ``ip -batch``; the kernel may refuse some."""
    lines = [f"link set {name} up" for name in NICS]
    fours, sixes = [], []
    for number in range(dice.randint(0, 6)):
        dev, length = dice.choice(list(NICS)), dice.choice([24, 16, 30, 32])
        one = f"10.{dice.randint(0, 3)}.{dice.randint(0, 3)}.{dice.randint(1, 250)}"
        fours.append((dev, one))
        more = dice.choice(["", "", f" broadcast 10.9.9.{number}", f" label {dev}:{number}", " scope link"])
        flag = dice.choice(["", "", " noprefixroute"])
        peer = f"{one} peer 10.200.{number}.1/32" if dice.random() < 0.15 else f"{one}/{length}"
        lines.append(f"addr add {peer} dev {dev}{more}{flag}")
    for _ in range(dice.randint(0, 4)):
        dev, length = dice.choice(list(NICS)), dice.choice([64, 64, 128, 112])
        one = f"fd00:{dice.randint(0, 3)}::{dice.randint(1, 0xFFFF):x}"
        sixes.append((dev, one))
        lines.append(f"addr add {one}/{length} dev {dev} nodad{dice.choice(['', ' noprefixroute'])}")
    if fours and dice.random() < 0.2:  # the kernel's own route, taken away
        dev, one = dice.choice(fours)
        lines.append(f"route del {one.rpartition('.')[0]}.0/24 dev {dev}")
    for _ in range(dice.randint(0, 8)):
        lines.append(_route(dice, fours, sixes))
    for dev in dice.sample(list(NICS), dice.randint(0, 2)):
        one = dice.choice([f"10.0.0.{dice.randint(1, 250)}", f"fd00::{dice.randint(1, 0xFFFF):x}"])
        lines.append(f"neigh add {one} lladdr 02:00:00:00:09:09 dev {dev} nud permanent")
    for _ in range(dice.randint(0, 4)):
        lines.append(_rule(dice))
    return lines


def _route(dice: random.Random, fours: list[tuple[str, str]], sixes: list[tuple[str, str]]) -> str:
    six = dice.random() < 0.4
    dst = (
        f"fd0{dice.randint(1, 9)}::/{dice.choice([32, 64, 128])}"
        if six
        else f"172.{dice.randint(16, 31)}.0.0/16"
    )
    dst = dice.choice([dst, dst, "default"])
    flag = "-6 " if six else ""
    if dice.random() < 0.15:
        return f"{flag}route add {dice.choice(['blackhole', 'unreachable', 'prohibit'])} {dst}".replace(
            "-6 ", "-6 "
        )
    own = sixes if six else fours
    dev = dice.choice([dev for dev, _ in own] or list(NICS))
    words = [f"route add {dst}"]
    match dice.choice(["link", "near", "far"]):
        case "near" if own:
            dev, near = dice.choice(own)
            words.append(f"via {near[:-1]}{'e' if six else 9}")
        case "far" | "near":
            words.append(f"via {'fe80::1' if six else '169.254.1.1'} onlink")
    words.append(f"dev {dev}")
    if dice.random() < 0.2:
        hop = "via fe80::1" if six else dice.choice(["via 169.254.1.1", "via inet6 fe80::1"])
        both = [f"nexthop {hop} dev {dev} onlink weight {dice.randint(1, 9)}" for dev in NICS]
        words = [f"route add {dst}"]
        words += both if dice.random() < 0.7 else [f"{hop} dev {dev} onlink"]
    chosen = [
        f"metric {dice.randint(1, 2000)}",
        f"table {dice.choice([100, 254, 1000])}",
        f"mtu {dice.choice(['', 'lock '])}{dice.randint(1280, 9000)}",
        f"initcwnd {dice.randint(1, 90)} quickack 1",
        f"hoplimit {dice.randint(1, 90)} rto_min {dice.randint(1, 90)}ms",
        "pref high" if six else f"tos 0x{dice.choice([4, 8, 10])}",
        f"advmss {dice.randint(500, 1400)}",
        f"proto {dice.choice([3, 4, 17, 186])}",
        *([] if six else [f"scope {dice.choice([0, 253])}"]),
        *([f"src {dice.choice(own)[1]}"] if own else []),
    ]
    more = dice.sample(chosen, dice.randint(0, 3))
    words = [words[0], *more, *words[1:]]
    return f"{flag}{' '.join(words)}"


def _rule(dice: random.Random) -> str:
    six = dice.random() < 0.5
    prefix = f"fd00:{dice.randint(0, 9)}::/64" if six else f"10.{dice.randint(0, 9)}.0.0/16"
    matches = [
        f"from {prefix}",
        f"to {prefix}",
        f"iif {dice.choice(list(NICS))}",
        dice.choice(["fwmark 0x5", "fwmark 0x50/0xf0"]),
    ]
    which = " ".join(dice.sample(matches, dice.randint(0, 3)))
    table = dice.choice(["100", "1000", "main suppress_prefixlength 0"])
    return f"{'-6 ' if six else ''}rule add {which} priority {dice.randint(1, 32000)} lookup {table}"


@pytest.mark.parametrize("part", range(4))
def test_a_round_trip_loses_nothing(two: tuple[TestNetns, TestNetns], tools: Path, part: int) -> None:
    """Generated configurations: what the kernel took of each is in the guest's kernel as it was."""
    ours, guests = two
    had = 0
    for seed in range(part, CONFIGURATIONS, 4):
        for ns in two:
            for name in NICS:
                ns.run(["ip", "link", "del", name])
            for family in ("-4", "-6"):
                ns.run(["ip", family, "rule", "flush"])
                ns.run(["ip", family, "route", "flush", "table", "all", "type", "blackhole"], check=False)
                ns.run(["ip", family, "route", "flush", "table", "all", "type", "unreachable"], check=False)
                ns.run(["ip", family, "route", "flush", "table", "all", "type", "prohibit"], check=False)
                ns.run(["ip", family, "rule", "add", "priority", "32766", "lookup", "main"])
            ns.run(["ip", "rule", "add", "priority", "32767", "lookup", "default"])
            _nics(ns)
        lines = _configuration(random.Random(seed))
        batch = "\n".join(line.removeprefix("-6 ") for line in lines if not line.startswith("-6")) + "\n"
        ours.run(["ip", "-force", "-batch", "-"], input=batch, check=False)
        batch = "\n".join(line.removeprefix("-6 ") for line in lines if line.startswith("-6")) + "\n"
        ours.run(["ip", "-6", "-force", "-batch", "-"], input=batch, check=False)
        before = seen(ours)
        said = guest_says(guests, tools, before.words())
        assert said == "", f"seed {seed}:\n" + "\n".join([*before.words(), said])
        assert seen(guests) == before, f"seed {seed}:\n" + "\n".join(before.words())
        had += len(before.words())
    assert had > CONFIGURATIONS


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("route add 10.9.0.0/16 nexthop dev eth0 nexthop via 10.0.0.1 dev peth0 onlink", "no tap"),
        ("route add 10.9.0.0/16 dev eth0 congctl reno", "congestion control"),
        ("-6 route add fd09::/64 from fd08::/64 dev eth0", "a source prefix"),
        ("-6 route add fd09::/64 dev eth0 expires 100", "an end"),
        ("rule add not from 10.9.0.0/16 lookup 100 priority 7", "rule 7"),
        ("rule add from 10.9.0.0/16 prohibit priority 7", "its action"),
        ("rule add ipproto tcp dport 80 lookup 100 priority 7", "rule 7"),
        ("rule del priority 32767", "32767"),
        ("addr add 10.5.0.2/24 dev eth0 valid_lft 100 preferred_lft 100", "which ends"),
        ("addr add fd05::2/64 dev eth0 preferred_lft 0 valid_lft forever", "fd05::2"),
    ],
)
def test_what_has_no_words_is_refused(two: tuple[TestNetns, TestNetns], command: str, words: str) -> None:
    """By name: a guest that lacks it in silence would be a guest whose packets go elsewhere."""
    ours, _ = two
    ours.run(["ip", "-batch", "-"], input="link set eth0 up\naddr add 10.0.0.2/24 dev eth0\n")
    read(ours.fd, NICS)
    ours.run(["ip", *command.split()])
    with pytest.raises(NotSupported, match="a guest does not support") as refused:
        read(ours.fd, NICS)
    assert words in str(refused.value)
