"""Generated rules of Calico's, converted and decided by the engine, against a second reading of the manifest.

The second reading takes a rule's fields one by one, as Calico's reference describes them, over a world that
is written down here by hand; it shares nothing with the converter, the selector parser or the engine.
"""

from __future__ import annotations

import functools
import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from portwright.policy.engine import Engine
from portwright.policy.manifests.calico import V3
from portwright.policy.manifests.read import read
from portwright.policy.rules import Direction, Endpoint, Flow
from portwright.policy.selector import NAMESPACE_KEY

DATA: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "policy" / "calico_cases.yaml").read_text()
)
WORLD: Final = read([("world.yaml", DATA["world"])]).snapshot


@dataclass(frozen=True)
class Thing:
    """Something with an address: an endpoint or a network set."""

    labels: dict[str, str]
    namespace: str | None = None
    team: str | None = None
    account: str | None = None
    role: str | None = None
    ports: dict[tuple[str, int], int] = field(default_factory=dict)


#: The world of calico_cases.yaml as the rules see it.
THINGS: Final = {
    "shop/web": Thing({"app": "web", "tier": "front"}, "shop", "pay", "default", None, {("http", 6): 8080}),
    "shop/db": Thing({"app": "db"}, "shop", "pay", "default", None, {("sql", 6): 5432, ("dns", 17): 53}),
    "bank/web": Thing({"app": "web", "tier": "front"}, "bank", "vault", "default", None, {("http", 6): 9090}),
    "bank/safe": Thing({"app": "safe"}, "bank", "vault", "teller", "cash"),
    "partner": Thing({"kind": "partner"}),
    "office": Thing({"kind": "office"}, "shop", "pay"),
    "gateway": Thing({"kind": "gateway"}),
    "stranger": None,
}
AT: Final = {address: THINGS[name] for name, addresses in DATA["addresses"].items() for address in addresses}

SELECTORS: Final[dict[str, Callable[[Thing], bool]]] = {
    "all()": lambda _: True,
    "app == 'web'": lambda thing: thing.labels.get("app") == "web",
    "app != 'web'": lambda thing: thing.labels.get("app") != "web",
    "!has(tier) || kind in {'office'}": lambda t: "tier" not in t.labels or t.labels.get("kind") == "office",
    "has(kind) && !(kind ends with 'ner')": lambda t: t.labels.get("kind") in {"office", "gateway"},
    "pcns.team == 'pay'": lambda thing: thing.team == "pay",
}
NAMESPACE_SELECTORS: Final[dict[str, Callable[[Thing], bool]]] = {
    "all()": lambda thing: thing.namespace is not None,
    "global()": lambda thing: thing.namespace is None,
    "team == 'vault'": lambda thing: thing.team == "vault",
    "team != 'pay'": lambda thing: thing.team != "pay",
    "projectcalico.org/name in {'shop', 'x'}": lambda thing: thing.namespace == "shop",
}
ACCOUNT_SELECTORS: Final[dict[str, Callable[[Thing], bool]]] = {
    "has(role)": lambda thing: thing.role is not None,
    "role != 'cash'": lambda thing: thing.role != "cash",
}
NETS: Final = ["10.0.0.0/8", "10.1.0.0/16", "10.2.0.2/32", "203.0.113.5", "0.0.0.0/1"]
PORTS: Final[list[int | str]] = [80, 53, "5000:6000", "sql", "http", "dns", 9090]
NAMES: Final[list[int | str]] = ["sql", "http", "dns"]
NUMBERS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, 47: 47}


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Absent more often than not, since fields are ANDed and few rules would match."""
    return st.one_of(st.none(), st.none(), strategy)


def some(values: list[Any]) -> st.SearchStrategy[list[Any]]:
    """One to three of them."""
    return st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True)


def entities(ports: list[int | str]) -> st.SearchStrategy[dict[str, Any]]:
    """A rule's source or destination, its ports among these."""
    accounts = st.fixed_dictionaries(
        {
            "names": maybe(some(["default", "teller"])),
            "selector": maybe(st.sampled_from(list(ACCOUNT_SELECTORS))),
        }
    )
    return st.fixed_dictionaries(
        {
            "nets": maybe(some(NETS)),
            "notNets": maybe(some(NETS)),
            "selector": maybe(st.sampled_from(list(SELECTORS))),
            "notSelector": maybe(st.sampled_from(list(SELECTORS))),
            "namespaceSelector": maybe(st.sampled_from(list(NAMESPACE_SELECTORS))),
            "serviceAccounts": maybe(accounts),
            "ports": maybe(some(ports)) if ports else st.none(),
            "notPorts": maybe(some(ports)) if ports else st.none(),
        }
    )


def rules_of(protocols: list[Any], ports: list[int | str]) -> st.SearchStrategy[dict[str, Any]]:
    """Rules that Calico's API accepts, of one of these protocols, their ports among these."""
    icmp = st.sampled_from([{"type": 8}, {"type": 3, "code": 4}, {}]) if protocols == ["ICMP"] else st.none()
    return st.fixed_dictionaries(
        {
            "action": st.just("Allow"),
            "protocol": st.sampled_from(protocols),
            "notProtocol": maybe(st.sampled_from(list(NUMBERS))),
            "ipVersion": maybe(st.just(4)),
            "icmp": maybe(icmp),
            "notICMP": maybe(icmp),
            "source": entities(ports),
            "destination": entities(ports),
        }
    )


RULES: Final = st.one_of(
    rules_of([None], NAMES),
    rules_of(["TCP", "UDP", "SCTP"], PORTS),
    rules_of(["ICMP"], []),
    rules_of([47], []),
)


def flows() -> list[Flow]:
    """Every pair of the world, each with one packet of one kind or another."""
    kinds: list[tuple[int, int | None, int | None]] = [
        *((6, 80, None), (6, 5432, None), (6, 8080, None), (6, 9090, None), (17, 53, None), (17, 80, None)),
        *((132, 5432, None), (1, 8, 0), (1, 3, 4), (1, 3, 1), (47, None, None)),
    ]
    found: list[Flow] = []
    for number, (source, target) in enumerate((a, b) for a in AT for b in AT if (":" in a) == (":" in b)):
        for offset in (0, 5):
            protocol, first, second = kinds[(number + offset) % len(kinds)]
            ports = protocol in {6, 17, 132}
            found.append(
                Flow(
                    source=source,
                    destination=target,
                    protocol=protocol,
                    # Servers answer from their ports too: source ports are worth naming.
                    source_port=(8080 if number % 3 else 5432) if ports else None,
                    port=first if ports else None,
                    icmp_type=None if ports else first,
                    icmp_code=None if ports else second,
                )
            )
    return found


FLOWS: Final = flows()


@functools.cache
def inside(address: str, net: str) -> bool:
    """Whether the address lies in the net."""
    return ipaddress.ip_address(address) in ipaddress.ip_network(net)


def ports_hold(ports: list[int | str], address: str, port: int | None, protocol: int) -> bool:
    """Whether the port is one of these numbers, ranges and names."""
    thing = AT[address]
    for wanted in ports:
        if isinstance(wanted, int):
            if port == wanted:
                return True
        elif ":" in wanted:
            first, _, last = wanted.partition(":")
            if port is not None and int(first) <= port <= int(last):
                return True
        elif thing is not None and port is not None and thing.ports.get((wanted, protocol)) == port:
            return True
    return False


def entity_holds(
    entity: dict[str, Any], namespace: str, address: str, port: int | None, protocol: int
) -> bool:
    """Whether one side of a packet is what the rule says of it."""
    thing = AT[address]
    here = ipaddress.ip_address(address)
    nets, not_nets = ([ipaddress.ip_network(net) for net in entity[key] or []] for key in ("nets", "notNets"))
    if (nets and not any(here in net for net in nets)) or any(here in net for net in not_nets):
        return False
    accounts = entity["serviceAccounts"] or {}
    names, chosen = accounts.get("names"), accounts.get("selector")
    asks = entity["selector"] or entity["namespaceSelector"] or names or chosen
    if asks or (namespace and entity["notSelector"]):
        if thing is None:
            return False
        if entity["namespaceSelector"]:
            if not NAMESPACE_SELECTORS[entity["namespaceSelector"]](thing):
                return False
        elif namespace and thing.namespace != namespace:
            return False
        if names and thing.account not in names:
            return False
        if chosen and not ACCOUNT_SELECTORS[chosen](thing):
            return False
        if entity["selector"] and not SELECTORS[entity["selector"]](thing):
            return False
    if entity["notSelector"] and thing is not None and SELECTORS[entity["notSelector"]](thing):
        return False
    if entity["ports"] and not ports_hold(entity["ports"], address, port, protocol):
        return False
    return not (entity["notPorts"] and ports_hold(entity["notPorts"], address, port, protocol))


def rule_holds(rule: dict[str, Any], namespace: str, flow: Flow) -> bool:
    """Whether the packet is what the rule says."""
    if rule["protocol"] is not None and NUMBERS[rule["protocol"]] != flow.protocol:
        return False
    if rule["notProtocol"] is not None and NUMBERS[rule["notProtocol"]] == flow.protocol:
        return False
    # All nets here are IPv4, and such a rule is of IPv4 altogether.
    confined = any(rule[side][key] for side in ("source", "destination") for key in ("nets", "notNets"))
    if (confined or rule["ipVersion"]) and ":" in flow.source:
        return False
    for key, wanted in (("icmp", True), ("notICMP", False)):
        fields = rule[key]
        if fields:
            same = fields["type"] == flow.icmp_type and fields.get("code", flow.icmp_code) == flow.icmp_code
            if same is not wanted:
                return False
    ends = (("source", flow.source, flow.source_port), ("destination", flow.destination, flow.port))
    return all(
        entity_holds(rule[side], namespace, address, port, flow.protocol) for side, address, port in ends
    )


@settings(max_examples=100, deadline=None)
@given(RULES, st.sampled_from(["", "shop"]), st.sampled_from(list(Direction)))
def test_a_rule_matches_what_its_fields_say(
    rule: dict[str, Any], namespace: str, direction: Direction
) -> None:
    """Whatever its fields, a rule matches the packets of both readings, in either direction."""
    document = {
        "apiVersion": V3,
        "kind": "NetworkPolicy" if namespace else "GlobalNetworkPolicy",
        "metadata": {"name": "p", **({"namespace": namespace} if namespace else {})},
        "spec": {"types": [direction.capitalize()], direction.value: [rule]},
    }
    engine = Engine(read([("rule.json", json.dumps(document))]).policy_set, WORLD)
    subject = Endpoint(name="subject", labels={NAMESPACE_KEY: "shop"})

    wrong = [
        flow
        for flow in FLOWS
        if (engine.judge(subject, direction, flow).rule is not None) is not rule_holds(rule, namespace, flow)
    ]

    assert wrong == []


def test_the_generated_packets_meet_every_field() -> None:
    """Each kind of field that the rules are made of parts these packets: some match it and some don't."""
    nothing = dict.fromkeys(("protocol", "notProtocol", "ipVersion", "icmp", "notICMP"))
    keys = (
        "nets",
        "notNets",
        "selector",
        "notSelector",
        "namespaceSelector",
        "serviceAccounts",
        "ports",
        "notPorts",
    )
    empty: dict[str, Any] = dict.fromkeys(keys)
    values: dict[str, list[Any]] = {
        "nets": [[net] for net in NETS],
        "notNets": [[net] for net in NETS],
        "selector": list(SELECTORS),
        "notSelector": list(SELECTORS),
        "namespaceSelector": list(NAMESPACE_SELECTORS),
        "serviceAccounts": [{"selector": text} for text in ACCOUNT_SELECTORS],
        "ports": [["sql"], ["http"], ["5000:6000"]],
        "notPorts": [["sql"], ["http"], ["5000:6000"]],
    }
    whole = [
        (side, key, value)
        for side in ("source", "destination")
        for key, choices in values.items()
        for value in choices
        for rule in [{**nothing, "source": empty, "destination": empty, side: {**empty, key: value}}]
        if len({rule_holds(rule, "", flow) for flow in FLOWS}) == 1
    ]

    assert whole == []
