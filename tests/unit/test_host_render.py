"""The nftables table of host endpoints by value: every field of a rule, its chains, the bounds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from portwright.plan import hosts as scripts
from portwright.plan.nat import table_name
from portwright.policy.host import bounds
from portwright.policy.host.matches import HEADER, ORIGINAL, AddressSets, Matcher, Words
from portwright.policy.host.render import Rendered, render
from portwright.policy.host.stages import Bound, Stage, bind
from portwright.policy.labels import EVERYTHING, In
from portwright.policy.rules import (
    BUILT_IN_TIERS,
    ICMP,
    ICMP6,
    SCTP,
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    NamedPort,
    OnChange,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Tier,
    Traffic,
    Where,
)
from portwright.policy.tables import PolicyTooLarge
from tests.unit.test_host_judge import FORWARD, PRE_DNAT, UNTRACKED, host, policy, rule

WEB = Endpoint(
    name="web",
    labels={"app": "web"},
    addresses=("10.0.0.5", "fd00::5"),
    named_ports=(NamedPort("http", TCP, 8080), NamedPort("http", UDP, 8081)),
)
OFFICE = Endpoint(
    name="office", kind=EndpointKind.NETWORK_SET, labels={"app": "office"}, nets=("10.9.0.0/16",)
)
NODE = Endpoint(name="n", kind=EndpointKind.NODE, labels={"zone": "a"}, addresses=("192.0.2.9",))
FLAGS: list[dict[str, Any]] = [{}, FORWARD, PRE_DNAT, UNTRACKED]
#: A pod on its node's address is no endpoint of that.
ON_NODE = msgspec.structs.replace(WEB, name="on-node", addresses=("192.0.2.8",), host_network=True)
SNAPSHOT = Snapshot(endpoints=(WEB, OFFICE, NODE, ON_NODE))


def table(*policies: Policy, tiers: tuple[Tier, ...] = (), bound: tuple[Bound, ...] = ()) -> Rendered:
    """Of these policies, for eth0 unless others are given."""
    return render(
        PolicySet(tiers=(*BUILT_IN_TIERS, *tiers), policies=policies), SNAPSHOT, bound or bind([host()], {})
    )


def lines(given: Rule, direction: Direction = Direction.INGRESS, words: Words = HEADER) -> list[str]:
    """Its matches, the sets' names replaced by what is in them."""
    sets = AddressSets()
    found = Matcher(SNAPSHOT, sets).lines(given, direction, words)
    return [re.sub(r"@(a[46]_\w+)", lambda m: f"<{' '.join(sets.sets[m[1]][1])}>", line) for line in found]


def allow(**fields: Any) -> Rule:
    """A rule with these fields."""
    return Rule(action=Action.ALLOW, **fields)


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        (Traffic(), [""]),
        (Traffic(protocol=99), ["meta l4proto 99"]),
        (Traffic(ip_version=6), ["meta nfproto ipv6"]),
        (Traffic(protocol=TCP, ip_version=4), ["meta nfproto ipv4 meta l4proto 6"]),
        (
            Traffic(protocol=TCP, ports=(PortRange(80, 80), PortRange(81, 90), PortRange(443, 443))),
            ["meta l4proto 6 th dport { 80-90, 443 }"],
        ),
        (Traffic(protocol=UDP, ports=(PortRange(0, 65535),)), ["meta l4proto 17 th dport 0-65535"]),
        (
            Traffic(ports=(PortRange(80, 80),)),
            [f"meta l4proto {number} th dport 80" for number in (TCP, UDP, SCTP)],
        ),
        (
            Traffic(protocol=SCTP, source_ports=(PortRange(1, 5),), ports=(PortRange(9, 9),)),
            ["meta l4proto 132 th sport 1-5 th dport 9"],
        ),
        (Traffic(protocol=99, ports=(PortRange(80, 80),)), []),
        (Traffic(protocol=ICMP, icmp_type=8), ["meta l4proto 1 @th,0,8 8"]),
        (Traffic(protocol=ICMP6, icmp_type=1, icmp_code=3), ["meta l4proto 58 @th,0,8 1 @th,8,8 3"]),
        (Traffic(icmp_type=3), ["meta l4proto 1 @th,0,8 3", "meta l4proto 58 @th,0,8 3"]),
        (Traffic(protocol=TCP, icmp_type=3), []),
        (
            Traffic(protocol=TCP, names=("http",)),
            [
                "meta l4proto 6 ip daddr 10.0.0.5 th dport 8080",
                "meta l4proto 6 ip6 daddr fd00::5 th dport 8080",
            ],
        ),
        (
            Traffic(protocol=UDP, source_names=("http",), ip_version=6),
            ["meta l4proto 17 ip6 saddr fd00::5 th sport 8081"],
        ),
        (Traffic(protocol=TCP, names=("nobody's",)), []),
    ],
)
def test_what_a_packet_is(traffic: Traffic, expected: list[str]) -> None:
    """Each field alone and together; what can't be is no line."""
    assert lines(allow(traffic=(traffic,))) == expected


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (Peer(), [""]),
        (
            Peer(nets=("10.0.0.0/8", "10.1.0.0/16", "fd00::/8")),
            ["ip saddr 10.0.0.0/8", "ip6 saddr fd00::/8"],
        ),
        (Peer(nets=()), []),
        (Peer(nets=("0.0.0.0/0",)), ["meta nfproto ipv4"]),
        (Peer(not_nets=("10.0.0.0/8",)), ["ip saddr != 10.0.0.0/8", "meta nfproto ipv6"]),
        (Peer(not_nets=("0.0.0.0/0",)), ["meta nfproto ipv6"]),
        (Peer(selector=In("app", frozenset({"web"}))), ["ip saddr 10.0.0.5", "ip6 saddr fd00::5"]),
        (Peer(selector=In("app", frozenset({"office"}))), ["ip saddr 10.9.0.0/16"]),
        (
            Peer(not_selector=EVERYTHING),
            ["ip saddr != <10.0.0.5 10.9.0.0/16>", "ip6 saddr != fd00::5"],
        ),
        (Peer(nodes=In("zone", frozenset({"a"}))), ["ip saddr 192.0.2.9"]),
        (
            Peer(nets=("10.0.0.0/8",), selector=In("app", frozenset({"web"})), not_nets=("10.0.0.9/32",)),
            ["ip saddr 10.0.0.0/8 ip saddr 10.0.0.5 ip saddr != 10.0.0.9"],
        ),
        (Peer(domains=("example.com",)), []),
    ],
)
def test_whose_address_it_is(peer: Peer, expected: list[str]) -> None:
    """Each field, in both families; the other side's address, whichever that is."""
    assert lines(allow(peers=(peer,))) == expected
    turned = [line.replace("saddr", "daddr") for line in expected]
    assert lines(allow(peers=(peer,)), Direction.EGRESS) == turned
    assert lines(allow(local=peer)) == turned


def test_sides_and_traffic_are_multiplied_and_nobody_is_no_line() -> None:
    """Two peers, one own side, two kinds of traffic; () of peers or of traffic."""
    given = allow(
        peers=(Peer(nets=("10.0.0.0/8",)), Peer(nets=("fd00::/8",))),
        local=Peer(nets=("192.0.2.0/24",)),
        traffic=(Traffic(protocol=TCP), Traffic(protocol=UDP, ip_version=6)),
    )
    assert lines(given) == ["meta l4proto 6 ip daddr 192.0.2.0/24 ip saddr 10.0.0.0/8"]
    assert lines(allow(peers=())) == []
    assert lines(allow(traffic=())) == []


def test_the_original_packet_is_asked_for_in_conntracks_words() -> None:
    """Addresses and ports; the protocol comes first, by which nft reads them."""
    given = allow(
        peers=(Peer(nets=("10.0.0.0/8",)),), traffic=(Traffic(protocol=TCP, ports=(PortRange(80, 80),)),)
    )
    assert lines(given, words=ORIGINAL) == [
        "meta l4proto 6 ct original ip saddr 10.0.0.0/8 ct original proto-dst 80"
    ]


def reached(rendered: Rendered, chain: str) -> list[str]:
    """The chain's lines without comments and counters' names."""
    plain = (re.sub(r' comment "[^"]*"', "", line) for line in rendered.chains[chain])
    return [re.sub(r'counter name "\w+"', "count", line) for line in plain]


def test_a_tier_is_a_chain_and_a_pass_returns() -> None:
    """With the tier's default at its end, and the host's at the program's."""
    made = table(policy("web", rule(Action.PASS, 79), rule(Action.ALLOW, 80), rule(Action.DENY, 81)))
    assert reached(made, "li0m") == ["jump li0mt0", "count drop"]
    assert reached(made, "li0mt0") == [
        "meta l4proto 6 th dport 79 return",
        "meta l4proto 6 th dport 80 accept",
        "meta l4proto 6 th dport 81 count drop",
        "count drop",
    ]
    sites = {(s.stage, s.direction, s.rule) for s in made.counters.values()}
    assert (Stage.LOCAL, Direction.INGRESS, "GlobalNetworkPolicy web ingress[2]") in sites
    assert (Stage.LOCAL, Direction.INGRESS, "tier-default default ingress") in sites
    assert (Stage.LOCAL, Direction.EGRESS, "host-default") in sites


def test_exclusions_have_a_chain_and_a_pass_from_it_goes_to_the_tiers_that_are_left() -> None:
    """A return would lead back into the tier."""
    made = table(
        policy("gate", rule(Action.PASS, without=81), tier="first"),
        policy("web", rule(Action.ALLOW, without=82)),
        tiers=(Tier(name="first", order=1.0),),
    )
    (jump, default) = reached(made, "li0mt0")
    assert default == "count drop"
    assert reached(made, jump.removeprefix("jump ")) == ["meta l4proto 6 th dport 81 return", "goto li0ma0"]
    assert reached(made, "li0ma0") == ["jump li0mt1", "count drop"]
    assert reached(made, reached(made, "li0mt1")[0].removeprefix("jump "))[-1] == "accept"


def test_what_an_earlier_stage_said_is_asked_for_and_not_said_again() -> None:
    """Its allow ends the later one, its deny is no word: what it denied is gone, or was a failsafe's."""
    rules = (rule(Action.DENY, 80), rule(Action.ALLOW, 81), Rule(action=Action.LOG), rule(Action.PASS))
    made = table(
        policy("raw", *rules, **UNTRACKED), policy("pre", *rules, **PRE_DNAT), policy("f", **FORWARD)
    )
    for name in ("li0", "fi0"):
        assert {"ct state untracked goto " + name + "u", "ct direction original goto " + name + "p"} <= set(
            reached(made, name)
        )
        for asked, port in (("u", "th dport"), ("p", "ct original proto-dst")):
            assert reached(made, f"{name}{asked}t0") == [
                f"meta l4proto 6 {port} 80 goto {name}m",
                f"meta l4proto 6 {port} 81 accept",
                "return",
            ]
            assert reached(made, f"{name}{asked}")[-1] == f"goto {name}m"


def test_the_stages_have_their_hooks_and_only_where_they_are_asked_for() -> None:
    """An endpoint alone has the local ones; each flag brings its own."""
    local = {"input", "output"}
    assert set(table().bases) == local
    both: dict[str, Any] = {"egress": ()}
    assert set(table(policy("f", **FORWARD)).bases) == local | {"forward_in"}
    assert set(table(policy("f", **both, **FORWARD)).bases) == local | {"forward_in", "forward_out"}
    assert set(table(policy("p", **PRE_DNAT)).bases) == local | {"pre_dnat"}
    assert set(table(policy("u", **both, **UNTRACKED)).bases) == local | {"untracked_in", "untracked_out"}
    found = table(policy("u", **both, **UNTRACKED), policy("p", **PRE_DNAT)).bases
    priorities = {name: int(hook.rpartition(" ")[2]) for name, hook in found.items()}
    assert priorities["untracked_in"] < -300 < -200 < priorities["pre_dnat"] < -105
    assert table(bound=()).bases


def test_no_endpoint_is_no_table() -> None:
    """Not a chain, not a counter."""
    empty = render(PolicySet(), SNAPSHOT, ())
    assert (empty.bases, empty.chains, empty.sets, empty.counters) == ({}, {}, {}, {})


def test_all_interfaces_are_those_that_are_nobody_elses() -> None:
    """The named first, never the loopback or a port's."""
    made = table(bound=bind([host("a", "eth0"), host("b", "*")], {}))
    assert reached(made, "input") == [
        'iifname "eth0" goto li0',
        'iifname "lo" accept',
        'iifname "pw*" accept',
        "goto li1",
    ]


@pytest.mark.parametrize("on_change", list(OnChange))
def test_what_a_deny_does_with_open_connections(on_change: OnChange) -> None:
    """Kept before the drop, told, or neither; the default of a tier does as its policies say."""
    made = table(policy("web", rule(Action.DENY, 80), on_change=on_change))
    denied, default = reached(made, "li0mt0")
    if on_change is OnChange.RECHECK:
        assert (denied, default) == ("meta l4proto 6 th dport 80 count drop", "count drop")
        return
    target = denied.partition("goto ")[2]
    assert target
    assert default.startswith("goto ")
    if on_change is OnChange.KEEP:
        assert reached(made, target) == ["ct state established accept", "count", "drop"]
    else:
        assert reached(made, target)[1:] == [
            "count",
            "meta l4proto 6 ct state established reject with tcp reset",
            "drop",
        ]


@pytest.mark.parametrize("on_change", list(OnChange))
def test_a_listener_hears_of_drops(on_change: OnChange) -> None:
    """Each that is counted, by its counter's name and at a rate; before the verdict, whatever that is."""
    made = render(
        PolicySet(policies=(policy("web", rule(Action.DENY, 80), on_change=on_change),)),
        SNAPSHOT,
        bind([host()], {}),
        told=7,
    )
    [chain] = {line.partition("goto ")[2] for line in reached(made, "li0mt0") if "dport 80" in line}
    counted = next(line for line in made.chains[chain] if line.startswith("counter"))
    name = counted.split('"')[1]
    assert made.counters[name].rule == "GlobalNetworkPolicy web ingress[0]"
    told = f'limit rate 64/second burst 64 packets log prefix "{name}" group 7 snaplen 128'
    after = made.chains[chain][made.chains[chain].index(counted) + 1 :]
    reset = ["meta l4proto 6 ct state established reject with tcp reset"]
    assert list(after) == [told, *(reset if on_change is OnChange.RESET else []), "drop"]


def test_a_log_rule_is_a_line_of_calicos_prefix_and_decides_nothing() -> None:
    """Once a connection, at a rate; in an untracked stage each packet is a first."""
    logs = Rule(action=Action.LOG)
    log = 'limit rate 100/second log prefix "calico-packet: " level notice'
    assert reached(table(policy("l", logs)), "li0mt0") == [f"ct state new {log}", "count drop"]
    assert reached(table(policy("l", logs, **UNTRACKED)), "ui0t0") == [log]


def test_no_mark_is_set_or_asked() -> None:
    """Of packets and connections alike: they are the user's."""
    everything = (
        rule(Action.DENY, 80),
        rule(Action.PASS, without=81),
        rule(Action.ALLOW),
        Rule(action=Action.LOG),
    )
    made = table(
        *(
            policy(f"p{n}", *everything, on_change=change, **flags)
            for n, (flags, change) in enumerate(zip(FLAGS, 2 * list(OnChange), strict=False))
        )
    )
    assert not [line for chain in made.chains.values() for line in chain if "mark" in line]


def test_names_can_not_break_out_of_the_script() -> None:
    """Whatever a policy, a tier or an endpoint is called: quotes, newlines, braces, NUL."""
    evil = 'x" } \n add rule inet a b drop; {$(\0'
    named = policy(evil, rule(Action.DENY, 80), rule(Action.DENY, without=80), where=Where(evil, 1, evil))
    made = table(named, bound=bind([host(evil, "eth0")], {}))
    for line in (one for chain in made.chains.values() for one in chain):
        assert re.fullmatch(r'[^"\n]*("[A-Za-z0-9 ._/\[\]*-]*"[^"\n]*)*', line), line
        assert "\0" not in line
    script = scripts.put_hosts("", made, scripts.Present())
    first_words = {line.split()[0] for line in script.splitlines()}
    assert first_words == {"add", "flush"}
    assert {s.endpoint for s in made.counters.values()} == {evil}


def test_the_same_is_rendered_the_same() -> None:
    """So that a change which is none is seen as none."""
    policies = (policy("web", rule(Action.ALLOW, 80, net="10.0.0.0/8"), rule(Action.PASS, without=81)),)
    assert table(*policies) == table(*policies)


def _texts(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"10.{n >> 8 & 255}.{n & 255}.1/32" for n in numbers)


def test_the_bounds_name_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines, addresses, and the depth of chains."""
    small = policy("small", rule(Action.ALLOW, 80))
    monkeypatch.setattr(bounds, "MAX_LINES", 100)
    with pytest.raises(PolicyTooLarge, match=r"lines.*GlobalNetworkPolicy big alone adds 200"):
        table(small, policy("big", *(rule(Action.ALLOW, n) for n in range(1, 201))))
    monkeypatch.undo()
    monkeypatch.setattr(bounds, "MAX_ELEMENTS", 100)
    nets = Rule(action=Action.ALLOW, peers=(Peer(nets=_texts(range(0, 202, 2))),))
    with pytest.raises(PolicyTooLarge, match=r"addresses.*GlobalNetworkPolicy big"):
        table(small, policy("big", nets))
    monkeypatch.undo()
    monkeypatch.setattr(bounds, "MAX_SETS", 10)
    many = (Rule(action=Action.ALLOW, peers=(Peer(nets=_texts((n, n + 2))),)) for n in range(11))
    with pytest.raises(PolicyTooLarge, match=r"sets of addresses.*GlobalNetworkPolicy big alone adds 11"):
        table(small, policy("big", *many))
    monkeypatch.undo()
    tiers = tuple(Tier(name=f"t{n}", order=float(n)) for n in range(6))
    passing = [policy(f"p{n}", rule(Action.PASS, without=80), tier=f"t{n}") for n in range(6)]
    assert table(*passing[:3], tiers=tiers)
    with pytest.raises(PolicyTooLarge, match=r"levels.*GlobalNetworkPolicy p\d"):
        table(*passing, tiers=tiers)


def test_a_script_exchanges_what_changed_and_keeps_what_stays() -> None:
    """Sets and counters of the same content stay, chains' rules are all new, the table itself is there."""
    ours, theirs = (
        Rule(action=Action.ALLOW, peers=(Peer(nets=nets),)) for nets in (_texts((1, 3)), _texts((5, 7)))
    )
    one = policy("one", ours, rule(Action.DENY, 81))
    two = policy("two", theirs, **FORWARD)
    before, after = table(one), table(one, two)
    full = scripts.put_hosts("ab", before, scripts.Present()).splitlines()
    name = "portwright-hosts_ab"
    assert full[:2] == [f"add table inet {name}", f"flush table inet {name}"]
    assert not [line for line in full if line.startswith("delete")]
    change = scripts.put_hosts("ab", after, scripts.present(before)).splitlines()
    assert sum(line.startswith("add set") for line in change) == 1
    assert not [line for line in change if line.startswith("delete")]
    back = scripts.put_hosts("ab", before, scripts.present(after)).splitlines()
    gone = {line.split()[1] for line in back if line.startswith("delete")}
    assert gone == {"chain", "set", "counter"}
    assert not [line for line in back if line.startswith(("add set", "add counter"))]
    # Of a table that was found, sets' contents are not taken on trust.
    found = scripts.present(before)._replace(known_sets=frozenset())
    again = scripts.put_hosts("ab", before, found).splitlines()
    assert [line.split()[0] for line in again if " set inet" in line] == ["delete", "add"]


def test_the_tables_name_is_no_daemons() -> None:
    """The one of the first daemon and of those beside it; what counts daemons by their tables counts none."""
    assert scripts.hosts_table() == "portwright-hosts"
    assert scripts.hosts_table("ab12") == "portwright-hosts_ab12"
    assert not scripts.hosts_table("ab12").startswith(f"{table_name()}_")
