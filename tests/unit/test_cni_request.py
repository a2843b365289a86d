"""The CNI call: environment, stdin, versions. Numbers in names are cases of the black-box list."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from portwright.cni.errors import CniError
from portwright.cni.request import COMMANDS, CniRequest, from_record, parse, parse_args
from portwright.cni.version import SUPPORTED

BASE = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "box-1",
    "CNI_NETNS": "/run/netns/box",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin:/usr/lib/cni",
}
CONF: dict[str, object] = {"cniVersion": "1.1.0", "name": "net", "type": "portwright"}


def call(conf: object = None, **env: str | None) -> CniRequest:
    """Parse BASE with ``env`` over it (None removes) and CONF with ``conf`` over it (bytes replace it)."""
    full = {**BASE, **env}
    if isinstance(conf, bytes):
        stdin = conf
    else:
        stdin = json.dumps({**CONF, **(conf if isinstance(conf, dict) else {})}).encode()
    return parse({key: value for key, value in full.items() if value is not None}, stdin)


def refused(conf: object = None, **env: str | None) -> CniError:
    with pytest.raises(CniError) as caught:
        call(conf, **env)
    return caught.value


def test_add_is_read_whole() -> None:
    """A good ADD gives every part of the call, with netns verbatim and stdin untouched."""
    got = call(CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAME=web", TRACEPARENT="00-ab-cd-01", HOME="/root")

    assert (got.command, got.container_id, got.netns, got.ifname) == (
        "ADD",
        "box-1",
        "/run/netns/box",
        "eth0",
    )
    assert got.path == ("/opt/cni/bin", "/usr/lib/cni")
    assert got.args == {"IgnoreUnknown": "1", "K8S_POD_NAME": "web"}
    assert got.config.name == got.config.network == "net"
    assert json.loads(got.raw_stdin) == CONF
    assert got.trace == {"TRACEPARENT": "00-ab-cd-01"}
    assert "HOME" not in got.env
    assert got.env["CNI_IFNAME"] == "eth0"
    assert got.owner().key() == "cni/net/box-1/eth0"


def test_04_unknown_command() -> None:
    """Case 4: an unknown verb is code 4 with skel's sentence."""
    error = refused(CNI_COMMAND="FOO")

    assert (error.number, error.msg) == (4, "unknown CNI_COMMAND: FOO")


@pytest.mark.parametrize(
    ("command", "missing", "named"),
    [
        ("ADD", ["CNI_NETNS", "CNI_IFNAME"], "CNI_NETNS,CNI_IFNAME"),
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"], "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME"),
        ("CHECK", ["CNI_NETNS"], "CNI_NETNS"),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"], "CNI_CONTAINERID,CNI_IFNAME"),
        ("DEL", ["CNI_IFNAME"], "CNI_IFNAME"),
        ("", ["CNI_COMMAND"], "CNI_COMMAND"),
    ],
)
@pytest.mark.parametrize("empty", [None, ""])
def test_05_missing_variables_are_named_together(
    command: str, missing: list[str], named: str, empty: str | None
) -> None:
    """Case 5: every missing variable is in one code-4 message; empty counts as missing."""
    error = refused(**{"CNI_COMMAND": command, **dict.fromkeys(missing, empty)})

    assert (error.number, error.msg) == (4, f"required env variables [{named}] missing")


def test_path_is_not_required() -> None:
    """Trap 7: an absent CNI_PATH is tolerated."""
    assert call(CNI_PATH=None).path == ()


@pytest.mark.parametrize("bad", ["%%%", "-a", ".a", "a/b", "a b", "é", "a\n"])
def test_06_container_id_characters(bad: str) -> None:
    """Case 6: a container id outside the grammar is code 4."""
    error = refused(CNI_CONTAINERID=bad)

    assert error.number == 4
    assert error.msg == "invalid characters in containerID"


@pytest.mark.parametrize(
    "bad", ["a" * 16, ".", "..", "a/b", "a:b", "a b", "a\tb", "a\n", "a\u00a0b", "é" * 8, "a\x01"]
)
def test_07_interface_name(bad: str) -> None:
    """Case 7: names that the kernel or the specification refuse are code 4."""
    error = refused(CNI_IFNAME=bad)

    assert error.number == 4
    assert error.msg.startswith("interface name ")


def test_07_fifteen_characters_are_fine() -> None:
    """Case 7: the longest legal interface name passes."""
    assert call(CNI_IFNAME="a" * 15).ifname == "a" * 15


@pytest.mark.parametrize(
    ("conf", "code", "text"),
    [
        ({"name": ""}, 7, "missing network name"),
        ({"name": None}, 7, "missing network name"),
        ({"name": "-bad"}, 7, "invalid characters found in network name"),
        ({"name": "a/b"}, 7, "invalid characters found in network name"),
        ({"name": 5}, 6, "name: must be a string"),
        ({"cniVersion": 5}, 6, "cniVersion: must be a string"),
        (b"{", 6, "error unmarshal network config"),
        (b"", 6, "error unmarshal network config"),
        (b"[]", 6, "not a JSON object"),
        (b"\xff\xfe", 6, "utf-8"),
        (b'{"name":"a","name":"b"}', 6, "'name' is given twice"),
        (b'{"name":"a","Name":"b"}', 6, "given 2 times"),
        (b'{"name":"a","x":NaN}', 6, "NaN is not JSON"),
        (b'{"name":"a","x":"\\ud800"}', 6, "surrogates"),
        (b'{"name":"a","x":' + b"[" * 65 + b"]" * 65 + b"}", 6, "nested deeper than 64"),
        (b'{"name":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 6, "nested deeper than 64"),
        (b'{"name":"a","x":' + b"9" * 5000 + b"}", 6, "error unmarshal"),
        (b'{"name":"' + b"a" * (1 << 20) + b'"}', 6, "bytes are more than"),
    ],
)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_08_09_broken_stdin(conf: object, code: int, text: str, command: str) -> None:
    """Cases 8 and 9: a bad name is code 7, what is no proper JSON object code 6, for every verb."""
    error = refused(conf, CNI_COMMAND=command)

    assert error.number == code
    assert text in str(error)


def test_10_unknown_version() -> None:
    """Case 10: an unknown version is code 1 and the details name both sides, in skel's words."""
    error = refused({"cniVersion": "1000.0.0"})

    assert (error.number, error.msg) == (1, "incompatible CNI versions")
    assert error.details == (
        'config is "1000.0.0", plugin supports ["0.1.0" "0.2.0" "0.3.0" "0.3.1" "0.4.0" "1.0.0" "1.1.0"]'
    )


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
def test_11_verbs_by_version(command: str, version: str) -> None:
    """Case 11: each verb is refused with code 1 exactly below the version that brought it."""
    floor = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}.get(command, "0.1.0")
    if SUPPORTED.index(version) >= SUPPORTED.index(floor):
        assert call({"cniVersion": version}, CNI_COMMAND=command).config.cni_version == version
    else:
        error = refused({"cniVersion": version}, CNI_COMMAND=command)
        assert (error.number, error.msg) == (1, f"config version does not allow {command}")


def test_missing_version_is_0_1_0() -> None:
    """A configuration without cniVersion is 0.1.0."""
    assert call(b'{"name":"net"}').config.cni_version == "0.1.0"


@pytest.mark.parametrize("netns", [None, ""])
def test_12_del_without_netns(netns: str | None) -> None:
    """Case 12: DEL passes without a namespace, ADD does not."""
    assert call(CNI_COMMAND="DEL", CNI_NETNS=netns).netns == ""
    assert refused(CNI_NETNS=netns).number == 4


@pytest.mark.parametrize("command", ["STATUS", "GC"])
@pytest.mark.parametrize("empty", [None, ""])
def test_13_empty_variables(command: str, empty: str | None) -> None:
    """Case 13, trap 5: STATUS and GC pass with the attachment's variables empty or absent."""
    got = call(CNI_COMMAND=command, CNI_CONTAINERID=empty, CNI_NETNS=empty, CNI_IFNAME=empty)

    assert got.container_id == got.netns == got.ifname == ""


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("TRUE", True), ("0", False), ("", False)]
)
def test_15_netns_override(text: str, value: bool) -> None:
    """Case 15: CNI_NETNS_OVERRIDE is read as skel reads it."""
    assert call(CNI_NETNS_OVERRIDE=text).netns_override is value


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("", {}),
        ("IgnoreUnknown=1;FOO=BAR", {"IgnoreUnknown": "1"}),
        ("IgnoreUnknown=TRUE;FOO=BAR;IP=10.0.0.1", {"IgnoreUnknown": "TRUE", "IP": "10.0.0.1"}),
        ("K8S_POD_NAME=a;K8S_POD_NAMESPACE=", {"K8S_POD_NAME": "a", "K8S_POD_NAMESPACE": ""}),
        ("IgnoreUnknown=0", {"IgnoreUnknown": "0"}),
    ],
)
def test_18_args(args: str, expected: dict[str, str]) -> None:
    """Case 18: legal CNI_ARGS, unknown keys dropped."""
    assert parse_args(args) == expected


@pytest.mark.parametrize(
    "args",
    ["FOO=BAR", "IP=1=2", "IgnoreUnknown=1;IP=1=2", "IgnoreUnknown=1;", ";", "x", "IgnoreUnknown=maybe"],
)
def test_18_args_refused(args: str) -> None:
    """Case 18, trap 10: unknown keys, two '=', empty pairs and a bad boolean are code 4."""
    assert refused(CNI_ARGS=args).number == 4


def test_19_unknown_keys_are_ignored() -> None:
    """Case 19, trap 6: unknown keys, cni.dev/*, capabilities and foreign args do no harm."""
    got = call(
        {
            "cni.dev/x": {"a": 1},
            "capabilities": {"portMappings": True},
            "args": {"cni": {"sysctl": {"a": "b"}}, "other": 1},
            "isGateway": True,
            "runtimeConfig": {"new": 1},
        }
    )

    assert got.config == call().config


HOSTILE_CONF = {
    "mtu": "big",
    "ipMasq": "yes",
    "model": "warp",
    "routes": 5,
    "dns": [],
    "prevResult": {"cniVersion": "9", "ips": 7},
    "runtimeConfig": {"portMappings": [{"hostPort": 0}]},
    "args": "none",
}


def test_28_del_reads_no_more_than_it_needs() -> None:
    """Case 28: a configuration that ADD refuses, bad CNI_ARGS included, can't stop DEL."""
    got = call(HOSTILE_CONF, CNI_COMMAND="DEL", CNI_ARGS="FOO=BAR;;")

    assert got.config.name == "net"
    assert refused(HOSTILE_CONF).number in {2, 7}


def test_del_keeps_the_foreign_ipam_type() -> None:
    """DEL still knows which IPAM plugin to call, and nothing else of ipam."""
    got = call({"ipam": {"Type": "host-local", "ranges": 5}}, CNI_COMMAND="DEL")

    assert got.config.ipam is not None
    assert got.config.ipam.foreign
    assert got.config.ipam.type == "host-local"


def test_a_recorded_call_can_be_undone() -> None:
    """What ADD recorded gives, through JSON and without the caller, the DEL of the same attachment."""
    added = call({"ipam": {"type": "host-local"}, "unknown": "\u00e9"})
    undone = from_record(json.loads(json.dumps(added.to_record())))

    assert undone.command == "DEL"
    assert (undone.owner(), undone.path, undone.raw_stdin) == (added.owner(), added.path, added.raw_stdin)
    assert undone.env == {**added.env, "CNI_COMMAND": "DEL"}
    assert undone.config.ipam == added.config.ipam


@pytest.mark.parametrize("record", [{}, {"env": {}}, {"env": 1, "stdin": ""}, {"env": {}, "stdin": "{"}])
def test_a_damaged_record_is_an_error(record: dict[str, object]) -> None:
    """A record of another shape is a CniError."""
    with pytest.raises(CniError):
        from_record(record)


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ({}, None),
        ({"cni.dev/valid-attachments": None}, None),
        ({"cni.dev/valid-attachments": []}, []),
        ({"cni.dev/attachments": []}, []),
        ({"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]}, [("a", "eth0")]),
        ({"CNI.dev/Valid-Attachments": [{"containerid": "a", "IfName": "eth0"}]}, [("a", "eth0")]),
        (
            {
                "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}],
                "cni.dev/attachments": [
                    {"containerID": "a", "ifname": "eth0"},
                    {"containerID": "b", "ifname": "eth1"},
                ],
            },
            [("a", "eth0"), ("b", "eth1")],
        ),
    ],
)
def test_gc_list(conf: dict[str, object], expected: list[tuple[str, str]] | None) -> None:
    """Trap 9: absent and null differ from empty; both keys are read, their union counts."""
    got = call(conf, CNI_COMMAND="GC").config.valid_attachments

    assert (None if got is None else [(one.container_id, one.ifname) for one in got]) == expected


@pytest.mark.parametrize("value", ["x", {}, [1], [{"containerID": "a"}], [{"containerID": 1, "ifname": "e"}]])
def test_gc_list_is_never_guessed(value: object) -> None:
    """A malformed list or entry is an error: skipping it would free a living pod's port."""
    assert refused({"cni.dev/valid-attachments": value}, CNI_COMMAND="GC").number == 7
    assert call({"cni.dev/valid-attachments": value}, CNI_COMMAND="DEL").config.valid_attachments is None


def test_version_needs_nothing() -> None:
    """Trap 4: VERSION is judged without stdin and with dummy variables."""
    assert (
        parse({"CNI_COMMAND": "VERSION", "CNI_IFNAME": "dummy", "CNI_CONTAINERID": ""}, b"").command
        == "VERSION"
    )


def test_bad_bytes_in_the_environment() -> None:
    """A variable that is not UTF-8 is code 4, not a crash while writing the answer."""
    assert refused(CNI_NETNS="/run/\udcff").number == 4


KEYS = st.sampled_from(
    [
        *(
            "cniVersion",
            "name",
            "type",
            "mtu",
            "ipam",
            "routes",
            "dns",
            "args",
            "runtimeConfig",
            "prevResult",
        ),
        *(
            "portMappings",
            "bandwidth",
            "ips",
            "ipRanges",
            "mac",
            "cni",
            "labels",
            "subnet",
            "ranges",
            "dst",
            "gw",
        ),
        *(
            "hostPort",
            "containerPort",
            "hostIP",
            "protocol",
            "cni.dev/valid-attachments",
            "containerID",
            "ifname",
        ),
        *(
            "interfaces",
            "address",
            "interface",
            "ip4",
            "ip",
            "nameservers",
            "reserved",
            "model",
            "network",
            "NAME",
        ),
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(
        [*SUPPORTED, "net", "10.0.0.0/24", "fd00::1/64", "10.0.0.1", "tcp", "portwright", "a" * 300]
    )
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
ENV = st.dictionaries(
    st.sampled_from([*BASE, "CNI_ARGS", "CNI_NETNS_OVERRIDE"]),
    st.text(max_size=20) | st.sampled_from([*COMMANDS, "eth0", "IP=10.0.0.1", "IgnoreUnknown=1;MAC=x"]),
)


@settings(max_examples=400, deadline=None)
@given(
    env=ENV,
    conf=st.dictionaries(KEYS, VALUES, max_size=8),
    raw=st.none() | st.binary(max_size=40),
    command=st.sampled_from(COMMANDS),
    version=st.sampled_from(SUPPORTED),
)
@example(env={}, conf={"reach": ["\ud800"]}, raw=None, command="ADD", version="1.1.0")
def test_only_cni_errors_come_out(
    env: dict[str, str], conf: dict[str, object], raw: bytes | None, command: str, version: str
) -> None:
    """Whatever the input, parse() returns or raises CniError, and the error can be printed."""
    base = {"cniVersion": version, "name": "net"}
    stdin = raw if raw is not None else json.dumps({**base, **conf}).encode()
    failed = None
    try:
        parse({**BASE, "CNI_COMMAND": command, **env}, stdin)
    except CniError as error:
        failed = error
    if failed is not None:
        shown = json.loads(failed.to_json(version))
        assert shown["code"] == failed.number > 0
        assert shown["msg"]
