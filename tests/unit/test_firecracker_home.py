"""The directory of a guest's API socket."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from portwright.model.errors import InvalidInput
from portwright.vmm.firecracker import home


def test_it_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    """What is in it goes along; after a failure inside too."""

    def fail() -> None:
        with home.made(tmp_path, "g1", 7) as socket:
            assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
            socket.touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_ones_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """The next guest of the name removes it; other guests' directories, with names alike, stay."""
    for name in ("g1.5.fc", "g1.6.fc", "g1.x.5.fc", "g1.5.5.fc", "g2.5.fc", "g1x5.fc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "api.sock").touch()
    with home.made(tmp_path, "g1", 7):
        there = {path.name for path in tmp_path.iterdir()}
        assert there == {"g1.7.fc", "g1.x.5.fc", "g1.5.5.fc", "g2.5.fc", "g1x5.fc"}


def test_a_guard_removes_its_own_guests_alone(tmp_path: Path) -> None:
    """A guest of the same name that came meanwhile keeps its own; nothing there is no error."""
    with home.made(tmp_path, "g1", 7) as socket:
        home.sweep(tmp_path, "g1", 6)
        assert socket.parent.is_dir()
        home.sweep(tmp_path, "g1", 7)
        home.sweep(tmp_path, "g1", 7)
        assert not socket.parent.exists()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    """With its length and the way out, and nothing is made."""
    with (
        pytest.raises(InvalidInput, match="longer than a Unix socket's 107 bytes; use a shorter"),
        home.made(tmp_path, "g" * 100, 7),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
