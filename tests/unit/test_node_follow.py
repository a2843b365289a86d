"""Following a folder: real inotify on a real folder; what would put it in force is a list."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from portwright.model.errors import InvalidInput, KernelFailed
from portwright.node import follow
from portwright.node.folder import FolderState
from portwright.node.follow import Follower
from portwright.node.policies import Policies

WITHIN = 10.0


class Given:
    """In the place of Policies: keeps what it is given, and refuses while ``refuses`` is said."""

    def __init__(self) -> None:
        self._folder = FolderState()
        self.looks = 0
        self.texts: dict[str, str] = {}
        self.refuses = ""
        self.breaks = ""
        self.asked = 0
        self.news = asyncio.Event()

    @property
    def folder(self) -> FolderState:
        """As Policies.folder; it is said anew after each look."""
        return self._folder

    @folder.setter
    def folder(self, state: FolderState) -> None:
        self._folder = state
        self.looks += 1
        self.news.set()

    def follow(self, files: list[tuple[str, str]]) -> bool:
        """As Policies.follow."""
        self.asked += 1
        self.news.set()
        if self.breaks:
            raise ZeroDivisionError(self.breaks)
        if self.refuses:
            raise InvalidInput("spec", "x", self.refuses)
        self.texts = {Path(name).name: text for name, text in files}
        return True


class Scene:
    """A folder with one file, followed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(mode=0o755, exist_ok=True)
        (folder / "a.yaml").write_text("a")
        self.given = Given()
        loop = asyncio.get_running_loop()
        self.follower = Follower(folder, cast("Policies", self.given), loop)
        self.follower.refresh()

    async def until(self, done: Callable[[], bool]) -> None:
        """Return once this is so, after a look at the folder or several."""
        async with asyncio.timeout(WITHIN):
            while not done():
                self.given.news.clear()
                await self.given.news.wait()

    async def refuses(self, said: str) -> None:
        """Return once the folder was looked at again, and refused for this reason."""
        before = self.given.looks
        await self.until(lambda: self.given.looks > before and said in self.given.folder.error)

    async def gives(self, texts: dict[str, str]) -> None:
        """Return once these are given."""
        await self.until(lambda: self.given.texts == texts)


@pytest.mark.asyncio
async def test_a_refusal_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was refused for a reason that no event tells of is in force once the reason is gone: by a nudge at
    once, and by itself after a while."""
    monkeypatch.setattr(follow, "RETRY", 0.01)
    scene = Scene(tmp_path / "p")
    assert scene.given.texts == {"a.yaml": "a"}
    scene.given.refuses = "no room"
    (scene.folder / "b.yaml").write_text("b")
    await scene.until(lambda: "no room" in scene.given.folder.error)
    asked = scene.given.asked
    await scene.until(lambda: scene.given.asked >= asked + 2)
    scene.given.refuses = ""
    scene.follower.nudge()
    assert scene.given.texts == {"a.yaml": "a", "b.yaml": "b"}
    assert not scene.given.folder.error
    scene.follower.close()


@pytest.mark.asyncio
async def test_the_way_there_is_followed(tmp_path: Path) -> None:
    """A link on the way to the folder that is swapped, and swapped again, leads to the new one's files; what
    happens in the old one no longer counts."""
    old, new = tmp_path / "1", tmp_path / "2"
    scene = Scene(old)
    scene.follower.close()
    new.mkdir(mode=0o755)
    (new / "b.yaml").write_text("b")
    link = tmp_path / "current"
    link.symlink_to(old)
    scene = Scene(link)
    for target, texts in ((new, {"b.yaml": "b"}), (old, {"a.yaml": "a"}), (new, {"b.yaml": "b"})):
        (tmp_path / "next").symlink_to(target)
        (tmp_path / "next").rename(link)
        await scene.gives(texts)
    asked = scene.given.asked
    (old / "c.yaml").write_text("c")
    (new / "d.yaml").write_text("d")
    await scene.gives({"b.yaml": "b", "d.yaml": "d"})
    assert scene.given.asked == asked + 1
    scene.follower.close()


@pytest.mark.asyncio
async def test_a_folder_of_editors_leavings_is_not_read(tmp_path: Path) -> None:
    """Files that are no manifests, and folders, are no reason to look."""
    scene = Scene(tmp_path / "p")
    asked = scene.given.asked
    for name in (".a.yaml.swp", "a.yaml~", "4913", "notes.txt"):
        (scene.folder / name).write_text("x")
        (scene.folder / name).unlink()
    (scene.folder / "b.yaml").write_text("b")
    await scene.gives({"a.yaml": "a", "b.yaml": "b"})
    assert scene.given.asked == asked + 1
    scene.follower.close()


@pytest.mark.asyncio
async def test_no_inotify_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has no more of them to give names the limit."""

    def none_left(**_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(follow, "INotify", none_left)
    with pytest.raises(KernelFailed, match="max_user_instances"):
        Scene(tmp_path / "p")


@pytest.mark.asyncio
async def test_half_a_file_stays_half_whatever_else_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one file is being written, places of others that are followed no longer, or are removed, make it
    no whole one; once it is closed it is taken."""
    monkeypatch.setattr(follow, "AT_MOST", 0.2)
    scene = Scene(tmp_path / "p")
    places = [tmp_path / name for name in ("1", "2", "3")]
    for place in places:
        place.mkdir(mode=0o755)
        (place / "l.yaml").write_text(place.name)
    link = scene.folder / "l.yaml"
    link.symlink_to(places[0] / "l.yaml")
    await scene.gives({"a.yaml": "a", "l.yaml": "1"})
    with (scene.folder / "a.yaml").open("w") as file:
        file.write("half")
        file.flush()
        await scene.refuses("still being written")
        for place in places[1:]:
            (tmp_path / "next").symlink_to(place / "l.yaml")
            (tmp_path / "next").rename(link)
            await scene.refuses("still being written")
        (places[0] / "l.yaml").unlink()
        places[0].rmdir()
        (places[2] / "l.yaml").write_text("4")
        await scene.refuses("still being written")
        assert scene.given.texts == {"a.yaml": "a", "l.yaml": "1"}
        file.write(" and half")
    await scene.gives({"a.yaml": "half and half", "l.yaml": "4"})
    scene.follower.close()


@pytest.mark.asyncio
async def test_a_mistake_of_ours_is_an_alarm_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody thought of leaves the folder refused, and tried again; it never is behind in silence."""
    monkeypatch.setattr(follow, "RETRY", 0.01)
    scene = Scene(tmp_path / "p")
    scene.given.breaks = "nobody thought of it"
    (scene.folder / "b.yaml").write_text("b")
    await scene.refuses("internal error: ZeroDivisionError: nobody thought of it")
    scene.given.breaks = ""
    await scene.gives({"a.yaml": "a", "b.yaml": "b"})
    await scene.until(lambda: not scene.given.folder.error)
    scene.follower.close()
