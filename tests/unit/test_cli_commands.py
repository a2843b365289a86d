from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from portwright.cli.main import cli
from portwright.model.network import AddressRange, Route
from portwright.model.port import PortMapping
from tests.fake_daemon import PORT_ID, FakeDaemon, serving

NETNS = f"pid:{os.getpid()}"

PORT_TEXT = """\
port_id      0123456789abcdef
name         web
state        attached
network      blue
model        veth
representor  pw01234567
ifname       eth0
sandbox      /run/netns/s1
mac          02:00:00:00:00:01
mtu          1500
addresses    10.1.0.2 via 169.254.1.1
             fd00:1::2 via fe80::1
"""
POLICY_TEXT = """\
files     /etc/p/web.yaml
policies  NetworkPolicy shop/web
tables    1 sets, 1,200 cells
"""
CHANGES_TEXT = """\
BECOMES  FROM                                   TO        SERVICES        IP   BEFORE     AFTER
denied   shop/a, shop/b, shop/c and 1,002 more  shop/web  all but tcp 80  4+6  no policy  \
ingress tier-default of default, by shop/web /etc/p/web.yaml:1
and 4,212 pairs more in 2 rows; --json has the first 1 rows
and more that nobody counted: too many pairs differ; try a part of the files
"""
GOLDEN = {
    "node status": f"""\
ready      yes
version    0.1.0
pid        {os.getpid()}
uptime     12 s
run_dir    /run/portwright
state_dir  /var/lib/portwright
attach     tcx
networks   1
ports      2 attached, 1 detached
""",
    "network list": """\
NAME  RANGES                   MTU   MASQUERADE  REACH  ISOLATION
blue  10.1.0.0/24 fd00:1::/64  -     yes         -      open
red   -                        9000  no          *      strict
""",
    "network show blue": """\
name        blue
ranges      10.1.0.0/24
            fd00:1::/64
masquerade  yes
isolation   open
ports       2
usage       10.1.0.0/24: 2 of 254 in use, 1 resting
""",
    "network delete blue": "deleted network blue\n",
    "port list": """\
PORT_ID           REP         STATE     NETWORK  MODEL  IFNAME  ADDRESSES           NAME
0123456789abcdef  pw01234567  attached  blue     veth   eth0    10.1.0.2,fd00:1::2  web
fedcba9876543210  pwfedcba98  detached  blue     veth   eth0    -                   default/api-0
""",
    "port show web": PORT_TEXT.replace(
        "network      blue", "admin        up\nlink         down\nopstate      attached\nnetwork      blue"
    )
    + """\
labels       tier=front
from_port    10 packets, 1000 bytes; 1 by the slow path; 3 dropped
to_port      2000 packets, 200000 bytes; 1 by the slow path; 0 dropped
""",
    "port set web --admin down": PORT_TEXT,
    "port migrate --remove-bridge": """\
BRIDGE   DEVICE  PORT_ID           NETWORK  MAC                ADDRESSES           SANDBOX
docker0  veth12  0123456789abcdef  blue     02:00:00:00:00:01  10.1.0.2,fd00:1::2  /run/netns/s1
removed bridge docker0
""",
    "port migrate --remove-bridge --dry-run": """\
ip link set pw01234567 nomaster
ip link delete docker0
""",
    "port unplug web": PORT_TEXT.replace("attached", "detached"),
    f"port plug web --netns {NETNS}": PORT_TEXT,
    "port delete web": "deleted port 0123456789abcdef\n",
    f"port create --network blue --netns {NETNS} --dry-run": """\
ip link add pw01234567 type veth
ip link set pw01234567 up
""",
    "stats": (
        "PORT_ID           REP         FROM_PORT_PKTS  FROM_PORT_BYTES  FROM_PORT_SLOW  FROM_PORT_DROPS"
        "  TO_PORT_PKTS  TO_PORT_BYTES  TO_PORT_SLOW  TO_PORT_DROPS  NAME\n"
        "0123456789abcdef  pw01234567              10             1000               1                3"
        "          2000         200000             1              0  web\n"
    ),
    "drops": """\
PORT_ID           REP         DIRECTION  REASON    PACKETS  BYTES
0123456789abcdef  pw01234567  from_port  spoof-ip        3    294
""",
    "drops --follow": """\
22:13:20.500000 pw01234567 from_port spoof-ip 10.9.9.0 > 10.1.0.3 tcp 80
22:13:21.500000 pw01234567 from_port spoof-ip rule=anti-spoof 10.9.9.1 > 10.1.0.3 tcp 80 (1 lost before this)
22:13:22.500000 pw01234567 from_port spoof-ip rule=anti-spoof 10.9.9.2 > 10.1.0.3 tcp 80 (2 lost before this)
""",
    "policy list": POLICY_TEXT,
    "policy delete -f /etc/p/web.yaml": POLICY_TEXT,
    "policy delete -f /etc/p/web.yaml --dry-run": POLICY_TEXT + "\nno pair changes: every verdict stays\n",
    "policy staged": f"""\
StagedNetworkPolicy shop/web (Set) adds CalicoNetworkPolicy shop/web, /etc/p/web.yaml:1
{CHANGES_TEXT}
StagedGlobalNetworkPolicy big (Delete) deletes GlobalNetworkPolicy big, /etc/p/web.yaml:9
can't be enforced: too large
""",
    "why web 10.1.0.3 --dport 80": """\
 1. source: port web owns the address (10.1.0.2)
 2. deliver: redirected to its peer
verdict: allow, delivered to pwfedcba98 by the fast path
""",
    "doctor": """\
ok    kernel: 6.18
warn  forwarding: off
      do: sysctl -w x=1

FEATURE  PRESENT  DETAIL
tcx      yes      -
netkit   no       6.7
""",
}


def title(line: str) -> str:
    """A test's id for a command: the same in every process, which pytest-xdist wants."""
    return line.replace(NETNS, "pid:N")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon()
    with serving(tmp_path / "portwright.sock", fake.dispatch):
        yield fake


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def run(run_dir: Path, line: str | list[str]) -> Result:
    """Run a command line against the daemon in ``run_dir``."""
    args = line if isinstance(line, list) else line.split()
    return CliRunner().invoke(cli, ["--run-dir", str(run_dir), *args], catch_exceptions=False)


@pytest.mark.parametrize("line", list(GOLDEN), ids=title)
def test_what_people_see(tmp_path: Path, daemon: FakeDaemon, utc: None, line: str) -> None:
    """Without a terminal, output is plain fixed columns: exactly this, and exit status 0."""
    result = run(tmp_path, line)
    assert (result.stdout, result.stderr, result.exit_code) == (GOLDEN[line], "", 0)


@pytest.mark.parametrize(
    "line", [line for line in GOLDEN if not line.startswith("drops --follow")], ids=title
)
def test_every_command_that_prints_has_json(tmp_path: Path, daemon: FakeDaemon, line: str) -> None:
    """``--json`` gives one JSON document, and nothing else, on stdout."""
    result = run(tmp_path, f"{line} --json")
    assert (result.stderr, result.exit_code) == ("", 0)
    json.loads(result.stdout)


def test_json_has_every_field(tmp_path: Path, daemon: FakeDaemon) -> None:
    """A port in JSON has all of its fields, defaults too, and in ``show`` its counters."""
    shown = json.loads(run(tmp_path, "port show web --json").stdout)
    assert shown["port_id"] == PORT_ID
    assert shown["labels"] == {"tier": "front"}
    assert shown["limits"] == dict.fromkeys(
        ["egress_rate", "egress_burst", "ingress_rate", "ingress_burst"], 0
    )
    assert shown["routes"] == []
    assert shown["from_port"]["total"] == {"packets": 10, "bytes": 1000}
    assert shown["drops"] == {"from_port": 3, "to_port": 0}
    plan = json.loads(run(tmp_path, f"port create --network b --netns {NETNS} --dry-run --json").stdout)
    assert plan["plan"][0] == {"op": "CreateVeth", "command": "ip link add pw01234567 type veth"}


def test_follow_in_json_is_one_object_a_line(tmp_path: Path, daemon: FakeDaemon) -> None:
    """For ``jq`` and for programs that read line by line."""
    lines = run(tmp_path, "drops --follow --json").stdout.splitlines()
    assert [json.loads(line)["lost"] for line in lines] == [0, 1, 2]


def test_port_create_says_what_was_asked(tmp_path: Path, daemon: FakeDaemon) -> None:
    """Each option arrives as the parameter that it stands for."""
    line = (
        f"port create --network blue --netns {NETNS} --ifname net1 --name db --mac 02:00:00:00:00:09 "
        "--ip 10.1.0.9 --ip fd00:1::9 --label a=b --label c= -p 8080:80 -p [::1]:53:53/udp "
        "-p 127.0.0.1:1:2/SCTP --egress-rate 1.5G --egress-burst 200k --ingress-rate 7 --mtu 1400"
    )
    result = run(tmp_path, line)
    assert result.exit_code == 0, result.stderr
    (asked,) = daemon.calls
    assert (asked.network, asked.ifname, asked.name) == ("blue", "net1", "db")
    assert (asked.netns, asked.mac) == (f"/proc/{os.getpid()}/ns/net", "02:00:00:00:00:09")
    assert asked.ips == ("10.1.0.9", "fd00:1::9")
    assert asked.labels == {"a": "b", "c": ""}
    assert asked.port_mappings == (
        PortMapping(host_port=8080, container_port=80),
        PortMapping(host_ip="::1", host_port=53, container_port=53, protocol="udp"),
        PortMapping(host_ip="127.0.0.1", host_port=1, container_port=2, protocol="sctp"),
    )
    limits = asked.limits
    assert (limits.egress_rate, limits.egress_burst, limits.ingress_rate) == (1_500_000_000, 200_000, 7)
    assert asked.mtu == 1400
    assert len(daemon.namespaces) == 1
    for shown in ("[::1]:53:53/udp", "egress_rate 1500M", "a=b"):
        assert shown in result.stdout


def test_network_create_says_what_was_asked(tmp_path: Path, daemon: FakeDaemon) -> None:
    """Range sets and routes are written as they are shown."""
    line = (
        "network create red --subnet 10.2.0.0/24 "
        "--range 10.3.0.0/24,start=10.3.0.9,end=10.3.0.19;10.4.0.0/24 --mtu 1400 --masquerade "
        "--reach blue --reach green --route 10.0.0.0/8,gw=10.1.1.1,priority=5 "
        "--dns-server 9.9.9.9 --dns-search example.org --reserved 10.2.0.7 --isolation tenant"
    )
    assert run(tmp_path, line).exit_code == 0
    (asked,) = daemon.calls
    assert asked.subnets == ("10.2.0.0/24",)
    first = AddressRange(subnet="10.3.0.0/24", start="10.3.0.9", end="10.3.0.19")
    assert asked.ranges == ((first, AddressRange(subnet="10.4.0.0/24")),)
    assert (asked.mtu, asked.masquerade, asked.reach) == (1400, True, ("blue", "green"))
    assert asked.routes == (Route(dst="10.0.0.0/8", gw="10.1.1.1", priority=5),)
    assert (asked.dns.nameservers, asked.dns.search) == (("9.9.9.9",), ("example.org",))
    assert asked.reserved == ("10.2.0.7",)
    assert asked.isolation == "tenant"


def test_port_set_changes_only_what_is_named(tmp_path: Path, daemon: FakeDaemon) -> None:
    """What is not named arrives as None; ``key-`` removes a label."""
    assert run(tmp_path, "port set web --label a=1 --label b- --ingress-rate 0").exit_code == 0
    (asked,) = daemon.calls
    assert (asked.port, asked.admin, asked.mtu, asked.labels) == ("web", None, None, {"a": "1", "b": None})
    assert (asked.limits.ingress_rate, asked.limits.egress_rate) == (0, None)


def test_list_filters_arrive(tmp_path: Path, daemon: FakeDaemon) -> None:
    """The daemon does the filtering."""
    assert run(tmp_path, "port list --network blue --state detached --label a=b").exit_code == 0
    (asked,) = daemon.calls
    assert (asked.network, asked.state.value, asked.label) == ("blue", "detached", "a=b")


@pytest.mark.parametrize(
    "line",
    [
        "prt",
        "port",
        "port frobnicate",
        "port create --network blue",
        "port list --state gone",
        "port set web",
        "port set web --label nothing",
        f"port create --network b --netns {NETNS} --egress-rate fast",
        f"port create --network b --netns {NETNS} -p 80",
        f"port create --network b --netns {NETNS} --label =x",
        f"port create --network b --netns {NETNS} --label x-",
        "network create x --range start=1",
        "network create x --range 10.0.0.0/8,colour=red",
        "network create x --route 10.0.0.0/8,mtu=big",
        "network create x --mtu 12",
        "why web",
        "stats --frequently",
    ],
    ids=title,
)
def test_usage_errors_exit_2(tmp_path: Path, daemon: FakeDaemon, line: str) -> None:
    """One line (for a bare group, its help) on stderr, nothing sent; with --json the error as JSON."""
    result = run(tmp_path, line)
    assert (result.exit_code, result.stdout, daemon.calls) == (2, "", [])
    if line != "port":
        assert result.stderr.startswith("portwright: ")
        assert len(result.stderr.splitlines()) == 1
        with_json = run(tmp_path, f"{line} --json")
        assert with_json.exit_code == 2
        assert json.loads(with_json.stdout)["error"]["code"] == "usage"


def test_a_refusal_exits_1_with_the_daemons_words(tmp_path: Path, daemon: FakeDaemon) -> None:
    """On stderr as a line, with --json also on stdout with code and facts."""
    result = run(tmp_path, "network create blue")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "portwright: network 'blue': it exists\n"
    result = run(tmp_path, "network create blue --json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == {
        "code": "conflict",
        "message": "network 'blue': it exists",
        "facts": {"kind": "network", "name": "blue", "why": "it exists"},
    }


def test_without_a_daemon_commands_fail_and_the_doctor_says_so(tmp_path: Path) -> None:
    """Exit status 1 with the way out; the doctor reports it as its finding."""
    result = run(tmp_path, "port list")
    assert result.exit_code == 1
    assert "start it with: portwright node run" in result.stderr
    result = run(tmp_path, "doctor --json")
    assert result.exit_code == 1
    (check,) = json.loads(result.stdout)["checks"]
    assert (check["name"], check["ok"], check["way_out"]) == ("daemon", False, "portwright node run")
    assert run(tmp_path, "doctor").stdout.startswith("FAIL  daemon: nothing answers on")


@pytest.mark.parametrize("place", ["global", "own", "environment"])
def test_node_run_and_install_get_the_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """--run-dir and --state-dir work before the command, after it, and from the environment."""
    seen: list[dict[str, Any]] = []

    def remember(status: object) -> Any:
        def record(**options: object) -> object:
            seen.append(options)
            return status

        return record

    fake = types.ModuleType("portwright.daemon.main")
    fake.main = remember(3)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "portwright.daemon.main", fake)
    monkeypatch.setattr("portwright.cni.install.install", remember([tmp_path / "bin/portwright"]))
    (tmp_path / "file").touch()  # below it a real daemon, run by mistake, fails at once
    run_dir, state_dir = tmp_path / "file/r", tmp_path / "file/s"
    dirs = ["--run-dir", str(run_dir), "--state-dir", str(state_dir)]
    before, after = (dirs, []) if place == "global" else ([], dirs)
    if place == "environment":
        after = []
        monkeypatch.setenv("PORTWRIGHT_RUN_DIR", str(run_dir))
        monkeypatch.setenv("PORTWRIGHT_STATE_DIR", str(state_dir))
    runner = CliRunner()
    result = runner.invoke(cli, [*before, "node", "run", *after], catch_exceptions=False)
    told = {"run_dir": run_dir, "state_dir": state_dir, "policy_dir": None, "node_name": ""}
    assert (result.exit_code, seen) == (3, [told])
    install = ["install", "--cni-bin-dir", "/b", "--cni-conf-dir", "/c", "--network", "blue"]
    result = runner.invoke(cli, [*before, *install, *after], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/bin/portwright\n")
    assert seen[1] == {
        "bin_dir": Path("/b"),
        "conf_dir": Path("/c"),
        "network": "blue",
        "socket": run_dir / "portwright.sock",
        "spool": state_dir / "spool",
    }
    runner.invoke(cli, [*before, "node", "run", "--policy-dir", "/p", *after], catch_exceptions=False)
    assert seen[2] == {**told, "policy_dir": Path("/p")}


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("0", 0),
        ("7", 7),
        ("1k", 1000),
        ("100M", 10**8),
        ("1.5G", 1_500_000_000),
        ("10mbit", 10**7),
        ("2Tbps", 2 * 10**12),
    ],
)
def test_rates_are_bits_in_powers_of_1000(text: str, bits: int) -> None:
    """As tc and every data sheet count them."""
    from portwright.cli.options import RateType

    assert RateType().convert(text, None, None) == bits


def test_every_command_has_help(tmp_path: Path) -> None:
    """--help at each level exits 0, names the arguments, and does not need a daemon."""
    paths = [[], ["node"], ["network"], ["port"], ["policy"]]
    paths += [line.split()[:2] for line in GOLDEN if line.split()[0] in ("node", "network", "port", "policy")]
    paths += [["install"], ["why"], ["stats"], ["drops"], ["doctor"]]
    for path in paths:
        result = CliRunner().invoke(cli, [*path, "--help"])
        assert result.exit_code == 0
        assert "Usage: portwright" in result.stdout
