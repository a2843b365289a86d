"""Cases 1 to 19: the protocol itself, before any interface exists."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest

from .kit.host import Host
from .kit.lab import Lab, ips_of
from .kit.observe import bare, bare_addresses, links
from .kit.plugin import CniFailed, Json, Outcome, invoke
from .kit.runtime import version_key
from .profile import ALL_VERSIONS, Profile

BAD_ENVIRONMENT, DECODE, INVALID_CONFIG, INCOMPATIBLE = 4, 6, 7, 1


def _plain(lab: Lab, **more: object) -> Json:
    return lab.config_of(lab.network()) | more


def _add(lab: Lab, config: Json | bytes, **env: str | None) -> Outcome:
    sandbox = lab.sandbox()
    whole: dict[str, str | None] = {"command": "ADD", "containerid": sandbox.id, "netns": sandbox.path}
    return lab.raw(config, **(whole | {"ifname": "eth0"} | env))


def _versions(outcome: Outcome) -> set[str]:
    assert outcome.exit_code == 0, outcome
    value = outcome.json()
    assert value["cniVersion"]
    return set(value["supportedVersions"])


def test_case_01_version_needs_nothing_but_the_command(lab: Lab) -> None:
    """VERSION with an otherwise empty environment and no stdin names every version of the specification."""
    binary = lab.runtime.find(lab.profile.type)
    outcome = invoke(binary, {"CNI_COMMAND": "VERSION"}, b"", lab.host.ns)
    assert _versions(outcome) >= set(lab.profile.versions)


def test_case_01_every_version_of_the_specification(lab: Lab) -> None:
    """A plugin of today supports 0.1.0 to 1.1.0."""
    assert _versions(lab.raw(b"", command="VERSION")) >= set(ALL_VERSIONS)


def test_case_02_version_as_libcni_sends_it(lab: Lab) -> None:
    """Dummy variables and a config on stdin change nothing."""
    dummy = {"netns": "dummy", "ifname": "dummy", "path": "dummy", "containerid": ""}
    outcome = lab.raw({"cniVersion": lab.profile.version}, command="VERSION", **dummy)
    assert _versions(outcome) >= set(lab.profile.versions)
    assert outcome.json()["cniVersion"] == lab.profile.version


def test_case_02_version_echoes_the_caller(lab: Lab) -> None:
    """The answer's cniVersion is the one on stdin (SPEC 1.1.0, VERSION)."""
    assert lab.raw({"cniVersion": "0.4.0"}, command="VERSION").json()["cniVersion"] == "0.4.0"


@pytest.mark.parametrize("command", [None, ""])
def test_case_03_about(lab: Lab, command: str | None) -> None:
    """Run by hand, the plugin says on stderr what it is, and succeeds."""
    outcome = lab.raw(b"", command=command)
    assert outcome.exit_code == 0
    assert outcome.stdout == b""
    assert outcome.stderr.strip()


def test_case_04_unknown_command(lab: Lab) -> None:
    """An unknown verb is a wrong environment, and is named."""
    error = _add(lab, _plain(lab), command="FOO").error()
    assert error["code"] == BAD_ENVIRONMENT
    assert "unknown CNI_COMMAND: FOO" in error["msg"]


def test_case_05_all_missing_variables_in_one_error(lab: Lab) -> None:
    """ADD without CNI_NETNS and CNI_IFNAME is refused once, naming both."""
    error = _add(lab, _plain(lab), netns=None, ifname=None).error()
    assert error["code"] == BAD_ENVIRONMENT
    assert "CNI_NETNS" in error["msg"]
    assert "CNI_IFNAME" in error["msg"]


@pytest.mark.parametrize("container_id", ["%%%", "-leading", "a/b", "a b", "../x"])
def test_case_06_container_id(lab: Lab, container_id: str) -> None:
    """A container id outside ``[a-zA-Z0-9][a-zA-Z0-9_.-]*`` is refused."""
    error = _add(lab, _plain(lab), containerid=container_id).error()
    assert error["code"] == BAD_ENVIRONMENT
    assert "invalid characters in containerID" in error["msg"]


@pytest.mark.parametrize("ifname", ["a" * 16, ".", "..", "a/b", "a:b", "a b", "a\tb"])
def test_case_07_bad_ifname(lab: Lab, ifname: str) -> None:
    """What the kernel (or the specification) does not take as a name is refused before anything happens."""
    assert _add(lab, _plain(lab), ifname=ifname).error()["code"] == BAD_ENVIRONMENT


def test_case_07_longest_ifname(lab: Lab) -> None:
    """Fifteen characters are fine."""
    sandbox, network, ifname = lab.sandbox(), lab.network(), "abcdefghijklmno"
    lab.add(network, sandbox, ifname)
    assert ifname in links(sandbox.ns)
    lab.delete(network, sandbox, ifname)


@pytest.mark.parametrize("name", [None, "", "-bad", "a/b", "a b"])
def test_case_08_network_name(lab: Lab, name: str | None) -> None:
    """A network has a name, and a valid one."""
    config = _plain(lab)
    if name is None:
        del config["name"]
    else:
        config["name"] = name
    error = _add(lab, config).error()
    assert error["code"] == INVALID_CONFIG
    if not name:
        assert "missing network name" in error["msg"]


@pytest.mark.parametrize("stdin", [b"{", b"", b"[]", b'"x"', b"\xff\xfe{}", b"{}{}"])
def test_case_09_not_a_configuration(lab: Lab, stdin: bytes) -> None:
    """Stdin that is no JSON object is a decoding failure."""
    assert _add(lab, stdin).error()["code"] == DECODE


def test_case_10_unknown_version(lab: Lab) -> None:
    """A version from the future is refused with both sides' versions in the details."""
    error = _add(lab, _plain(lab, cniVersion="1000.0.0")).error()
    assert error["code"] == INCOMPATIBLE
    assert "1000.0.0" in error.get("details", "")
    assert all(version in error["details"] for version in lab.profile.versions)


@pytest.mark.parametrize(("command", "version"), [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "0.4.0")])
def test_case_11_verb_younger_than_the_configuration(lab: Lab, command: str, version: str) -> None:
    """A verb that the configuration's version does not have is refused, not run."""
    error = _add(lab, _plain(lab, cniVersion=version, prevResult={}), command=command).error()
    assert error["code"] == INCOMPATIBLE
    assert f"config version does not allow {command}" in error["msg"]


@pytest.mark.parametrize("netns", [None, ""])
def test_case_12_netns_optional_on_del_only(lab: Lab, netns: str | None) -> None:
    """DEL needs no CNI_NETNS; ADD does."""
    outcome = _add(lab, _plain(lab), command="DEL", netns=netns)
    assert outcome.exit_code == 0, outcome
    assert outcome.stdout == b""
    error = _add(lab, _plain(lab), netns=netns).error()
    assert error["code"] == BAD_ENVIRONMENT
    assert "CNI_NETNS" in error["msg"]


def test_case_13_status_with_empty_variables(lab: Lab) -> None:
    """Present but empty variables are what libcni sends with STATUS; a ready plugin says nothing."""
    outcome = lab.raw(_plain(lab, cniVersion="1.1.0"), command="STATUS")
    assert outcome.exit_code == 0, outcome
    assert outcome.stdout == b""


@pytest.mark.feature("daemon")
def test_case_14_status_while_the_daemon_is_away(lab: Lab) -> None:
    """STATUS is 50 while nobody could serve an ADD, and success once the daemon is back."""
    network = lab.network()
    assert lab.host.daemon is not None
    lab.host.daemon.stop()
    with pytest.raises(CniFailed) as refused:
        lab.runtime.status(network)
    assert refused.value.code == 50
    lab.host.daemon.start()
    lab.runtime.status(network)


@pytest.mark.feature("daemon")
def test_case_14_verbs_while_the_daemon_is_away(lab: Lab) -> None:
    """ADD and CHECK say try again (11); a DEL that was accepted has happened once the daemon is back."""
    sandbox, network = lab.sandbox(), lab.network()
    result = lab.add(network, sandbox)
    assert lab.host.daemon is not None
    lab.host.daemon.stop()
    assert lab.refused(network, lab.sandbox()).code == 11
    with pytest.raises(CniFailed) as refused:
        lab.check(network, sandbox)
    assert refused.value.code == 11
    try:
        lab.delete(network, sandbox)
        promised, code = True, 11
    except CniFailed as failure:
        promised = False
        code = failure.code
    assert code == 11
    lab.host.daemon.start()
    if not promised:
        lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_14_status_with_a_full_pool(lab: Lab) -> None:
    """STATUS is 50 when no address is left, before an ADD would fail on it."""
    subnet = lab.subnet4()
    one = {"subnet": str(subnet), "rangeStart": str(subnet[10]), "rangeEnd": str(subnet[10])}
    network = lab.network(ipam=lab.ipam(ranges=[[one]]), version="1.1.0")
    lab.add(network, lab.sandbox())
    with pytest.raises(CniFailed) as refused:
        lab.runtime.status(network)
    assert refused.value.code == 50


def test_case_15_own_namespace(own_lab: Lab) -> None:
    """A sandbox that is the plugin's own namespace is refused, and nothing is left in it."""
    lab = own_lab
    network, sandbox = lab.network(), lab.sandbox()
    with pytest.raises(CniFailed):
        lab.add(network, sandbox, "conf0", netns=str(lab.host.ns.path))
    lab.delete(network, sandbox, "conf0")
    assert lab.leaks(sandbox.id) == []


@pytest.mark.parametrize("path", ["/nonexistent/netns", "/etc/hostname", "/"])
def test_case_15_not_a_namespace(lab: Lab, path: str) -> None:
    """A path that is no network namespace is refused with an error object."""
    network, sandbox = lab.network(), lab.sandbox()
    with pytest.raises(CniFailed) as refused:
        lab.add(network, sandbox, netns=path)
    refused.value.outcome.error()
    lab.delete(network, sandbox, netns="")
    assert lab.leaks(sandbox.id) == []


def _assert_result_of(version: str, result: Json, sandbox_path: str) -> None:
    """The shape of a result of that version, with one IPv4 and one IPv6 address."""
    assert result["cniVersion"] == version
    if version_key(version) < (0, 3, 0):
        assert {"ip4", "ip6"} <= set(result)
        assert "ips" not in result
        assert "interfaces" not in result
        assert ipaddress.ip_interface(result["ip4"]["ip"]).version == 4
        assert ipaddress.ip_interface(result["ip6"]["ip"]).version == 6
        return
    assert "ip4" not in result
    names = [one["name"] for one in result["interfaces"]]
    inside = result["interfaces"][names.index("eth0")]
    assert inside["sandbox"] == sandbox_path
    for entry in result["ips"]:
        family = ipaddress.ip_interface(entry["address"]).version
        assert result["interfaces"][entry["interface"]]["name"] == "eth0"
        if version_key(version) < (1, 0, 0):
            assert entry["version"] == str(family)
        else:
            assert "version" not in entry
    assert [ipaddress.ip_interface(e["address"]).version for e in result["ips"]] == [4, 6]
    if version_key(version) >= (1, 1, 0):
        assert inside["mtu"] > 0
    else:
        assert all("mtu" not in one for one in result["interfaces"])


def test_case_16_result_in_every_version(lab: Lab, cni_version: str) -> None:
    """A result has the shape of the configuration's version; DEL and (since 0.4.0) CHECK take it back."""
    network = lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6()), version=cni_version)
    sandbox = lab.sandbox()
    result = lab.add(network, sandbox)
    _assert_result_of(cni_version, result, sandbox.path)
    assert set(ips_of(result)) == bare_addresses(sandbox.ns, "eth0")
    if version_key(cni_version) >= (0, 4, 0):
        lab.check(network, sandbox)
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id) == []


def test_case_16_no_version_means_0_1_0(lab: Lab) -> None:
    """A configuration without cniVersion is of 0.1.0, as in skel."""
    network = lab.network(version="0.1.0")
    config = lab.config_of(network)
    del config["cniVersion"]
    sandbox = lab.sandbox()
    env = {"containerid": sandbox.id, "netns": sandbox.path, "ifname": "eth0"}
    assert "ip4" in lab.raw(config, command="ADD", **env).json()
    assert lab.raw(config, command="DEL", **env).exit_code == 0


def test_case_17_keys_in_odd_case(lab: Lab) -> None:
    """Keys are matched without regard to case, as Go's decoder does."""
    subnet = lab.subnet4()
    network = lab.network(ipam=lab.ipam(subnet))
    plain = lab.config_of(network, runtimeConfig={"ips": [str(subnet[77])]}, MTU=1234)
    odd = {
        key.upper() if key in {"name", "type", "ipam", "runtimeConfig"} else key: v
        for key, v in plain.items()
    }
    odd["IPAM"] = {key.title(): value for key, value in odd["IPAM"].items()}
    sandbox = lab.sandbox()
    env = {"containerid": sandbox.id, "netns": sandbox.path, "ifname": "eth0"}
    outcome = lab.raw(odd, command="ADD", **env)
    assert outcome.exit_code == 0, outcome
    assert ips_of(outcome.json()) == [str(subnet[77])]
    assert links(sandbox.ns)["eth0"]["mtu"] == 1234
    assert lab.raw(odd, command="DEL", **env).exit_code == 0


@pytest.mark.parametrize("args", ["FOO=BAR", "IP=1=2", "FOO", "IgnoreUnknown=1;IP=1=2"])
def test_case_18_bad_args(lab: Lab, args: str) -> None:
    """CNI_ARGS that are malformed or (without IgnoreUnknown) unknown are an error."""
    network, sandbox = lab.network(), lab.sandbox()
    lab.refused(network, sandbox, args=args)
    lab.delete(network, sandbox)  # without the arguments: whether DEL minds them is not laid down
    assert lab.leaks(sandbox.id) == []


@pytest.mark.parametrize(
    "args",
    [
        "IgnoreUnknown=1;FOO=BAR",
        "IgnoreUnknown=true;FOO=BAR",
        "FOO=BAR;IgnoreUnknown=1",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u",
    ],
)
def test_case_18_unknown_args_on_request_ignored(lab: Lab, args: str) -> None:
    """With IgnoreUnknown, other people's arguments are fine: that is how Kubernetes calls."""
    lab.add(lab.network(), lab.sandbox(), args=args)


def test_case_19_unknown_keys(lab: Lab) -> None:
    """Keys that a plugin does not know, ``cni.dev/*``, ``args`` and ``capabilities`` are ignored."""
    extra: Json = {"cni.dev/future": {"a": 1}, "somebodys": [1, {"x": None}], "args": {"cni": {"labels": []}}}
    lab.add(lab.network(**extra), lab.sandbox())


def test_case_19_only_json_on_stdout(lab: Lab) -> None:
    """The result is all of stdout."""
    sandbox = lab.sandbox()
    config = lab.config_of(lab.network())
    env = {"containerid": sandbox.id, "netns": sandbox.path, "ifname": "eth0"}
    outcome = lab.raw(config, command="ADD", **env)
    assert json.loads(outcome.stdout)["cniVersion"] == lab.profile.version
    assert lab.raw(config, command="DEL", **env).stdout == b""


def test_plugin_is_a_regular_executable_file(shared_host: Host, profile: Profile) -> None:
    """The binary is a regular file, not a link: that is what libcni looks for."""
    binary: Path = shared_host.runtime.find(profile.type)
    assert binary.is_file()
    assert not binary.is_symlink()
    assert binary.stat().st_mode & 0o111 == 0o111


def test_every_result_address_has_a_prefix(lab: Lab) -> None:
    """Result addresses are CIDRs with the prefix length that the sandbox has, gateways are bare."""
    subnet4, subnet6 = lab.subnet4(), lab.subnet6()
    result = lab.add(lab.network(ipam=lab.ipam(subnet4, subnet6)), lab.sandbox())
    want = {4: "24", 6: "64"} if lab.profile.prefix == "range" else {4: "32", 6: "128"}
    subnets: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = [subnet4, subnet6]
    for entry, subnet in zip(result["ips"], subnets, strict=True):
        assert entry["address"].partition("/")[2] == want[subnet.version]
        assert ipaddress.ip_address(bare(entry["address"])) in subnet
        gateway = lab.profile.gateway
        expected = str(subnet[1]) if isinstance(gateway, str) else gateway[str(subnet.version)]
        assert entry["gateway"] == expected
