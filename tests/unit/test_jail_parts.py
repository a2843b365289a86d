"""A jail's parts that need no root: what it may be, what an executable needs, what the filter refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from portwright.jail import filter as calls
from portwright.jail import libraries, tree
from portwright.jail.spec import File, Jail
from portwright.kernel import cgroup
from portwright.kernel.cgroup import Hierarchy
from portwright.model.errors import InvalidInput, NotFound, PortwrightError

LOADED = ("/usr/bin/python3", "/bin/ls", "/usr/bin/curl", "/usr/sbin/nft")
TRUE = Jail(command=("/bin/true",))


@pytest.mark.parametrize("program", LOADED)
def test_libraries_are_the_loaders(program: str) -> None:
    """What is read from the headers is what the loader itself says that it loads."""
    if not Path(program).exists():
        pytest.skip(f"no {program} here")
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    words = [line.split(" => ")[-1].split()[0] for line in listed.splitlines() if "/" in line]
    assert {os.path.realpath(path) for path in libraries.of(program)} == {os.path.realpath(w) for w in words}


def test_static_program_needs_nothing() -> None:
    """busybox-static has neither a loader nor a library."""
    assert libraries.of("/bin/busybox") == ()


def test_paths_of_its_own_come_first(tmp_path: Path) -> None:
    """A library is found by the path that the executable names, relative to itself, before the cache."""
    (tmp_path / "lib").mkdir()
    source = tmp_path / "x.c"
    source.write_text("int f(void) { return 0; }")
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "lib/libpwt.so", source], check=True)
    source.write_text("int f(void); int main(void) { return f(); }")
    command = [
        "gcc",
        "-o",
        str(tmp_path / "x"),
        str(source),
        f"-L{tmp_path}/lib",
        "-lpwt",
        "-Wl,-rpath,$ORIGIN/lib",
    ]
    subprocess.run(command, check=True)
    assert str(tmp_path / "lib/libpwt.so") in libraries.of(str(tmp_path / "x"))
    (tmp_path / "lib/libpwt.so").unlink()
    with pytest.raises(NotFound, match=r"libpwt\.so"):
        libraries.of(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"command": ()}, "command"),
        ({"command": ("true",)}, "command"),
        ({"command": ("/bin/../bin/true",)}, "command"),
        ({"command": ("/bin/true", "a\0b")}, "command"),
        ({"uid": -1}, "uid"),
        ({"gid": 2**32 - 1}, "gid"),
        ({"files": (File("/etc/hostname", "etc"),)}, "file"),
        ({"files": (File("/etc/hostname", "/"),)}, "file"),
        ({"files": (File("/etc/hostname", "/dev/x"),)}, "file"),
        ({"files": (File("/etc/hostname", "/tmp/x"),), "tmp": 1}, "file"),
        ({"files": (File("/etc/hostname", "/a"), File("/etc/hosts", "/a"))}, "file"),
        ({"files": (File("/etc", "/a"), File("/etc/hosts", "/a/b/c"))}, "file"),
        ({"devices": ("/etc/hostname",)}, "device"),
        ({"devices": ("/dev/../etc/hostname",)}, "device"),
        ({"devices": ("/dev",)}, "device"),
        ({"environment": {"A-B": "x"}}, "env"),
        ({"environment": {"A": "x\0y"}}, "env"),
        ({"rlimits": {"everything": 1}}, "rlimit"),
        ({"rlimits": {"nofile": -2}}, "rlimit"),
        ({"hostname": "-x"}, "hostname"),
        ({"tmp": -1}, "tmp"),
        ({"seccomp": False, "allow": ("bpf",)}, "allow"),
    ],
)
def test_what_is_no_jail_is_refused(change: dict[str, object], field: str) -> None:
    """Each wrong value is an InvalidInput that names its field, before anything is made."""
    jail = dataclasses.replace(TRUE, **change)  # type: ignore[arg-type]  # that is what is tried
    with pytest.raises(InvalidInput) as caught:
        _look_at(jail)
    assert caught.value.field == field


def _look_at(jail: Jail) -> None:
    jail.check()
    tree.plan(jail)


def test_tree_has_the_named_and_the_needed_only() -> None:
    """A jail's files are its program, libraries and what was named; its devices the usual and the named."""
    jail = dataclasses.replace(
        TRUE, files=(File("/etc/hostname", "/a/b", writable=True),), devices=("/dev/full",)
    )
    made = tree.plan(jail)
    given = {file.place for file in made.files}
    assert given - set(libraries.of("/bin/true")) == {"/bin/true", "/a/b", libraries.CACHE}
    assert [file.writable for file in made.files if file.place == "/a/b"] == [True]
    assert [path for path, _ in made.devices] == ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/full"]


def test_library_in_a_given_folder_is_not_given_twice() -> None:
    """What a directory that was named has at its place needs no mount of its own."""
    folders = {str(Path(path).parent) for path in libraries.of("/bin/ls")}
    files = tuple(File(os.path.realpath(folder), folder) for folder in folders)
    made = tree.plan(Jail(command=("/bin/ls",), files=files))
    assert {file.place for file in made.files} == {"/bin/ls", libraries.CACHE, *folders}


@pytest.mark.parametrize("name", ["read", "nothing", ""])
def test_only_refused_calls_can_be_allowed(name: str) -> None:
    """To allow what the filter doesn't refuse is a mistake, and told."""
    with pytest.raises(InvalidInput, match="the filter doesn't refuse it"):
        calls.build([name])
    calls.build(sorted(calls.REFUSED | calls.ABSENT | {"socket"}))


V1 = Hierarchy(Path("/v1/memory"), 1, frozenset({"rw", "memory"}))
V1_CPU = Hierarchy(Path("/v1/cpu"), 1, frozenset({"rw", "cpu", "cpuacct"}))


@pytest.mark.parametrize(
    ("limit", "writes"),
    [
        (("memory.max", "1G"), [("memory.limit_in_bytes", "1G")]),
        (("memory.max", "max"), [("memory.limit_in_bytes", "-1")]),
        (("memory.swappiness", "0"), [("memory.swappiness", "0")]),
        (("cpu.max", "50000 200000"), [("cpu.cfs_period_us", "200000"), ("cpu.cfs_quota_us", "50000")]),
        (("cpu.max", "max"), [("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "-1")]),
        (("cpu.shares", "2"), [("cpu.shares", "2")]),
    ],
)
def test_limits_of_version_2_are_said_in_version_1(
    limit: tuple[str, str], writes: list[tuple[str, str]]
) -> None:
    """memory.max and cpu.max mean the same on a host of version 1; other files are its own."""
    folder, found = cgroup._place((V1, V1_CPU), *limit, "a/b")
    assert found == writes
    assert str(folder).startswith("/v1/")
    assert str(folder).endswith("/a/b")


def test_version_2_needs_the_controller_handed_down(tmp_path: Path) -> None:
    """Where the parent doesn't hand a controller down, the error says how it would."""
    (tmp_path / "cgroup.subtree_control").write_text("cpu pids\n")
    there = (Hierarchy(tmp_path, 2, frozenset({"cpu", "memory", "pids"})),)
    assert cgroup._place(there, "cpu.max", "max", "") == (tmp_path, [("cpu.max", "max")])
    with pytest.raises(InvalidInput, match=r"echo \+memory >"):
        cgroup._place(there, "memory.max", "1G", "")
    with pytest.raises(InvalidInput, match="no such cgroup"):
        cgroup._place(there, "cpu.max", "max", "nowhere")


@pytest.mark.parametrize("file", ["cgroup.procs", "../x.y", "memory", "memory/.x", "a.b/c", ""])
def test_file_of_a_limit_is_a_controllers(file: str) -> None:
    """What is no controller's file is refused by its name."""
    with pytest.raises(PortwrightError, match="write it as FILE=VALUE"):
        cgroup._place((V1,), file, "1", "")
