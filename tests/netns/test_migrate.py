"""``port migrate``: containers leave a bridge while they run, and nobody in them notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import pytest

from portwright.model.errors import Conflict, InvalidInput, NotFound, NotSupported
from tests.deadline import wait_until
from tests.fix_daemon import WORLD4, WORLD6, Daemon
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns import bridge_lab as lab
from tests.netns.bridge_lab import BRIDGE, HOST4, HOST6, Member
from tests.netns.policy_lab import connect, listening

pytestmark = pytest.mark.netns


@pytest.fixture
def members(daemon: Daemon, world: TestNetns, netns_factory: NetnsFactory) -> list[Member]:
    """Two containers on a bridge, and a network for them."""
    lab.make_bridge(daemon.host)
    for subnet, host in (("10.88.0.0/24", "192.0.2.2"), ("fd88::/64", "2001:db8::2")):
        world.run(["ip", "route", "add", subnet, "via", host])
    lab.network(daemon)
    made = [Member(netns_factory(), daemon.host, number) for number in (11, 12)]
    wait_until(lambda: made[0].ping(WORLD6), why="the uplink's own neighbour discovery")
    return made


@pytest.fixture
def by_clsact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another's ingress qdisc is in the way, as it is not for TCX."""
    monkeypatch.setenv("PORTWRIGHT_ATTACH", "clsact")


@pytest.mark.usefixtures("each_attach")
def test_connections_survive_and_the_gap_is_short(
    daemon: Daemon, world: TestNetns, members: list[Member], record_property: Callable[[str, object], None]
) -> None:
    """Streams and idle connections between containers, to the host and to the world, both families, go on
    while the bridge is left and removed. The longest gap is the receivers'; beside it the loopback's."""
    a, b = members
    host = daemon.host
    with (
        lab.idle(a.ns, b.ns, b.ip4, 22) as first,
        lab.idle(b.ns, host, HOST6, 23) as second,
        lab.idle(a.ns, world, WORLD4, 24) as third,
        lab.idle(host, b.ns, b.ip4, 25) as fourth,
        lab.streams(
            ("control", world, world, "127.0.0.1", 5000),
            ("container to container", a.ns, b.ns, b.ip4, 5001),
            ("container to container, IPv6", b.ns, a.ns, a.ip6, 5002),
            ("container to host", a.ns, host, HOST4, 5003),
            ("host to container", host, b.ns, b.ip6, 5004),
            ("container to world", b.ns, world, WORLD6, 5005),
        ) as running,
    ):
        with daemon.client() as client:
            done = client.port_migrate(BRIDGE, remove_bridge=True)
        assert [len(moved.ports) for moved in done.bridges] == [2]
        assert done.bridges[0].removed
        assert BRIDGE not in lab.names(host)
        noise, *gaps = [stream.advance() for stream in running]
        for idle in (first, second, third, fourth):
            idle.alive()
    lab.judge(noise, gaps, record_property)


@pytest.mark.parametrize("mac", [lab.MAC, ""], ids=["own-mac", "members-mac"])
def test_the_gap_does_not_grow_with_the_bridge(
    daemon: Daemon,
    world: TestNetns,
    netns_factory: NetnsFactory,
    record_property: Callable[[str, object], None],
    mac: str,
) -> None:
    """Of 16 containers the first and the last are connected, both ways, and the host with one between; also
    where the bridge's MAC is a member's, and another one's as soon as that has left."""
    host = daemon.host
    lab.make_bridge(host, mac=mac)
    lab.network(daemon)
    many = [Member(netns_factory(), host, number) for number in range(100, 116)]
    for member in many:
        member.ns.run(["ip", "neigh", "flush", "all"])
    first, middle, last = many[0], many[8], many[-1]
    with (
        lab.idle(last.ns, first.ns, first.ip6, 22) as idle,
        lab.streams(
            ("control", world, world, "127.0.0.1", 5000),
            ("first to last", first.ns, last.ns, last.ip4, 5001),
            ("last to first, IPv6", last.ns, first.ns, first.ip6, 5002),
            ("host to container", host, middle.ns, middle.ip4, 5003),
            ("container to host, IPv6", middle.ns, host, HOST6, 5004),
        ) as running,
        daemon.client() as client,
    ):
        began = time.monotonic()
        assert len(client.port_migrate(remove_bridge=True).bridges[0].ports) == 16
        record_property("16_containers", f"{time.monotonic() - began:.1f} s")
        noise, *gaps = [stream.advance() for stream in running]
        idle.alive()
    lab.judge(noise, gaps, record_property)


def test_a_moved_container_is_a_port_like_any_other(
    daemon: Daemon, members: list[Member], netns_factory: NetnsFactory
) -> None:
    """With its MAC and addresses, on record so that nobody gets them again; it finds its neighbours anew, is
    found by new ports, is held to what it is, counted, and checked as whole; a restart finds it so."""
    a, b = members
    with daemon.client() as client:
        ports = {p.adopted.link: p for p in client.port_migrate().bridges[0].ports if p.adopted}
        first = ports[a.link]
        assert (first.mac, first.ifname, first.model) == (a.mac, "eth0", "adopt")
        assert {x.address for x in first.addresses} == {a.ip4, a.ip6}
        fresh = netns_factory()
        other = client.port_create("lab", fresh.path)
        assert not {x.address for x in other.addresses} & {a.ip4, a.ip6, b.ip4, b.ip6, HOST4, HOST6}
        for ns in (a.ns, b.ns):
            ns.run(["ip", "neigh", "flush", "all"])
        for target in (b.ip4, b.ip6, HOST4, HOST6, WORLD4, WORLD6, *(x.address for x in other.addresses)):
            assert a.ping(target), target
        assert fresh.run(["ping", "-n", "-c1", "-W1", b.ip4], check=False).returncode == 0
        # What it claims to be is checked from now on.
        a.ns.run(["ip", "addr", "add", "10.88.0.99/24", "dev", "eth0"])
        a.ns.run(["ping", "-n", "-c1", "-W1", "-I", "10.88.0.99", b.ip4], check=False)
        dropped = {d.reason for d in client.drops(first.port_id)}
        assert "src_ip" in dropped or "arp_spoof" in dropped
        checks = {check.name: check for check in client.doctor().checks}
        assert checks["data path"].ok, checks["data path"].detail
        assert checks["leaks"].ok, checks["leaks"].detail
        assert client.stats(first.port_id)[0].from_port.total.packets > 0
        client.port_set(first.port_id, admin="down")
        assert not a.ping(b.ip4)
        client.port_set(first.port_id, admin="up", mtu=1400)
        wait_until(lambda: a.ping(b.ip4), why="the link to be up again")
        assert lab.link(a.ns, "eth0").mtu == 1400
    daemon.kill()
    daemon.start()
    assert "restored" not in daemon.tail()
    assert a.ping(b.ip6)
    with daemon.client() as client:
        assert client.port_show(first.port_id).state == "attached"


def test_who_comes_onto_the_bridge_later_and_who_left_it_reach_each_other(
    daemon: Daemon, members: list[Member], netns_factory: NetnsFactory
) -> None:
    """As by a runtime that goes on using its bridge; and it can be moved too. A deleted port's addresses are
    not answered for on the bridge any more."""
    a, b = members
    with daemon.client() as client:
        ports = {p.adopted.link: p for p in client.port_migrate().bridges[0].ports if p.adopted}
        late = Member(netns_factory(), daemon.host, 13)
        for source, target in ((late, a), (a, late)):
            for address in (target.ip4, target.ip6):
                wait_until(lambda s=source, t=address: s.ping(t), why=f"{address} to answer")  # type: ignore[misc]  # bound at once
        client.port_delete(ports[b.link].port_id)
        proxied = daemon.host.run(["ip", "neigh", "show", "proxy"]).stdout
        assert a.ip4 in proxied
        assert b.ip4 not in proxied
        with lab.idle(late.ns, a.ns, a.ip6, 22) as connection:
            (moved,) = client.port_migrate(remove_bridge=True).bridges
            assert [p.adopted.link for p in moved.ports if p.adopted] == [late.link]
            connection.alive()


def test_a_connection_that_the_host_translates_goes_on(
    daemon: Daemon, members: list[Member], netns_factory: NetnsFactory
) -> None:
    """A published port leads from one container to another on a second bridge. Both have left their bridges
    when the one that was addressed speaks first: its packet is translated back."""
    a, host = members[0], daemon.host
    lab.ip(host, "link add br-two type bridge", "link set br-two up", "addr add 10.88.1.1/24 dev br-two")
    far = netns_factory()
    lab.ip(
        host,
        f"link add veth2lab type veth peer name eth0 netns {far.name}",
        "link set veth2lab master br-two up",
    )
    lab.ip(far, "link set eth0 up", "addr add 10.88.1.2/24 dev eth0", "route add default via 10.88.1.1")
    rules = """
        table ip lab {
            chain p {
                type nat hook prerouting priority -100;
                tcp dport 8080 dnat to 10.88.1.2:80;
            }
        }
    """
    host.run(["nft", "-f", "-"], input=rules)
    with listening(far, 80) as server, ExitStack() as stack:
        near = stack.enter_context(closing(connect(a.ns, HOST4, 8080, timeout=10)))
        server.settimeout(5)
        accepted = stack.enter_context(closing(server.accept()[0]))
        with daemon.client() as client:
            client.network_delete("lab")
            client.network_create(
                "lab", subnets=["10.88.0.0/16", "fd88::/64"], reserved=["10.88.0.1", "10.88.1.1"]
            )
            assert len(client.port_migrate().bridges) == 2
        near.settimeout(5)
        accepted.sendall(b"from the far end")
        assert near.recv(64) == b"from the far end"
        near.sendall(b"and back")
        assert accepted.recv(64) == b"and back"


def test_doctor_says_who_depends_on_a_bridge(daemon: Daemon, members: list[Member]) -> None:
    """By name and number, with the command; and no more when they have left."""
    del members

    def finding() -> str:
        with daemon.client() as client:
            check = next(c for c in client.doctor().checks if c.name == "bridges")
        assert bool(check.way_out) is not check.ok
        return f"{check.detail} {check.way_out}"

    assert f"{BRIDGE}: 2 containers" in finding()
    assert f"portwright port migrate --bridge {BRIDGE}" in finding()
    daemon.cli("port", "migrate", "--bridge", BRIDGE)
    assert "no sandbox depends on a bridge" in finding()


def test_a_dry_run_changes_nothing(daemon: Daemon, members: list[Member]) -> None:
    """It prints the commands, and host and record stay as they were."""
    before = lab.picture(daemon.host)
    said = daemon.cli("port", "migrate", "--bridge", BRIDGE, "--remove-bridge", "--dry-run").stdout
    for member in members:
        assert f"ip link property add dev {member.link}" in said
    assert said.count("nomaster") == 2
    assert said.endswith(f"ip link delete {BRIDGE}\n")
    assert lab.picture(daemon.host) == before
    with daemon.client() as client:
        assert client.port_list() == ()


def test_a_bridge_that_stays_keeps_what_it_has(daemon: Daemon, members: list[Member]) -> None:
    """Without --remove-bridge it is there with its MAC and addresses, and can be removed later."""
    a, _ = members
    before = lab.link(daemon.host, BRIDGE)
    with daemon.client() as client:
        client.port_migrate(BRIDGE)
        assert lab.link(daemon.host, BRIDGE).mac == before.mac
        assert [a.ping(HOST4), a.ping(HOST6)] == [True, True]
        assert client.port_migrate(BRIDGE, remove_bridge=True).bridges[0].removed
        assert BRIDGE not in lab.names(daemon.host)
        assert [a.ping(HOST4), a.ping(HOST6)] == [True, True]
        # With the last port the host's loopback is its own again.
        for port in client.port_list():
            client.port_delete(port.port_id)
    daemon.stop()
    assert HOST4 not in daemon.host.run(["ip", "addr", "show", "dev", "lo"]).stdout
    daemon.start()


def test_deleting_a_moved_port_leaves_its_device_closed(daemon: Daemon, members: list[Member]) -> None:
    """Nothing of ours stays on it: no name, program, qdisc or route; its sandbox has no carrier. The others
    go on. Its maker still finds it by its own name."""
    a, b = members
    with daemon.client() as client:
        ports = {p.adopted.link: p for p in client.port_migrate().bridges[0].ports if p.adopted}
        client.port_delete(ports[a.link].port_id)
        left = lab.link(daemon.host, a.link)
        assert (left.altnames, left.up) == ((), False)
        assert "clsact" not in daemon.host.run(["tc", "qdisc", "show", "dev", a.link]).stdout
        assert a.link not in daemon.host.run(["ip", "route", "show", "table", "all"]).stdout
        assert "NO-CARRIER" in a.ns.run(["ip", "link", "show", "eth0"]).stdout
        assert b.ping(HOST4)
        daemon.host.run(["ip", "link", "delete", a.link])


def test_a_container_that_ends_is_a_detached_port(daemon: Daemon, members: list[Member]) -> None:
    """Its runtime deletes the device: the port is detached, and can't be given another."""
    a, b = members
    with daemon.client() as client:
        ports = {p.adopted.link: p for p in client.port_migrate().bridges[0].ports if p.adopted}
        port_id = ports[a.link].port_id
        a.ns.run(["ip", "link", "delete", "eth0"])
        wait_until(lambda: client.port_show(port_id).state == "detached", why="the event to be acted on")
        with pytest.raises(NotSupported, match="port of another"):
            client.port_plug(port_id, a.ns.path)
        client.port_delete(port_id)
        assert b.ping(HOST6)


def _refused(daemon: Daemon, match: str, kind: type[Exception] = Conflict, **wish: object) -> None:
    """The move is refused, by an error that says this, and nothing has changed."""
    before = lab.picture(daemon.host)
    with daemon.client() as client:
        with pytest.raises(kind, match=match):
            client.port_migrate(BRIDGE, **wish)  # type: ignore[arg-type]
        assert client.port_list() == ()
        assert all(
            view.used == 0 for n in client.network_list() for view in client.network_show(n.name).usage
        )
    assert lab.picture(daemon.host) == before


def test_what_cannot_be_moved_is_refused_by_name(daemon: Daemon, members: list[Member]) -> None:
    """Other devices on the bridge, containers without an address, VLANs, isolation that would be lost, chains
    that would drop; each with its way out, and nothing has changed."""
    host, a = daemon.host, members[0]
    lab.ip(host, "link add stray0 type veth peer name stray1", f"link set stray0 master {BRIDGE} up")
    _refused(daemon, "stray0: it is a veth device and no sandbox's")
    lab.ip(host, "link delete stray0")
    filtering = ["ip", "link", "set", BRIDGE, "type", "bridge", "vlan_filtering"]
    if host.run([*filtering, "1"], check=False).returncode == 0:  # the kernel has it
        _refused(daemon, "keeps VLANs apart", NotSupported)
        host.run([*filtering, "0"])
    host.run(["bridge", "link", "set", "dev", a.link, "isolated", "on"])
    _refused(daemon, "--isolation")
    host.run(["bridge", "link", "set", "dev", a.link, "isolated", "off"])
    host.run(
        ["nft", "add table ip lab; add chain ip lab f { type filter hook forward priority 0; policy drop; }"]
    )
    _refused(daemon, "--forwarding-accepted")
    host.run(["nft", "delete table ip lab"])
    for claimed, holder in ((members[1].ip4, a.link), (HOST4, "the host")):
        a.ns.run(["ip", "addr", "add", f"{claimed}/32", "dev", "eth0"])
        _refused(daemon, f"claims {claimed}, which {holder} has")
        a.ns.run(["ip", "addr", "del", f"{claimed}/32", "dev", "eth0"])
    a.ns.run(["ip", "route", "replace", "default", "via", members[1].ip4])
    _refused(daemon, f"{a.link} is routed by {members[1].ip4}")
    a.ns.run(["ip", "route", "replace", "default", "via", HOST4])
    lab.ip(a.ns, *(f"addr add 10.88.0.{number}/32 dev eth0" for number in range(130, 195)))
    _refused(daemon, "has 67 addresses; 64 at most")
    a.ns.run(["ip", "addr", "flush", "dev", "eth0", "scope", "global"])
    _refused(daemon, f"--address {a.mac}=ADDRESS")
    with daemon.client() as client:
        for name, kind, match in (
            ("none", NotFound, "bridge 'none'"),
            (a.link, InvalidInput, "another kind"),
        ):
            with pytest.raises(kind, match=match):
                client.port_migrate(name)
        with pytest.raises(InvalidInput, match="no sandbox on these bridges"):
            client.port_migrate(BRIDGE, addresses={"02:00:00:00:00:77": ["10.88.0.77"]})
        with pytest.raises(NotSupported, match="port migrate"):
            client.port_create("lab", members[1].ns.path, model="adopt")


def test_a_network_that_does_not_fit_is_refused_with_the_command(
    daemon: Daemon, members: list[Member]
) -> None:
    """None that holds the addresses: the command that makes one, which then does."""
    del members
    with daemon.client() as client:
        client.network_delete("lab")
        with pytest.raises(Conflict) as caught:
            client.port_migrate(BRIDGE)
        command = caught.value.why.rpartition("portwright ")[2].split()
        daemon.cli(*command)
        assert len(client.port_migrate(BRIDGE).bridges[0].ports) == 2


@pytest.mark.usefixtures("by_clsact")
def test_a_failure_half_way_puts_all_back(daemon: Daemon, members: list[Member]) -> None:
    """Somebody's ingress qdisc on the second container's device: the first is back on the bridge too."""
    a, b = members
    daemon.host.run(["tc", "qdisc", "add", "dev", b.link, "ingress"])
    _refused(daemon, "held by an ingress qdisc")
    assert a.ping(b.ip4)
    assert a.ping(b.ip6)


def test_another_owners_filters_on_the_device_survive(daemon: Daemon, members: list[Member]) -> None:
    """A clsact that was there stays, with its filters, through move and delete."""
    a, _ = members
    host = daemon.host
    host.run(["tc", "qdisc", "add", "dev", a.link, "clsact"])
    host.run(
        [
            *("tc", "filter", "add", "dev", a.link, "ingress"),
            "pref",
            "5",
            *["protocol", "ip", "u32", "match", "u32", "0", "0"],
        ]
    )
    with daemon.client() as client:
        ports = {p.adopted.link: p for p in client.port_migrate().bridges[0].ports if p.adopted}
        client.port_delete(ports[a.link].port_id)
    found = host.run(["tc", "filter", "show", "dev", a.link, "ingress"]).stdout
    assert "u32" in found
    assert "pw_from_port" not in found
