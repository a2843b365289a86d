"""Names of rules against names that are asked, and the addresses that no name opens."""

from __future__ import annotations

import pytest

from portwright.domains.names import asked, covers, foreign, labels_of, may_open, naming
from portwright.policy.manifests.read import read
from portwright.policy.rules import Endpoint
from tests.netns.dns_lab import NAMES


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("example.com", b"example.com", True),
        ("example.com", b"EXAMPLE.Com", True),
        ("example.com", b"www.example.com", False),
        ("example.com", b"com", False),
        ("*.example.com", b"www.example.com", True),
        ("*.example.com", b"a.b.c.example.com", True),
        ("*.example.com", b"example.com", False),
        ("*.example.com", b"wwwexample.com", False),
        ("*.example.com", b"example.com.evil", False),
    ],
)
def test_a_pattern_means_what_is_below_it(pattern: str, name: bytes, meant: bool) -> None:
    """A name means itself in any case; ``*.`` means one label or more, and never the apex."""
    assert covers(pattern, tuple(name.lower().split(b"."))) == meant


def test_a_dot_inside_a_label_ends_no_label() -> None:
    r"""``evil\.example.com``, two labels, is not below example.com, though its text ends like it."""
    assert not covers("*.example.com", (b"evil.example", b"com"))
    assert not covers("example.com", (b"example.com",))
    assert labels_of("Example.COM.") == (b"example", b"com")


@pytest.mark.parametrize(
    ("address", "opens"),
    [
        *(("198.51.100.1", True), ("10.1.2.3", True), ("2001:db8::1", True), ("fd00::1", True)),
        *(("0.0.0.0", False), ("127.0.0.1", False), ("127.8.9.1", False), ("169.254.169.254", False)),
        *(("224.0.0.1", False), ("255.255.255.255", False), ("::", False), ("::1", False)),
        *(("fe80::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::127.0.0.1", False)),
        ("64:ff9b::c633:6401", True),
        *(("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("64:ff9b:1::a9fe:a9fe", False)),
        *(("2002:7f00:1::1", False), ("2002:c633:6401::1", True)),
    ],
)
def test_some_addresses_no_name_opens(address: str, opens: bool) -> None:
    """Loopback, link-local, multicast, unspecified and mapped addresses stay shut, whatever is said; so do
    those that translate to one of them."""
    assert may_open(address) == opens


def test_only_whom_a_policy_selects_asks_for_its_names() -> None:
    """A port's names are those of the egress rules that select it, each once; one without has none."""
    policies = naming(read([("names.yaml", NAMES)]).policy_set)
    labels = {"app": "client", "projectcalico.org/orchestrator": "k8s"}

    assert len(policies) == 1
    assert asked(policies, Endpoint(name="a", labels=labels)) == ("www.shop.example", "*.cdn.example")
    assert asked(policies, Endpoint(name="b", labels=labels | {"app": "web"})) == ()
    assert asked(policies, Endpoint(name="c", labels=labels, host_network=True)) == ()


def test_calicos_policies_ask_too() -> None:
    """Domains of a rule's destination; not those of a staged policy, which nobody feels."""
    text = (
        "apiVersion: projectcalico.org/v3\nkind: KINDGlobalNetworkPolicy\nmetadata: {name: p}\nspec:\n"
        "  selector: app == 'client'\n"
        "  egress: [{action: Allow, destination: {domains: [a.example, '*.b.example']}}]\n"
    )
    policies = naming(read([("p.yaml", text.replace("KIND", ""))]).policy_set)

    assert asked(policies, Endpoint(name="a", labels={"app": "client"})) == ("a.example", "*.b.example")
    assert naming(read([("p.yaml", text.replace("KIND", "Staged"))]).policy_set) == ()


def test_an_address_of_an_endpoint_is_no_names() -> None:
    """A port, pod or node is opened by its labels, and by no name that stands for its address."""
    endpoint = Endpoint(name="a", addresses=("10.0.0.1", "fd00::1"))
    domains = {"x.example": ("10.0.0.1", "10.0.0.2"), "y.example": ("fd00::1",)}

    assert foreign(domains, [endpoint]) == {"x.example": ("10.0.0.2",), "y.example": ()}
