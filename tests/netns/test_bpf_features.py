"""Feature probes and the bpffs, on this kernel."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from portwright.kernel.bpf import features, is_bpffs, mount_bpffs, umount_bpffs
from portwright.model.errors import KernelFailed
from tests import mounts
from tests.fix_bpf import descriptors
from tests.fix_features import require_for_test
from tests.fix_netns import NetnsFactory

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("name", features.names())
def test_probe_agrees_with_the_version(name: str) -> None:
    """A kernel new enough for a feature has it, unless it says that it was built without."""
    require_for_test(name)
    found = features.probe(name)

    assert found.supported
    assert found is features.probe(name)
    assert os.uname().release == found.have


def test_probing_leaves_nothing(monkeypatch: pytest.MonkeyPatch, netns_factory: NetnsFactory) -> None:
    """Probing anew leaves no descriptor, no mount, and the same network namespace and devices."""
    monkeypatch.setattr(features, "_found", {})

    def state() -> tuple[object, ...]:
        return (
            descriptors(),
            mounts.standing(),
            str(Path("/proc/thread-self/ns/net").readlink()),
            socket.if_nameindex(),
            threading.active_count(),
        )

    with netns_factory().entered():
        before = state()
        found = features.all()
        after = state()

    assert before == after
    assert list(features.names()) == [feature.name for feature in found]
    assert all(feature.detail for feature in found)


def test_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a kernel from before it, a missing feature skips its test; on a newer one it fails it."""
    missing = features.Feature("tcx", "Linux 6.6", "x", supported=False, detail="EINVAL")
    monkeypatch.setitem(features._found, "tcx", missing)

    monkeypatch.setattr(features, "running_version", lambda: (6, 1))
    with pytest.raises(pytest.skip.Exception):
        require_for_test("tcx")
    monkeypatch.setattr(features, "running_version", lambda: (6, 6))
    monkeypatch.setattr("tests.fix_features.kernel_config", lambda: None)
    with pytest.raises(pytest.fail.Exception):
        require_for_test("tcx")


def test_bpffs(tmp_path: Path) -> None:
    """A mounted bpffs is private, owner-only, known as such below its root too, and gone when unmounted."""
    path = tmp_path / "bpf"
    path.mkdir()
    assert not is_bpffs(path)
    mount_bpffs(path)
    try:
        assert is_bpffs(path)
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "below").mkdir()
        assert is_bpffs(path / "below")
        (line,) = [row for row in Path("/proc/self/mountinfo").read_text().splitlines() if f" {path} " in row]
        fields = line.split(" - ", maxsplit=1)[0].split()
        assert {"nosuid", "nodev", "noexec"} <= set(fields[5].split(","))
        assert not [field for field in fields[6:] if field.startswith(("shared", "master"))]
    finally:
        umount_bpffs(path)

    assert not is_bpffs(path)
    assert path.exists()
    umount_bpffs(path)


def test_bpffs_errors(tmp_path: Path) -> None:
    """Mounting on nothing is ENOENT; what is absent is no bpffs; a plain directory is never unmounted."""
    with pytest.raises(KernelFailed) as caught:
        mount_bpffs(tmp_path / "absent")

    assert caught.value.errno == 2
    assert not is_bpffs(tmp_path / "absent")
    umount_bpffs("/proc")
    assert Path("/proc/self").exists()
