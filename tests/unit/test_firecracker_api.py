from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import portwright.vmm.firecracker as package
from portwright.model.errors import InvalidInput, NotSupported
from portwright.model.port import Limits
from portwright.vmm.firecracker import api, capabilities, nics
from portwright.vmm.firecracker.capabilities import FEATURES, Version
from portwright.vmm.firecracker.description import Description, Misfit, load
from portwright.vmm.firecracker.errata import ERRATA
from portwright.vmm.firecracker.nics import Nic, Restore, RestoredNic
from portwright.vmm.firecracker.parts import (
    MemoryBackend,
    NetworkOverride,
    RateLimiter,
    TokenBucket,
    VsockOverride,
)

FOLDER = Path(package.__file__).parent
LIMITER = RateLimiter(
    bandwidth=TokenBucket(size=65_562, refill_time=100, one_time_burst=0),
    ops=TokenBucket(size=0, refill_time=0),
)
# One of each request, with every field that it has.
EACH: tuple[tuple[api.Request, str, Any], ...] = (
    (api.GetVersion(), "GET /version", None),
    (api.GetInstance(), "GET /", None),
    (api.GetConfig(), "GET /vm/config", None),
    (api.GetMmds(), "GET /mmds", None),
    (
        api.PutNetworkInterface(
            iface_id="eth0",
            host_dev_name="tap0",
            guest_mac="06:00:ac:10:00:02",
            mtu=1500,
            rx_rate_limiter=LIMITER,
            tx_rate_limiter=RateLimiter(bandwidth=TokenBucket(size=125_000, refill_time=100)),
        ),
        "PUT /network-interfaces/eth0",
        {
            "iface_id": "eth0",
            "host_dev_name": "tap0",
            "guest_mac": "06:00:ac:10:00:02",
            "mtu": 1500,
            "rx_rate_limiter": {
                "bandwidth": {"size": 65_562, "refill_time": 100, "one_time_burst": 0},
                "ops": {"size": 0, "refill_time": 0},
            },
            "tx_rate_limiter": {"bandwidth": {"size": 125_000, "refill_time": 100}},
        },
    ),
    (
        api.PatchNetworkInterface(iface_id="eth0", rx_rate_limiter=LIMITER),
        "PATCH /network-interfaces/eth0",
        {
            "iface_id": "eth0",
            "rx_rate_limiter": {
                "bandwidth": {"size": 65_562, "refill_time": 100, "one_time_burst": 0},
                "ops": {"size": 0, "refill_time": 0},
            },
        },
    ),
    (api.DeleteNetworkInterface(iface_id="eth0"), "DELETE /network-interfaces/eth0", None),
    (
        api.PutMmdsConfig(
            network_interfaces=("eth0", "eth1"), version="V2", ipv4_address="169.254.42.1", imds_compat=True
        ),
        "PUT /mmds/config",
        {
            "network_interfaces": ["eth0", "eth1"],
            "version": "V2",
            "ipv4_address": "169.254.42.1",
            "imds_compat": True,
        },
    ),
    (api.PutMmds(contents={"a": {"b": None}}), "PUT /mmds", {"a": {"b": None}}),
    (api.PatchMmds(contents={"a": None}), "PATCH /mmds", {"a": None}),
    (
        api.PutVsock(guest_cid=3, uds_path="v.sock"),
        "PUT /vsock",
        {"guest_cid": 3, "uds_path": "v.sock"},
    ),
    (
        api.PutMachineConfig(
            vcpu_count=2, mem_size_mib=256, smt=True, track_dirty_pages=True, huge_pages="2M"
        ),
        "PUT /machine-config",
        {
            "vcpu_count": 2,
            "mem_size_mib": 256,
            "smt": True,
            "track_dirty_pages": True,
            "huge_pages": "2M",
        },
    ),
    (
        api.PutBootSource(kernel_image_path="/vmlinux", initrd_path="/initrd", boot_args="quiet"),
        "PUT /boot-source",
        {"kernel_image_path": "/vmlinux", "initrd_path": "/initrd", "boot_args": "quiet"},
    ),
    (
        api.PutDrive(drive_id="root", is_root_device=True, path_on_host="/root.img", is_read_only=True),
        "PUT /drives/root",
        {"drive_id": "root", "is_root_device": True, "path_on_host": "/root.img", "is_read_only": True},
    ),
    (
        api.PatchDrive(drive_id="stub", path_on_host="/data.img"),
        "PATCH /drives/stub",
        {"drive_id": "stub", "path_on_host": "/data.img"},
    ),
    (api.PutAction(action_type="InstanceStart"), "PUT /actions", {"action_type": "InstanceStart"}),
    (api.PatchVm(state="Paused"), "PATCH /vm", {"state": "Paused"}),
    (
        api.CreateSnapshot(snapshot_path="s", mem_file_path="m", snapshot_type="Full"),
        "PUT /snapshot/create",
        {"snapshot_path": "s", "mem_file_path": "m", "snapshot_type": "Full"},
    ),
    (
        api.LoadSnapshot(
            snapshot_path="s",
            mem_backend=MemoryBackend(backend_type="File", backend_path="m"),
            track_dirty_pages=True,
            resume_vm=False,
            network_overrides=(NetworkOverride(iface_id="eth0", host_dev_name="tap1"),),
            vsock_override=VsockOverride(uds_path="w.sock"),
            clock_realtime=True,
        ),
        "PUT /snapshot/load",
        {
            "snapshot_path": "s",
            "mem_backend": {"backend_type": "File", "backend_path": "m"},
            "track_dirty_pages": True,
            "resume_vm": False,
            "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap1"}],
            "vsock_override": {"uds_path": "w.sock"},
            "clock_realtime": True,
        },
    ),
)


@pytest.mark.parametrize(("request_", "line", "body"), EACH, ids=lambda value: getattr(value, "line", ""))
def test_each_request_is_what_the_description_allows(request_: api.Request, line: str, body: Any) -> None:
    """Verb, path and body of every request that we have, with all of its fields, pass the description."""
    request_.check()
    load().check_request(request_.METHOD, request_.path, request_.body)

    sent = msgspec.json.decode(msgspec.json.encode(request_.body))
    assert (request_.line, sent) == (line, body)


def test_no_request_is_left_out_here() -> None:
    """The list above has each request of the module."""
    known = {
        kind
        for kind in vars(api).values()
        if isinstance(kind, type) and issubclass(kind, api.Request) and kind is not api.Request
    }

    assert {type(request) for request, _, _ in EACH} == known


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PUT", "/nothing", {}, "request"),
        ("POST", "/vm", {}, "request"),
        ("DELETE", "/network-interfaces/a/b", None, "request"),
        ("DELETE", "/vsock", None, "request"),
        ("DELETE", "/network-interfaces/eth0", {}, "body"),
        ("GET", "/version", {}, "body"),
        ("PUT", "/vsock", None, "body"),
        ("PUT", "/vsock", {"guest_cid": 3}, "body"),
        ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}, "guest_cid"),
        ("PUT", "/vsock", {"guest_cid": True, "uds_path": "v"}, "guest_cid"),
        ("PATCH", "/vm", {"state": "Running"}, "state"),
        ("PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t", "mtu": 67}, "mtu"),
        ("PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t" * 16}, "host_dev_name"),
        ("PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t", "queues": 2}, "body"),
        ("PATCH", "/network-interfaces/a", {"iface_id": "a", "mtu": 1500}, "body"),
        (
            "PATCH",
            "/network-interfaces/a",
            {"iface_id": "a", "rx_rate_limiter": {"bandwidth": {"size": -1, "refill_time": 1}}},
            "rx_rate_limiter.bandwidth.size",
        ),
        (
            "PATCH",
            "/network-interfaces/a",
            {"iface_id": "a", "rx_rate_limiter": {"ops": {"size": 2**63, "refill_time": 1}}},
            "rx_rate_limiter.ops.size",
        ),
        ("PUT", "/mmds/config", {"network_interfaces": "eth0"}, "network_interfaces"),
        ("PUT", "/mmds/config", {"network_interfaces": [], "ipv4_address": "169.254.0.1"}, "ipv4_address"),
        (
            "PUT",
            "/snapshot/load",
            {"snapshot_path": "s", "network_overrides": [{"iface_id": "a"}]},
            "network_overrides[0]",
        ),
    ],
)
def test_what_the_description_does_not_allow_is_refused(
    method: str, path: str, body: Any, field: str
) -> None:
    """A wrong verb, path, type, range, word or key is an error with the field's path."""
    with pytest.raises(InvalidInput) as caught:
        load().check_request(method, path, body)

    assert caught.value.field == field


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (api.PutNetworkInterface(iface_id="eth0", host_dev_name="t" * 16), "host_dev_name"),
        (api.PutNetworkInterface(iface_id="eth0", host_dev_name="täp567890123456"), "host_dev_name"),
        (api.PutNetworkInterface(iface_id="eth0", host_dev_name=""), "host_dev_name"),
        (api.PutNetworkInterface(iface_id="eth0", host_dev_name="tap%d"), "host_dev_name"),
        (api.PutNetworkInterface(iface_id="eth0", host_dev_name="a/b"), "host_dev_name"),
        (api.PutNetworkInterface(iface_id="../vm", host_dev_name="tap0"), "iface_id"),
        (api.PatchNetworkInterface(iface_id=""), "iface_id"),
        (api.DeleteNetworkInterface(iface_id="eth0?"), "iface_id"),
        (
            api.PutNetworkInterface(iface_id="a", host_dev_name="t", guest_mac="01:00:5e:00:00:01"),
            "guest_mac",
        ),
        (api.PutNetworkInterface(iface_id="a", host_dev_name="t", guest_mac="6:0:0:0:0:1"), "guest_mac"),
        (api.PutMmdsConfig(network_interfaces=("eth0",), ipv4_address="10.0.0.1"), "ipv4_address"),
        (api.PutMmdsConfig(network_interfaces=("eth0", "e/1")), "network_interfaces[1]"),
        (api.PutVsock(guest_cid=3, uds_path="/" + "v" * 107), "uds_path"),
        (api.PutMachineConfig(vcpu_count=3, mem_size_mib=128, smt=True), "vcpu_count"),
        (api.PutMachineConfig(vcpu_count=1, mem_size_mib=129, huge_pages="2M"), "mem_size_mib"),
    ],
)
def test_what_the_description_cant_say_is_refused_too(request_: api.Request, field: str) -> None:
    """Names of at most 15 bytes, ids that are no paths, unicast MACs, link-local addresses, short paths."""
    with pytest.raises(InvalidInput) as caught:
        request_.check()

    assert caught.value.field == field


def test_two_nics_of_a_snapshot_dont_share_a_tap() -> None:
    """Overrides that name a tap or a NIC twice are refused: Firecracker would end itself."""
    memory = MemoryBackend(backend_type="File", backend_path="m")
    for second, field in (("b", "host_dev_name"), ("a", "iface_id")):
        tap = "tap0" if field == "host_dev_name" else "tap1"
        overrides = (
            NetworkOverride(iface_id="a", host_dev_name="tap0"),
            NetworkOverride(iface_id=second, host_dev_name=tap),
        )
        with pytest.raises(InvalidInput) as caught:
            api.LoadSnapshot(snapshot_path="s", mem_backend=memory, network_overrides=overrides).check()
        assert caught.value.field == f"network_overrides[1].{field}"


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/version", 200, {}),
        ("/version", 200, None),
        ("/version", 200, {"firecracker_version": 1}),
        ("/version", 204, None),
        ("/", 200, {"app_name": "F", "id": "i", "state": "Dancing", "vmm_version": "1"}),
        ("/vm/config", 200, {"network-interfaces": [{"iface_id": "eth0"}]}),
        ("/vm/config", 200, []),
    ],
)
def test_answers_that_the_description_does_not_promise(path: str, status: int, body: Any) -> None:
    """A missing or wrong body, an unknown word or an unknown good status is a misfit."""
    with pytest.raises(Misfit):
        load().check_answer("GET", path, status, body)


def test_an_answer_may_have_new_keys_and_nulls() -> None:
    """A newer release's keys are let through, and null is what Firecracker writes for what is not set."""
    body = {
        "balloon": None,
        "brand-new": {"a": 1},
        "network-interfaces": [{"iface_id": "a", "host_dev_name": "t", "rx_rate_limiter": None}],
    }

    assert load().check_answer("GET", "/vm/config", 200, body) == {
        "brand-new": {"a": 1},
        "network-interfaces": [{"iface_id": "a", "host_dev_name": "t"}],
    }
    assert load().check_answer("GET", "/mmds", 200, {"a": None}) == {"a": None}
    assert load().check_answer("PATCH", "/vm", 204, None) is None
    with pytest.raises(Misfit):
        load().check_answer("PATCH", "/vm", 204, {})


def test_the_errata_are_still_needed() -> None:
    """Each place that we patch is there without it and says something else: a new release's file is seen."""
    document = yaml.safe_load((FOLDER / "firecracker.yaml").read_text())
    for erratum in ERRATA:
        place = document
        for step in erratum.where[:-1]:
            place = place[step]
        assert place.get(erratum.where[-1]) != erratum.value, erratum
    bare = {key: verbs for key, verbs in document["paths"].items() if "delete" in verbs}
    assert bare == {}
    assert load().operation("DELETE", "/network-interfaces/eth0") is not None
    assert load().version == document["info"]["version"]


def test_words_of_the_description_are_words() -> None:
    """YAML 1.1 would read the log level Off as false, and refuse it."""
    load().check_request("PUT", "/logger", {"level": "Off"})
    assert Description is type(load())


def test_the_licence_lies_beside_the_file() -> None:
    """Apache-2.0 asks for its text and the origin wherever the file is passed on."""
    text = (FOLDER / "firecracker_LICENSE").read_text()

    assert "Amazon.com" in text
    assert "Apache License" in text


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("1.16.1", Version(1, 16, 1)),
        ("v1.17.0-dev", Version(1, 17)),
        ("1.9.1+local", Version(1, 9, 1)),
        ("2.0", Version(2, 0)),
    ],
)
def test_versions_are_read(text: str, version: Version) -> None:
    """Releases and what is on its way to one."""
    assert capabilities.parse(text) == version


@pytest.mark.parametrize("text", ["", "latest", "1", "1.x", "1.16.1rc", "1.16;"])
def test_what_is_no_version_is_refused(text: str) -> None:
    """What is not understood is not taken for old or new."""
    with pytest.raises(InvalidInput):
        capabilities.parse(text)


@pytest.mark.parametrize("name", FEATURES)
def test_each_row_of_the_matrix_refuses_with_a_way_out(name: str) -> None:
    """A feature is there from its release on, and not before or without its flag; "never" is never."""
    feature = FEATURES[name]
    newest = Version(99, 0)
    if feature.since is None:
        with pytest.raises(NotSupported) as caught:
            capabilities.require(name, newest, pci=True)
        assert feature.instead
        assert feature.instead in str(caught.value)
        return
    capabilities.require(name, newest, pci=True)
    capabilities.require(name, feature.since, pci=True)
    assert bool(capabilities.missing(name, newest, pci=False)) == feature.pci
    if feature.since > Version(0, 0):
        older = Version(feature.since.major, feature.since.minor - 1, 9)
        with pytest.raises(NotSupported, match=f"Firecracker {feature.since} or newer"):
            capabilities.require(name, older, pci=True)


def test_the_document_has_the_matrix() -> None:
    """docs/firecracker.md shows the table that the code refuses by."""
    document = Path(__file__).parents[2] / "docs" / "firecracker.md"

    assert capabilities.table() in document.read_text()


def test_known_bad_releases_are_warned_of() -> None:
    """1.16.0 loses vsock after a restore, 1.16.1 does not."""
    assert any("#5958" in why for why in capabilities.warnings(Version(1, 16)))
    assert capabilities.warnings(Version(1, 16, 1)) == ()


@pytest.mark.parametrize(
    ("nic", "feature"),
    [
        (Nic(iface_id="a", tap="t", queues=2), "taps with several queues"),
        (Nic(iface_id="a", tap="t", fds=(7,)), "taps handed over as descriptors"),
        (Nic(iface_id="a", tap="t", vhost=True), "vhost-net"),
        (Nic(iface_id="a", tap="t", backend="macvtap"), "macvtap"),
        (Nic(iface_id="a", tap="t", backend="vhost-user"), "vhost-user NICs"),
    ],
)
def test_what_firecracker_never_has_is_refused_by_name(nic: Nic, feature: str) -> None:
    """Queues, descriptors, vhost and macvtap are errors that name the feature and what to use."""
    with pytest.raises(NotSupported) as caught:
        nics.plug(nic, Version(99, 0))

    assert caught.value.feature == feature
    assert "no version" in caught.value.way_out


def test_an_mtu_needs_the_release_that_tells_the_guest() -> None:
    """Below 1.16 a NIC with an MTU is refused with that number; without one it is the same NIC."""
    nic = Nic(iface_id="a", tap="t", mtu=1400, limits=Limits(egress_rate=10_000_000))

    with pytest.raises(NotSupported, match="1\\.16"):
        nics.plug(nic, Version(1, 15))
    assert nics.plug(nic, Version(1, 16)).mtu == 1400
    plain = nics.plug(msgspec.structs.replace(nic, mtu=0), Version(1, 15))
    assert plain.mtu is None
    assert plain.rx_rate_limiter is None
    assert plain.tx_rate_limiter is not None


def test_a_restore_needs_the_releases_of_what_it_changes() -> None:
    """Other taps since 1.12, another vsock path and the clock since 1.16; always paused first."""
    plain = Restore(
        snapshot_path="s",
        memory=MemoryBackend(backend_type="File", backend_path="m"),
        nics=(RestoredNic(iface_id="eth0"),),
    )
    other = msgspec.structs.replace(plain, nics=(RestoredNic(iface_id="eth0", tap="tap1"),))

    assert nics.load(plain, Version(1, 0)).resume_vm is False
    assert nics.load(plain, Version(1, 0)).network_overrides is None
    assert nics.load(other, Version(1, 12)).network_overrides == (
        NetworkOverride(iface_id="eth0", host_dev_name="tap1"),
    )
    for wanted, version, need in (
        (other, Version(1, 11), "1.12"),
        (msgspec.structs.replace(plain, vsock_path="v"), Version(1, 15), "1.16"),
        (msgspec.structs.replace(plain, clock_realtime=True), Version(1, 15), "1.16"),
    ):
        with pytest.raises(NotSupported, match=need):
            nics.load(wanted, version)
