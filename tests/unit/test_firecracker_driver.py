from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portwright.kernel import tap
from portwright.model.errors import Conflict, InvalidInput, NotFound, NotSupported, PortwrightError
from portwright.model.port import Limits
from portwright.vmm.firecracker import api
from portwright.vmm.firecracker.api import (
    CreateSnapshot,
    PatchDrive,
    PutAction,
    PutBootSource,
    PutDrive,
    PutMachineConfig,
    PutVsock,
)
from portwright.vmm.firecracker.driver import Driver, GuestState
from portwright.vmm.firecracker.errors import (
    InexactLimit,
    VmmLost,
    VmmRefused,
    VmmState,
    VmmTimeout,
    VmmUnavailable,
)
from portwright.vmm.firecracker.nics import Nic, Restore, RestoredNic
from portwright.vmm.firecracker.parts import MemoryBackend
from tests.firecracker_server import DeclaredTaps, Fault, FirecrackerServer, KernelTaps, Taps
from tests.fix_netns import NetnsFactory

MAC = "06:00:0a:00:00:02"
TEN = Limits(egress_rate=10_000_000, ingress_rate=20_000_000, ingress_burst=4_000_000)
START = PutAction(action_type="InstanceStart")
KERNEL = PutBootSource(kernel_image_path="/vmlinux")
MACHINE = PutMachineConfig(vcpu_count=2, mem_size_mib=128)

Start = Callable[..., FirecrackerServer]
Scenario = Callable[[Driver], Awaitable[Any]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start as many processes as the test asks for; all are gone afterwards."""
    with ExitStack() as running:
        names = iter(range(100))

        def make(taps: Taps | None = None, **options: Any) -> FirecrackerServer:
            if taps is None:
                taps = DeclaredTaps(tap0=False, tap1=False, tap2=False, queues4=True)
            return running.enter_context(FirecrackerServer(tmp_path / f"{next(names)}.sock", taps, **options))

        yield make


def play(server: FirecrackerServer, scenario: Scenario, *, pci: bool = False) -> Any:
    """Run a scenario against a process, by a driver of its own."""

    async def run() -> Any:
        return await scenario(await Driver.connect(server.path, pci=pci, seconds=30))

    return asyncio.run(run())


def changes(server: FirecrackerServer) -> list[str]:
    """What was asked for but to read."""
    return [f"{method} {path}" for method, path, _ in server.requests if method != "GET"]


async def booted(driver: Driver, *nics: Nic) -> None:
    """A running guest with these NICs."""
    await driver.configure(KERNEL, MACHINE)
    for nic in nics:
        await driver.add_nic(nic)
    await driver.boot()


def test_a_guest_from_configuration_to_the_power_button(start: Start) -> None:
    """Not started, running, paused, running: each step is sent once, and the state is Firecracker's own."""
    server = start()

    async def life(driver: Driver) -> None:
        assert await driver.state() is GuestState.NOT_STARTED
        drive = PutDrive(drive_id="root", is_root_device=True, path_on_host="/root.img", is_read_only=True)
        await driver.configure(KERNEL, MACHINE, drive, PutVsock(guest_cid=3, uds_path="v.sock"))
        await driver.add_nic(Nic(iface_id="eth0", tap="tap0", mac=MAC, mtu=1500, limits=TEN))
        await driver.boot()
        assert await driver.state() is GuestState.RUNNING
        await driver.pause()
        await driver.pause()
        assert await driver.state() is GuestState.PAUSED
        await driver.resume()
        await driver.resume()
        await driver.swap_drive(PatchDrive(drive_id="root", path_on_host="/other.img"))
        await driver.flush_metrics()
        await driver.press_power()
        config = await driver.config()
        assert config.vsock is not None
        assert (config.vsock.guest_cid, config.drives[0]["path_on_host"]) == (3, "/other.img")

    play(server, life)

    assert changes(server) == [
        "PUT /boot-source",
        "PUT /machine-config",
        "PUT /drives/root",
        "PUT /vsock",
        "PUT /network-interfaces/eth0",
        "PUT /actions",
        "PATCH /vm",
        "PATCH /vm",
        "PATCH /drives/root",
        "PUT /actions",
        "PUT /actions",
    ]


def test_limits_arrive_as_buckets_and_are_read_back(start: Start) -> None:
    """Egress is Firecracker's tx and ingress its rx, exactly; a change by PATCH names both directions."""
    server = start()

    async def life(driver: Driver) -> tuple[Limits, Limits, Limits]:
        await booted(driver, Nic(iface_id="eth0", tap="tap0", limits=TEN))
        first = await driver.limits("eth0")
        await driver.set_limits("eth0", Limits(ingress_rate=1_000_000))
        second = await driver.limits("eth0")
        await driver.set_limits("eth0", Limits())
        return first, second, await driver.limits("eth0")

    first, second, none = play(server, life)

    put = next(body for method, path, body in server.requests if (method, path[:8]) == ("PUT", "/network"))
    assert put["tx_rate_limiter"] == {"bandwidth": {"size": 191_250, "refill_time": 153}}
    assert put["rx_rate_limiter"] == {"bandwidth": {"size": 500_000, "refill_time": 200}}
    assert first == msgspec.structs.replace(TEN, egress_burst=1_530_000)
    assert second == Limits(ingress_rate=1_000_000, ingress_burst=625_000)
    assert none == Limits()
    assert server.requests[-2][2] == {
        "iface_id": "eth0",
        "rx_rate_limiter": {"bandwidth": {"size": 0, "refill_time": 0}},
        "tx_rate_limiter": {"bandwidth": {"size": 0, "refill_time": 0}},
    }


def test_limits_before_boot_keep_all_else_of_the_nic(start: Start) -> None:
    """PATCH is refused before boot, so the NIC is put again: MAC, MTU, tap and the metadata service stay."""
    server = start()

    async def life(driver: Driver) -> Any:
        await driver.add_nic(Nic(iface_id="eth0", tap="tap0", mac=MAC, mtu=1400, mmds=True))
        await driver.add_nic(Nic(iface_id="eth1", tap="tap1", mmds=True))
        before = await driver.config()
        await driver.set_limits("eth0", TEN)
        return before, await driver.config(), await driver.limits("eth0")

    before, after, limits = play(server, life)

    (was,) = (nic for nic in before.network_interfaces if nic.iface_id == "eth0")
    (now,) = (nic for nic in after.network_interfaces if nic.iface_id == "eth0")
    same = ("host_dev_name", "guest_mac", "mtu")
    assert [getattr(now, name) for name in same] == [getattr(was, name) for name in same]
    assert set(after.mmds_config.network_interfaces) == {"eth0", "eth1"}
    assert after.mmds_config.version == "V2"
    assert limits.egress_rate == TEN.egress_rate
    assert "PATCH /network-interfaces/eth0" not in changes(server)


def test_somebody_elses_limit_on_operations_stays(start: Start) -> None:
    """Our limits are bits: a bucket of operations survives ours, before boot and after."""
    server = start()
    ops = {"size": 1000, "refill_time": 100}

    async def life(driver: Driver) -> None:
        await driver.configure(KERNEL)
        await driver.add_nic(Nic(iface_id="eth0", tap="tap0"))
        server.nics["eth0"]["tx_rate_limiter"] = {"ops": ops}
        await driver.set_limits("eth0", TEN)
        assert server.nics["eth0"]["tx_rate_limiter"]["ops"] == ops
        await driver.boot()
        await driver.set_limits("eth0", Limits())
        assert server.nics["eth0"]["tx_rate_limiter"] == {"ops": ops}
        with pytest.raises(InvalidInput, match="ops"):
            await driver.limits("eth0")

    play(server, life)


def test_an_inexact_burst_changes_nothing(start: Start) -> None:
    """A burst that has no bucket is refused with the nearest before anything is sent."""
    server = start()

    async def life(driver: Driver) -> None:
        await booted(driver, Nic(iface_id="eth0", tap="tap0", limits=TEN))
        sent = len(server.requests)
        wrong = Limits(egress_rate=1_000_000, egress_burst=700_001)
        with pytest.raises(InexactLimit) as caught:
            await driver.set_limits("eth0", wrong)
        assert caught.value.nearest == (700_000, 701_000)
        with pytest.raises(InexactLimit):
            await driver.restore(
                Restore(
                    snapshot_path="s",
                    memory=MemoryBackend(backend_type="File", backend_path="m"),
                    nics=(RestoredNic(iface_id="eth0", limits=wrong),),
                )
            )
        assert len(server.requests) == sent

    play(server, life)


def test_what_is_for_before_boot_is_refused_after_it(start: Start) -> None:
    """A running guest takes no machine, vsock, list of NICs with metadata, boot or snapshot to load."""
    server = start()
    restore = Restore(snapshot_path="s", memory=MemoryBackend(backend_type="File", backend_path="m"))

    async def life(driver: Driver) -> None:
        await booted(driver, Nic(iface_id="eth0", tap="tap0"))
        sent = len(changes(server))
        for attempt in (
            driver.configure(MACHINE),
            driver.configure(PutVsock(guest_cid=3, uds_path="v")),
            driver.set_mmds(("eth0",)),
            driver.boot(),
            driver.restore(restore),
        ):
            with pytest.raises(VmmState, match="running; this needs it not started"):
                await attempt
        with pytest.raises(VmmState, match="needs it paused"):
            await driver.snapshot(CreateSnapshot(snapshot_path="s", mem_file_path="m"))
        assert len(changes(server)) == sent

    play(server, life)


def test_what_is_for_after_boot_is_refused_before_it(start: Start) -> None:
    """A guest that has not started can't be paused, unplugged, written to a snapshot or shut down."""
    server = start(pci=True)

    async def life(driver: Driver) -> None:
        await driver.add_nic(Nic(iface_id="eth0", tap="tap0"))
        for attempt in (
            driver.pause(),
            driver.resume(),
            driver.press_power(),
            driver.flush_metrics(),
            driver.remove_nic("eth0"),
            driver.snapshot(CreateSnapshot(snapshot_path="s", mem_file_path="m")),
            driver.swap_drive(PatchDrive(drive_id="root")),
        ):
            with pytest.raises(VmmState, match="not started"):
                await attempt

    play(server, life, pci=True)

    assert changes(server) == ["PUT /network-interfaces/eth0"]


def test_the_server_refuses_the_same_by_itself(start: Start) -> None:
    """What the driver refuses is Firecracker's rule and not only ours: sent all the same, it gets a 400."""
    server = start()

    async def life(driver: Driver) -> None:
        send = driver.client.send
        before: tuple[api.Request, ...] = (
            api.PatchNetworkInterface(iface_id="eth0"),
            api.DeleteNetworkInterface(iface_id="eth0"),
            api.PatchVm(state="Paused"),
            api.CreateSnapshot(snapshot_path="s", mem_file_path="m"),
            api.PutMmdsConfig(network_interfaces=("eth0",)),
            api.PutNetworkInterface(iface_id="eth0", host_dev_name="queues4"),
        )
        for request in before:
            with pytest.raises(VmmRefused):
                await send(request)
        await booted(driver, Nic(iface_id="eth0", tap="tap0"))
        after: tuple[api.Request, ...] = (
            MACHINE,
            PutVsock(guest_cid=3, uds_path="v"),
            api.PutMmdsConfig(network_interfaces=("eth0",)),
            api.PutNetworkInterface(iface_id="eth1", host_dev_name="tap1"),
            api.DeleteNetworkInterface(iface_id="eth0"),
            api.CreateSnapshot(snapshot_path="s", mem_file_path="m"),
        )
        for request in after:
            with pytest.raises(VmmRefused):
                await send(request)

    play(server, life)


@pytest.mark.parametrize(("version", "pci"), [("1.15.0", True), ("1.16.1", False)])
def test_hotplug_needs_its_release_and_its_flag(start: Start, version: str, pci: bool) -> None:
    """Below 1.16, or without --enable-pci, plugging and unplugging are NotSupported with what is needed."""
    server = start(version=version, pci=pci)

    async def life(driver: Driver) -> None:
        await booted(driver, Nic(iface_id="eth0", tap="tap0"))
        sent = len(changes(server))
        with pytest.raises(NotSupported, match=r"1\.16 or newer started with --enable-pci"):
            await driver.add_nic(Nic(iface_id="eth1", tap="tap1"))
        with pytest.raises(NotSupported, match=r"1\.16 or newer started with --enable-pci"):
            await driver.remove_nic("eth0")
        assert len(changes(server)) == sent

    play(server, life, pci=pci)


def test_a_nic_is_plugged_and_unplugged(start: Start) -> None:
    """With 1.16 and --enable-pci a running guest gets a NIC and loses it; its tap is free for the next."""
    server = start(pci=True)

    async def life(driver: Driver) -> None:
        await booted(driver, Nic(iface_id="eth0", tap="tap0", mac=MAC))
        for _ in range(3):
            await driver.add_nic(Nic(iface_id="eth1", tap="tap1", limits=TEN))
            assert (await driver.limits("eth1")).egress_rate == TEN.egress_rate
            with pytest.raises(Conflict, match="eth1"):
                await driver.add_nic(Nic(iface_id="eth1", tap="tap2"))
            with pytest.raises(Conflict, match="eth0"):
                await driver.add_nic(Nic(iface_id="eth2", tap="tap2", mac=MAC.upper()))
            with pytest.raises(NotSupported, match="plugged in"):
                await driver.add_nic(Nic(iface_id="eth2", tap="tap2", mmds=True))
            await driver.remove_nic("eth1")
            with pytest.raises(NotFound, match="eth1"):
                await driver.remove_nic("eth1")

    play(server, life, pci=True)

    assert list(server.nics) == ["eth0"]


def test_a_process_too_old_for_pci_is_noticed_at_once(start: Start) -> None:
    """--enable-pci is of 1.13: who says that a 1.12 has it is told."""
    server = start(version="1.12.0")

    with pytest.raises(NotSupported, match=r"1\.13"):
        play(server, lambda driver: driver.state(), pci=True)


def test_the_metadata_service_is_switched_per_nic(start: Start) -> None:
    """Each NIC made with it joins the list; the list can be set, but not to what isn't there, or to none."""
    server = start()

    async def life(driver: Driver) -> None:
        await driver.add_nic(Nic(iface_id="eth0", tap="tap0", mmds=True))
        await driver.add_nic(Nic(iface_id="eth1", tap="tap1"))
        await driver.add_nic(Nic(iface_id="eth2", tap="tap2", mmds=True))
        assert server.mmds_config is not None
        assert set(server.mmds_config["network_interfaces"]) == {"eth0", "eth2"}
        await driver.add_nic(Nic(iface_id="eth2", tap="tap2"))  # again, and without
        assert server.mmds_config["network_interfaces"] == ["eth0"]
        with pytest.raises(NotSupported, match="the last NIC"):
            await driver.add_nic(Nic(iface_id="eth0", tap="tap0"))
        await driver.set_mmds(("eth1",), version="V1", address="169.254.42.1", imds_compat=True)
        assert server.mmds_config == {
            "network_interfaces": ["eth1"],
            "version": "V1",
            "ipv4_address": "169.254.42.1",
            "imds_compat": True,
        }
        with pytest.raises(NotFound, match="eth9"):
            await driver.set_mmds(("eth9",))
        with pytest.raises(InvalidInput):
            await driver.set_mmds(())

    play(server, life)


def test_metadata_is_put_patched_and_read(start: Start) -> None:
    """RFC 7396 at the other end: null takes a key away, objects are merged."""
    server = start()

    async def life(driver: Driver) -> Any:
        with pytest.raises(VmmRefused, match="not initialized"):
            await driver.patch_metadata({"a": 1})
        await driver.put_metadata({"a": {"b": 1, "c": 2}, "d": [1]})
        await driver.patch_metadata({"a": {"b": None, "e": 3}})
        return await driver.metadata()

    assert play(server, life) == {"a": {"c": 2, "e": 3}, "d": [1]}


def snapshot(start: Start, folder: Path, *nics: Nic) -> Restore:
    """The files of a guest that had these NICs; how to restore it."""
    server = start()

    async def life(driver: Driver) -> None:
        await driver.configure(PutVsock(guest_cid=3, uds_path="v.sock"))
        await booted(driver, *nics)
        await driver.put_metadata({"id": "origin"})
        await driver.pause()
        await driver.snapshot(
            CreateSnapshot(snapshot_path=str(folder / "state"), mem_file_path=str(folder / "memory"))
        )

    play(server, life)
    return Restore(
        snapshot_path=str(folder / "state"),
        memory=MemoryBackend(backend_type="File", backend_path=str(folder / "memory")),
        nics=tuple(RestoredNic(iface_id=nic.iface_id) for nic in nics),
    )


def test_clones_get_their_own_tap_limits_and_metadata(start: Start, tmp_path: Path) -> None:
    """A snapshot is loaded paused; each NIC's limits are the new port's before it runs; the MAC stays."""
    origin = snapshot(start, tmp_path, Nic(iface_id="eth0", tap="tap0", mac=MAC, limits=TEN))

    for number, limits in ((1, Limits(egress_rate=1_000_000)), (2, Limits())):
        server = start(DeclaredTaps(tap1=False, tap2=False))
        wanted = msgspec.structs.replace(
            origin,
            nics=(RestoredNic(iface_id="eth0", tap=f"tap{number}", limits=limits),),
            vsock_path=f"v{number}.sock",
            metadata={"id": number},
        )

        async def life(driver: Driver, wanted: Restore = wanted) -> tuple[Any, Limits, Any]:
            await driver.restore(wanted)
            return await driver.config(), await driver.limits("eth0"), await driver.metadata()

        config, found, metadata = play(server, life)

        assert changes(server) == [
            "PUT /snapshot/load",
            "PATCH /network-interfaces/eth0",
            "PUT /mmds",
            "PATCH /vm",
        ]
        loaded = next(body for _, path, body in server.requests if path == "/snapshot/load")
        assert loaded["resume_vm"] is False
        assert (config.nic("eth0").host_dev_name, config.nic("eth0").guest_mac) == (f"tap{number}", MAC)
        assert config.vsock.uds_path == f"v{number}.sock"
        assert (found.egress_rate, found.ingress_rate) == (limits.egress_rate, 0)
        assert metadata == {"id": number}
        assert server.state == "Running"


def test_a_clone_can_be_left_paused(start: Start, tmp_path: Path) -> None:
    """Without resume the guest waits, with its limits in force."""
    origin = snapshot(start, tmp_path, Nic(iface_id="eth0", tap="tap0"))
    server = start()

    async def life(driver: Driver) -> GuestState:
        await driver.restore(msgspec.structs.replace(origin, resume=False))
        return await driver.state()

    assert play(server, life) is GuestState.PAUSED


def test_a_clone_whose_limits_fail_never_runs(start: Start, tmp_path: Path) -> None:
    """A PATCH that is refused, or whose answer is lost, leaves the guest paused."""
    origin = snapshot(start, tmp_path, Nic(iface_id="eth0", tap="tap0", limits=TEN))
    for kind, expected in (("refuse", VmmRefused), ("close", VmmLost)):
        server = start()
        server.faults["PATCH", "/network-interfaces/eth0"] = Fault(kind)

        with pytest.raises(expected):
            play(server, lambda driver: driver.restore(origin))

        assert server.state == "Paused"


def test_a_snapshot_with_a_nic_nobody_named_never_runs(start: Start, tmp_path: Path) -> None:
    """A NIC without a port would keep the origin's tap and limits: refused, and the guest stays paused."""
    origin = snapshot(
        start, tmp_path, Nic(iface_id="eth0", tap="tap0"), Nic(iface_id="eth1", tap="tap1", limits=TEN)
    )
    server = start()

    with pytest.raises(Conflict, match="has NICs eth0, eth1, not eth0"):
        play(server, lambda driver: driver.restore(msgspec.structs.replace(origin, nics=origin.nics[:1])))

    assert server.state == "Paused"


def test_a_load_that_fails_ends_the_process(start: Start, tmp_path: Path) -> None:
    """An unknown NIC in the overrides is an error of Firecracker's, after which nobody listens."""
    origin = snapshot(start, tmp_path, Nic(iface_id="eth0", tap="tap0"))
    server = start()
    wanted = msgspec.structs.replace(origin, nics=(RestoredNic(iface_id="eth7", tap="tap1"),))

    async def life(driver: Driver) -> None:
        with pytest.raises(VmmRefused, match="eth7"):
            await driver.restore(wanted)
        with pytest.raises(VmmUnavailable):
            await driver.state()

    play(server, life)


def test_a_snapshot_needs_a_process_in_which_nothing_is_configured(start: Start, tmp_path: Path) -> None:
    """A NIC, a kernel or a vsock that is there is refused before the load, which would end the process."""
    origin = snapshot(start, tmp_path, Nic(iface_id="eth0", tap="tap0"))
    for prepare in (
        lambda driver: driver.add_nic(Nic(iface_id="eth0", tap="tap0")),
        lambda driver: driver.configure(KERNEL),
        lambda driver: driver.configure(PutVsock(guest_cid=3, uds_path="v")),
    ):
        server = start()

        async def life(driver: Driver, prepare: Scenario = prepare) -> None:
            await prepare(driver)
            with pytest.raises(VmmState, match="nothing was configured"):
                await driver.restore(origin)

        play(server, life)
        assert "PUT /snapshot/load" not in changes(server)


@pytest.mark.parametrize(
    ("kind", "expected"), [("close", VmmLost), ("cut", VmmLost), ("hang", VmmTimeout), ("refuse", VmmRefused)]
)
def test_the_state_after_a_lost_answer_is_firecrackers(
    start: Start, kind: str, expected: type[PortwrightError]
) -> None:
    """Boot whose answer is lost was done; the driver looks, and so a second boot is refused by the state."""
    server = start()
    done = kind != "refuse"

    async def life(driver: Driver) -> None:
        await driver.configure(KERNEL)
        server.faults["PUT", "/actions"] = Fault(kind, done=done)
        with pytest.raises(expected):
            await driver.client.send(START, seconds=0.3 if kind == "hang" else None)
        if done:
            assert await driver.state() is GuestState.RUNNING
            with pytest.raises(VmmState):
                await driver.boot()
        else:
            await driver.boot()

    play(server, life)


def test_a_tap_serves_one_nic(start: Start) -> None:
    """Two NICs on one tap: EBUSY is Firecracker's, and said with the request."""
    server = start()

    async def life(driver: Driver) -> None:
        await driver.add_nic(Nic(iface_id="eth0", tap="tap0"))
        with pytest.raises(VmmRefused, match="busy"):
            await driver.add_nic(Nic(iface_id="eth1", tap="tap0"))

    play(server, life)


@pytest.mark.netns
def test_taps_of_the_kernel(start: Start, netns_factory: NetnsFactory) -> None:
    """The tap that we make for a port is what Firecracker's flags open, once; one with several queues is not.

    A NIC that is removed lets the tap go, and the tap stays.
    """
    inside = netns_factory()
    tap.create(inside.fd, "pwtap0")
    tap.create(inside.fd, "pwmulti0", multi_queue=True)
    server = start(KernelTaps(inside.entered), pci=True)

    async def life(driver: Driver) -> None:
        await booted(driver, Nic(iface_id="eth0", tap="pwtap0"))
        with pytest.raises(VmmRefused, match="os error 22"):
            await driver.add_nic(Nic(iface_id="eth1", tap="pwmulti0"))
        with pytest.raises(VmmRefused, match="os error 16"):
            await driver.add_nic(Nic(iface_id="eth1", tap="pwtap0"))
        await driver.remove_nic("eth0")
        await driver.add_nic(Nic(iface_id="eth1", tap="pwtap0"))

    play(server, life, pci=True)

    assert "pwtap0" in inside.run(["ip", "link"]).stdout
