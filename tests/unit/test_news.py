"""Words between a daemon and those who follow a sandbox's ports."""

from __future__ import annotations

import select
import stat
from collections.abc import Iterator
from pathlib import Path
from socket import socket

import pytest

from portwright.kernel import news
from portwright.model.errors import KernelFailed


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory, in whose folder of guests nothing may be left."""
    (tmp_path / "vm").mkdir()
    yield tmp_path
    assert list((tmp_path / "vm").iterdir()) == []


def told(sock: socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_a_word_is_for_the_followers_of_that_sandbox(run_dir: Path) -> None:
    """One that is told is readable until the word is read, others are not; the path is for nobody else."""
    with news.heard(run_dir, 7) as seven, news.heard(run_dir, 77) as other:
        mode = (run_dir / "vm" / "7.news").stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        assert not told(seven)
        news.tell(run_dir, 7)
        assert (told(seven), told(other)) == (True, False)
        seven.recv(1)
        assert not told(seven)
        news.tell_all(run_dir)
        assert (told(seven), told(other)) == (True, True)


def test_telling_waits_for_nobody(run_dir: Path) -> None:
    """A sandbox without a follower, a folder that isn't there, and one that reads nothing are no error."""
    news.tell(run_dir, 7)
    news.tell(run_dir / "none", 7)
    news.tell_all(run_dir / "none")
    with news.heard(run_dir, 7) as sock:
        for _ in range(5000):  # far beyond net.unix.max_dgram_qlen and SO_SNDBUF
            news.tell(run_dir, 7)
        assert told(sock)


def test_what_killed_followers_left_is_removed(run_dir: Path) -> None:
    """By whoever tells all, by the next of that cookie, and by a guard; who listens keeps its path."""
    for cookie in (7, 8):
        with socket(1, 2) as sock:
            sock.bind(str(run_dir / "vm" / f"{cookie}.news"))
    with news.heard(run_dir, 8) as living:
        news.tell_all(run_dir)
        assert [path.name for path in (run_dir / "vm").iterdir()] == ["8.news"]
        assert told(living)
        news.sweep(run_dir, 8)
        news.sweep(run_dir, 8)


def test_without_its_folder_it_is_an_error(tmp_path: Path) -> None:
    """With the path, and nothing is made."""
    with pytest.raises(KernelFailed, match=r"bind .*/7\.news"), news.heard(tmp_path, 7):
        pass
    assert list(tmp_path.iterdir()) == []
