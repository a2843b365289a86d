"""A folder of manifests on the disk: what is read, what is refused, and where changes can come from."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from portwright.model.errors import InvalidInput
from portwright.node import folder as module
from portwright.node.folder import Places, is_inside, is_manifest, read_folder
from portwright.node.follow import AT_MOST, QUIET, Settling


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one manifest."""
    made = tmp_path / "policies"
    made.mkdir(mode=0o755)
    (made / "web.yaml").write_text("a")
    return made


def names(folder: Path) -> list[str]:
    """The names of what is read, below the folder."""
    return [str(Path(name).relative_to(folder)) for name, _ in read_folder(folder, {})]


def test_what_is_a_manifest(folder: Path) -> None:
    """Files with a manifest's suffix; not what editors leave, nor what is hidden, nor folders."""
    for other in (".web.yaml.swp", ".#web.yaml", "web.yaml~", "#web.yaml#", "4913", "a.txt", ".hidden.yaml"):
        (folder / other).write_text("x")
    (folder / "dir.yaml").mkdir()
    (folder / "b.yml").write_text("b")
    (folder / "c.json").write_text("c")
    assert read_folder(folder, {}) == [
        (str(folder / "b.yml"), "b"),
        (str(folder / "c.json"), "c"),
        (str(folder / "web.yaml"), "a"),
    ]
    assert not is_manifest("yaml")


def test_the_way_to_a_mounted_configmap(folder: Path) -> None:
    """``web.yaml -> ..data/web.yaml -> ..1/web.yaml``: the text is the target's, the name the link's, and
    each link on the way is a place to look at."""
    (folder / "web.yaml").unlink()
    for number in (1, 2):
        (folder / f"..{number}").mkdir()
        (folder / f"..{number}" / "web.yaml").write_text(str(number))
    (folder / "..data").symlink_to("..1")
    (folder / "web.yaml").symlink_to("..data/web.yaml")
    places: Places = {}
    assert read_folder(folder, places) == [(str(folder / "web.yaml"), "1")]
    assert places[str(folder)].concerns("..data")
    assert places[str(folder / "..1")].concerns("web.yaml")
    assert places[str(folder / "..1")].content
    swapped = folder / "..tmp"
    swapped.symlink_to("..2")
    swapped.rename(folder / "..data")
    assert read_folder(folder, {}) == [(str(folder / "web.yaml"), "2")]


def test_a_folder_by_a_link(folder: Path, tmp_path: Path) -> None:
    """The folder may be a link itself; files are called by the link's name, and the link is looked at."""
    link = tmp_path / "current"
    link.symlink_to(folder)
    places: Places = {}
    assert read_folder(link, places) == [(str(link / "web.yaml"), "a")]
    assert places[str(tmp_path)].concerns("current")
    assert not places[str(tmp_path)].concerns("elsewhere")
    for name in (f"{link}/x.yaml", f"{folder}/x.yaml", f"{folder}/../policies/x.yaml"):
        assert is_inside(link, name), name
    for name in (f"{tmp_path}/x.yaml", f"{folder}/sub/x.yaml", "x.yaml"):
        assert not is_inside(link, name), name


def test_a_folder_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    """The nearest directory that there is tells when it comes."""
    places: Places = {}
    with pytest.raises(InvalidInput, match="No such file"):
        read_folder(tmp_path / "a" / "b", places)
    assert places[str(tmp_path)].concerns("a")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "b.yaml")


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(folder)
        sock.bind("b.yaml")


def _loop(folder: Path) -> None:
    (folder / "b.yaml").symlink_to("b.yaml")


def _gone(folder: Path) -> None:
    (folder / "web.yaml").unlink()
    folder.rmdir()


#: What is done, to whom it is put down, and what is said.
WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "folder for the group": (lambda f: f.chmod(0o775), "policies", "could write it (mode 775); chmod go-w"),
    "folder for all, sticky": (lambda f: f.chmod(0o1777), "policies", "could write it (mode 1777)"),
    "file for all": (lambda f: (f / "web.yaml").chmod(0o666), "web.yaml", "could write it (mode 666)"),
    "file of another": (lambda f: os.chown(f / "web.yaml", 1000, 0), "web.yaml", "belongs to user 1000"),
    "folder of another": (lambda f: os.chown(f, 1000, 0), "policies", "belongs to user 1000"),
    "parent for all": (lambda f: f.parent.chmod(0o777), "", "could write it (mode 777)"),
    "parent of another": (lambda f: os.chown(f.parent, 1000, 0), "", "belongs to user 1000"),
    "link that leads nowhere": (lambda f: (f / "b.yaml").symlink_to("none"), "none", "No such file"),
    "link to itself": (_loop, "b.yaml", "more than 40 links"),
    "empty": (lambda f: (f / "b.yaml").touch(), "b.yaml", "is empty; write the manifest, or remove"),
    "fifo": (_fifo, "b.yaml", "is no file"),
    "socket": (_socket, "b.yaml", "can't be read: No such device"),
    "not text": (lambda f: (f / "b.yaml").write_bytes(b"\xff"), "b.yaml", "must be UTF-8"),
    "name that is not text": (lambda f: (f / "\udcff.yaml").write_text("x"), ".yaml", "must be UTF-8"),
    "no folder": (_gone, "policies", "can't be read: No such file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Each thing that is wrong with a folder is one error that names it, and no file of it is taken."""
    assert os.geteuid() == 0, "a file of another user can't be made without root"
    monkeypatch.chdir(folder.parent)  # and back, whoever leaves it
    spoil, place, said = WRONG[wrong]
    spoil(folder)
    with pytest.raises(InvalidInput) as caught:
        read_folder(folder, {})
    assert said in caught.value.why
    assert str(caught.value.value).endswith(place)


def test_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many files, so large, so many entries, so many places; one more is refused."""
    for number in range(3):
        (folder / f"{number}.yaml").write_text("xx")
    for bound, most, said in (
        ("MAX_FILES", 3, "more than 3 manifests"),
        ("MAX_ENTRIES", 3, "more than 3 entries"),
        ("MAX_FILE_BYTES", 1, "larger than"),
        ("MAX_BYTES", 6, "holds more than"),
        ("MAX_PLACES", 2, "more than 2 directories"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, bound, most)
            with pytest.raises(InvalidInput, match=said):
                read_folder(folder, {})
    assert len(names(folder)) == 4


def test_changes_settle_within_a_bound() -> None:
    """A look comes once it is quiet, at the latest so long after the first change; and waits as long for one
    who is still writing."""
    settling = Settling()
    assert settling.changed(10.0) == 10.0 + QUIET
    now = 10.0
    while now < 10.0 + AT_MOST:
        due = settling.changed(now)
        assert due <= 10.0 + AT_MOST
        now += QUIET / 2
    assert settling.latest(now) == 10.0 + AT_MOST
    settling.settled()
    assert settling.latest(20.0) == 20.0
    assert settling.changed(20.0) == 20.0 + QUIET
