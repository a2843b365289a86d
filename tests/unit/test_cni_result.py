"""Results in every version, chaining, and the error object."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.cni import wire
from portwright.cni.errors import CniCode, CniError, map_error
from portwright.cni.result import Result, ResultInterface, ResultIp, from_json, merge_with_prev
from portwright.cni.version import SUPPORTED
from portwright.model import errors
from portwright.model.network import Dns, Route

FULL = Result(
    interfaces=(
        ResultInterface(name="pw01234567", mac="ee:ee:ee:ee:ee:ee", mtu=1500),
        ResultInterface(
            name="eth0",
            mac="02:00:00:00:00:01",
            mtu=1500,
            sandbox="/n",
            socket_path="/s",
            pci_id="0000:00:01.0",
        ),
    ),
    ips=(
        ResultIp(address="10.1.2.3/24", gateway="10.1.2.1", interface=1),
        ResultIp(address="10.1.2.4/24", interface=1),
        ResultIp(address="2001:db8::3/64", gateway="2001:db8::1", interface=1),
    ),
    routes=(
        Route(dst="0.0.0.0/0", gw="10.1.2.1", mtu=1400, advmss=1360, priority=5, table=100, scope=0),
        Route(dst="::/0"),
    ),
    dns=Dns(nameservers=("9.9.9.9",), search=("a",)),
)


def shape(result: Result, version: str) -> dict[str, object]:
    got = json.loads(result.to_json(version))
    assert isinstance(got, dict)
    return got


def test_16_newest_shape() -> None:
    """Case 16: 1.1.0 has every field, and nothing that is empty."""
    assert shape(FULL, "1.1.0") == {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "pw01234567", "mac": "ee:ee:ee:ee:ee:ee", "mtu": 1500},
            {
                "name": "eth0",
                "mac": "02:00:00:00:00:01",
                "mtu": 1500,
                "sandbox": "/n",
                "socketPath": "/s",
                "pciID": "0000:00:01.0",
            },
        ],
        "ips": [
            {"address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 1},
            {"address": "10.1.2.4/24", "interface": 1},
            {"address": "2001:db8::3/64", "gateway": "2001:db8::1", "interface": 1},
        ],
        "routes": [
            {
                "dst": "0.0.0.0/0",
                "gw": "10.1.2.1",
                "mtu": 1400,
                "advmss": 1360,
                "priority": 5,
                "table": 100,
                "scope": 0,
            },
            {"dst": "::/0"},
        ],
        "dns": {"nameservers": ["9.9.9.9"], "search": ["a"]},
    }


def test_16_1_0_0_has_no_1_1_fields() -> None:
    """Case 16: 1.0.0 is 1.1.0 less mtu, socketPath, pciID and the routes' new fields."""
    got = shape(FULL, "1.0.0")

    assert got["interfaces"] == [
        {"name": "pw01234567", "mac": "ee:ee:ee:ee:ee:ee"},
        {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/n"},
    ]
    assert got["routes"] == [{"dst": "0.0.0.0/0", "gw": "10.1.2.1"}, {"dst": "::/0"}]
    assert "version" not in str(got["ips"])


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_16_ips_have_a_version_below_1_0_0(version: str) -> None:
    """Case 16: 0.3.0 to 0.4.0 say the family of each address."""
    got = shape(FULL, version)
    ips = got["ips"]

    assert isinstance(ips, list)
    assert [one["version"] for one in ips] == ["4", "4", "6"]
    assert got["interfaces"] == shape(FULL, "1.0.0")["interfaces"]


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_16_families_below_0_3_0(version: str) -> None:
    """Case 16: below 0.3.0 each family has its first address with its routes."""
    assert shape(FULL, version) == {
        "cniVersion": version,
        "ip4": {
            "ip": "10.1.2.3/24",
            "gateway": "10.1.2.1",
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1"}],
        },
        "ip6": {"ip": "2001:db8::3/64", "gateway": "2001:db8::1", "routes": [{"dst": "::/0"}]},
        "dns": {"nameservers": ["9.9.9.9"], "search": ["a"]},
    }


def test_37_layer_2_only() -> None:
    """Case 37: a result without addresses is fine from 0.3.0 and cannot be converted below."""
    bare = Result(interfaces=FULL.interfaces)

    assert set(shape(bare, "0.3.0")) == {"cniVersion", "interfaces"}
    with pytest.raises(CniError, match="cannot convert: no valid IP addresses") as caught:
        bare.to_json("0.2.0")
    assert caught.value.number == 1


def test_unknown_version_is_refused() -> None:
    """No shape is guessed for a version that is not known."""
    with pytest.raises(CniError):
        FULL.to_json("9.9.9")


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_is_written_can_be_read(version: str) -> None:
    """Reading and writing again in the same version changes nothing."""
    once = FULL.to_json(version)

    assert from_json(once, default_version="0.1.0").to_json(version) == once


def test_17_version_defaults_to_the_configs() -> None:
    """Trap 17: a result without cniVersion has the configuration's shape."""
    old = b'{"ip4":{"ip":"10.0.0.2/24","gateway":"10.0.0.1"}}'

    assert from_json(old, default_version="0.2.0").ips == (
        ResultIp(address="10.0.0.2/24", gateway="10.0.0.1"),
    )
    assert from_json(old, default_version="1.0.0").ips == ()


def test_51_chaining_keeps_positions() -> None:
    """Case 51, trap 19: nothing to add gives prevResult back, and what is added never shifts it."""
    own = Result(
        interfaces=(ResultInterface(name="net1"),), ips=(ResultIp(address="10.9.0.2/24", interface=0),)
    )
    merged = merge_with_prev(FULL, own)

    assert merge_with_prev(FULL, Result()) == FULL
    assert merge_with_prev(None, own) == own
    assert merged.interfaces[:2] == FULL.interfaces
    assert merged.ips[:3] == FULL.ips
    assert merged.ips[3].interface == 2
    assert merged.dns == FULL.dns


def test_12_odd_indices_survive() -> None:
    """Trap 12: an index of -1 or none, and a sandbox that is no path, come out as they went in."""
    text = json.dumps(
        {
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "t", "sandbox": "vm-7"}],
            "ips": [{"address": "10.0.0.1/8", "interface": -1}, {"address": "10.0.0.2/8"}],
        }
    ).encode()
    own = Result(ips=(ResultIp(address="10.0.0.3/8", interface=-1), ResultIp(address="10.0.0.4/8")))
    merged = merge_with_prev(from_json(text, default_version="1.0.0"), own)

    assert [one.interface for one in merged.ips] == [-1, None, -1, None]
    assert merged.interfaces[0].sandbox == "vm-7"


def test_empty_prev_result_values() -> None:
    """Nulls and empty strings in another plugin's result count as absent."""
    text = json.dumps(
        {
            "cniVersion": "1.1.0",
            "interfaces": None,
            "ips": [{"address": "10.0.0.1/8", "gateway": ""}],
            "routes": [{"dst": "10.0.0.0/8", "gw": None}],
            "dns": {},
        }
    ).encode()

    assert from_json(text, default_version="") == Result(
        ips=(ResultIp(address="10.0.0.1/8"),), routes=(Route(dst="10.0.0.0/8"),)
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidInput("ipam.subnet", "x", "bad"), 7),
        (errors.InvalidInput("CNI_IFNAME", "x", "exists"), 4),
        (errors.InvalidInput("netns", "/x", "is no namespace"), 8),
        (errors.NotSupported("macvtap", "mirror", "use tcfilter"), 2),
        (errors.DaemonUnavailable("/s", "gone"), 11),
        (errors.NotFound("network", "n"), 7),
        (errors.NotFound("netns", "n"), 8),
        (errors.NotFound("port", "n"), 102),
        (errors.Conflict("address", "a", "taken"), 101),
        (errors.PoolExhausted("n", "10.0.0.0/30", 2, 0), 103),
        (errors.PortStateError("p", "creating", "attached"), 104),
        (errors.KernelTooOld("tcx", "6.6", "6.1"), 105),
        (errors.VerifierRejected("p", "s", "log"), 106),
        (errors.NetlinkFailed(17, "RTM_NEWLINK"), 107),
        (errors.KernelFailed(1, "setns"), 108),
        (errors.InternalError("x"), 199),
        (errors.PortwrightError("x"), 100),
        (CniError(42, "as it is"), 42),
        (ValueError("bug"), 199),
    ],
)
def test_error_codes(error: Exception, code: int) -> None:
    """Every error of ours has its documented code, and its sentence reaches the runtime."""
    got = map_error(error)

    assert got.number == code
    assert got.msg in str(error) or "internal error" in got.msg


def test_error_object() -> None:
    """Trap 3: the object has version, code, msg; details only if there are any; texts are bounded."""
    assert json.loads(CniError(7, "no", "d").to_json("0.4.0")) == {
        "cniVersion": "0.4.0",
        "code": 7,
        "msg": "no",
        "details": "d",
    }
    assert json.loads(CniError(CniCode.DECODE, "no").to_json()) == {
        "cniVersion": "1.1.0",
        "code": 6,
        "msg": "no",
    }
    assert len(CniError(7, "x" * 100_000).to_json()) < 5000
    assert json.loads(CniError(7, "\udcff").to_json())["msg"] == "?"


@given(
    st.dictionaries(
        st.text("ABC_", min_size=1),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    ),
    st.binary(),
)
def test_request_payload_round_trip(env: dict[str, str], stdin: bytes) -> None:
    """What the shim's shape carries comes out as it went in."""
    assert wire.decode_request(wire.encode_request(env, stdin)) == (env, stdin)


@given(st.binary(max_size=64))
def test_hostile_payloads(payload: bytes) -> None:
    """Any bytes are a request or a CniError."""
    try:
        env, stdin = wire.decode_request(payload)
    except CniError:
        return
    assert wire.encode_request(env, stdin) == payload


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b"{", ""),
        (b"[]", ""),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
        (b'{"cniVersion":"9"}', ""),
        (b'{"CNIVersion":"0.4.0"}', "0.4.0"),
        (b'{"cniVersion":4}', ""),
    ],
)
def test_version_hint(stdin: bytes, version: str) -> None:
    """The version for an error's object is read from any stdin without raising."""
    assert wire.version_hint(stdin) == version


def test_error_reply() -> None:
    """An error becomes exit status 1 with the object on stdout."""
    status, stdout, stderr = wire.decode_reply(wire.error_reply(ValueError("x"), "1.0.0"))

    assert (status, stderr) == (1, b"")
    assert json.loads(stdout)["code"] == 199
