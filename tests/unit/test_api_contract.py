from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest

import portwright
from portwright.api import calls, methods
from portwright.api.errors import WireError, error_from_wire, error_to_wire
from portwright.api.registry import CONTRACT, Registry, convert_params, describe
from portwright.api.request import Peer, Request
from portwright.model import errors
from portwright.model.errors import InvalidInput, NotFound, PortwrightError
from tests.fake_daemon import FakeDaemon

NAMES = [
    "doctor",
    "drops",
    "drops.follow",
    "introspect",
    "network.create",
    "network.delete",
    "network.list",
    "network.show",
    "node.status",
    "node.stop",
    "policy.apply",
    "policy.delete",
    "policy.list",
    "policy.staged",
    "port.create",
    "port.delete",
    "port.link",
    "port.list",
    "port.migrate",
    "port.plug",
    "port.set",
    "port.show",
    "port.unplug",
    "stats",
    "why",
]
WANTED = {"network": "blue", "netns": "/run/netns/s"}


def ask(method: str, params: dict[str, object] | None = None, fds: list[int] | None = None) -> Any:
    """Dispatch one request to a fake daemon's registry."""
    request = Request("J", Peer(1, 0, 0), id=1, method=method, params=params or {}, fds=fds or [])
    return asyncio.run(Registry(FakeDaemon(), version="9").dispatch(request))


def test_the_contract_has_these_methods() -> None:
    """Names are stable from the first release."""
    assert sorted(CONTRACT) == NAMES


@pytest.mark.parametrize("client", ["Client", "AsyncClient"])
def test_both_clients_have_every_method(client: str) -> None:
    """Each method of the contract is a method of both clients, documented, with the call's parameters."""
    for name in NAMES:
        attribute = getattr(getattr(portwright, client), name.replace(".", "_"))
        assert attribute.__doc__
        assert inspect.signature(attribute.__wrapped__) == inspect.signature(
            getattr(calls, name.replace(".", "_"))
        )


def test_the_self_description_is_json_and_complete() -> None:
    """Introspect gives name, doc, schemas and descriptors of each method."""
    found = json.loads(json.dumps(ask("introspect")))
    assert found == json.loads(json.dumps(describe("9")))
    assert [entry["name"] for entry in found["methods"]] == NAMES
    assert all(entry["doc"] for entry in found["methods"])
    (create,) = [entry for entry in found["methods"] if entry["name"] == "port.create"]
    assert create["fds"] == ["the sandbox's network namespace"]
    assert create["params"]["$defs"]["PortCreateParams"]["required"] == ["network", "netns"]


@pytest.mark.parametrize(
    ("params", "field", "value"),
    [
        ({}, "network", None),
        ({**WANTED, "netns": 3}, "netns", 3),
        ({**WANTED, "mtu": "1500"}, "mtu", "1500"),
        ({**WANTED, "mtu": 67}, "mtu", 67),
        ({**WANTED, "ifname": "a" * 16}, "ifname", "a" * 16),
        ({**WANTED, "colour": 1}, "colour", 1),
        ({**WANTED, "limits": {"egress_rate": True}}, "limits.egress_rate", True),
        ({**WANTED, "limits": {"egress_rat": 1}}, "limits.egress_rat", 1),
        ({**WANTED, "port_mappings": [{"host_port": 1}]}, "port_mappings[0].container_port", None),
        (
            {
                **WANTED,
                "port_mappings": [
                    {"host_port": 1, "container_port": 1},
                    {"host_port": 1, "container_port": 2, "x": 3},
                ],
            },
            "port_mappings[1].x",
            3,
        ),
    ],
)
def test_wrong_parameters_name_the_field_and_the_value(
    params: dict[str, object], field: str, value: object
) -> None:
    """Types are strict, nothing unknown is ignored at any depth, and the error says where."""
    with pytest.raises(InvalidInput) as caught:
        convert_params(methods.PortCreateParams, params)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_a_missing_descriptor_and_an_unknown_method_are_refused() -> None:
    """Before a handler runs."""
    with pytest.raises(InvalidInput, match=r"port\.create needs the sandbox's network namespace"):
        ask("port.create", dict(WANTED))
    with pytest.raises(NotFound, match=r"method 'port\.teleport'"):
        ask("port.teleport")


def test_missing_handlers_are_all_named_at_once() -> None:
    """A daemon that doesn't serve the whole contract does not start."""
    with pytest.raises(TypeError, match=r"object has no handler for doctor, node\.status, .*policy\.staged"):
        Registry(object(), version="9")


def leaves() -> list[PortwrightError]:
    """Return one error of each leaf."""
    return [
        errors.InvalidInput("a.b", 3, "no"),
        errors.NotFound("port", "x"),
        errors.Conflict("port", "x", "busy"),
        errors.NotSupported("veth", "vlan", "use tap"),
        errors.KernelTooOld("tcx", "6.6", "6.1"),
        errors.VerifierRejected("p", "line", "log"),
        errors.PortStateError("p", "attached", "detached"),
        errors.NetlinkFailed(17, "add link", "exists"),
        errors.KernelFailed(1, "setns"),
        errors.PoolExhausted("blue", "10.0.0.0/30", 1, 1),
        errors.DaemonUnavailable("/s", "gone"),
        errors.InternalError("bug"),
        PortwrightError("plain"),
        portwright.Busy("streams", 4),
        portwright.ProtocolError("bad"),
        portwright.RequestTimeout("stats", 1.0),
        portwright.ConnectionLost("stats", "gone"),
    ]


@pytest.mark.parametrize("error", leaves(), ids=lambda error: type(error).__name__)
def test_an_error_crosses_the_socket_with_class_message_and_facts(error: PortwrightError) -> None:
    """What is caught at the client is what the daemon raised."""
    wire = msgspec.json.decode(msgspec.json.encode(error_to_wire(error)), type=WireError)
    back = error_from_wire(wire)
    assert type(back) is type(error)
    assert (str(back), back.facts(), back.code) == (str(error), error.facts(), error.code)


def test_an_error_of_a_newer_daemon_keeps_its_code() -> None:
    """An unknown code becomes RemoteFailure, with nothing lost."""
    back = error_from_wire(WireError("too-shiny", "is too shiny", {"lustre": 9}))
    assert isinstance(back, portwright.RemoteFailure)
    assert (back.code, str(back), back.facts()) == ("too-shiny", "is too shiny", {"lustre": 9})


def test_importing_portwright_loads_nothing_heavy() -> None:
    """``import portwright`` takes neither msgspec nor asyncio nor typing; names resolve on first use."""
    code = (
        "import sys, portwright; heavy = {'msgspec', 'asyncio', 'typing', 'click'} & set(sys.modules); "
        "assert not heavy, heavy; portwright.Client, portwright.AsyncClient, portwright.NotFound; "
        "assert all(getattr(portwright, n) for n in portwright.__all__)"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    with pytest.raises(AttributeError, match="Nonsense"):
        portwright.Nonsense  # noqa: B018
