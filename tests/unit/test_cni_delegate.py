"""Foreign IPAM plugins, executed for real: small shell scripts, and host-local where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portwright.cni.delegate import MAX_STDERR, find_plugin, run
from portwright.cni.errors import CniError
from portwright.cni.request import CniRequest, parse
from portwright.cni.result import Result, ResultIp
from portwright.kernel.netns import entered

Script = Callable[[str], CniRequest]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Make the IPAM plugin ``fake`` of a shell script, and the ADD that uses it."""

    def make(body: str) -> CniRequest:
        plugin = tmp_path / "fake"
        plugin.write_text(f"#!/bin/sh\n{body}\n")
        plugin.chmod(0o755)
        return request(str(tmp_path), {"type": "fake"})

    return make


def request(path: str, ipam: dict[str, object], command: str = "ADD") -> CniRequest:
    env = {"CNI_CONTAINERID": f"c{os.getpid()}", "CNI_NETNS": "/n", "CNI_IFNAME": "eth0", "CNI_PATH": path}
    body = {"cniVersion": "1.0.0", "name": "net", "type": "portwright", "ipam": ipam}
    return parse({**env, "CNI_COMMAND": command}, json.dumps(body).encode())


def refused(wanted: CniRequest, **options: float) -> CniError:
    with pytest.raises(CniError) as caught:
        asyncio.run(run(wanted, **options))  # type: ignore[arg-type]
    return caught.value


def gone(pid: int) -> bool:
    """Tell whether ``pid`` has ended, within two seconds; a zombie of another parent counts as ended."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        os.sched_yield()
    return False


def test_the_plugin_sees_the_call(script: Script, tmp_path: Path) -> None:
    """Same variables and whole stdin arrive; the answer is read in the configuration's version."""
    wanted = script(
        f'cat > {tmp_path}/in; env > {tmp_path}/env; echo "noise" >&2;'
        'echo \'{"ips":[{"address":"10.0.0.2/24","gateway":"10.0.0.1"}]}\''
    )
    noise: list[str] = []
    got = asyncio.run(run(wanted, log=noise.append))

    assert got == Result(ips=(ResultIp(address="10.0.0.2/24", gateway="10.0.0.1"),))
    assert (tmp_path / "in").read_bytes() == wanted.raw_stdin
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert {key: value for key, value in env.items() if key.startswith("CNI_")} == wanted.env
    assert env["PATH"]
    assert noise == ["noise"]


def test_the_command_can_be_another(script: Script, tmp_path: Path) -> None:
    """The rollback of a failed ADD calls the plugin with DEL; DEL has no result."""
    wanted = script(f"echo $CNI_COMMAND > {tmp_path}/verb")

    assert asyncio.run(run(wanted, command="DEL")) is None
    assert (tmp_path / "verb").read_text() == "DEL\n"


def test_errors_pass_through(script: Script) -> None:
    """The plugin's own error object reaches the caller unchanged."""
    error = refused(script('echo \'{"code":117,"msg":"full","details":"all of it"}\'; exit 3'))

    assert (error.number, error.msg, error.details) == (117, "full", "all of it")


@pytest.mark.parametrize(
    ("body", "number", "text"),
    [
        ("exit 3", 5, "exited with 3"),
        ("echo oops >&2; exit 1", 5, "oops"),
        ("kill -9 $$", 5, "was killed by SIGKILL"),
        ("echo null", 5, "gave no result"),
        ("true", 5, "gave no result"),
        ("echo OK", 6, "gave no usable result"),
        ('echo \'{"ips":[{"address":"x"}]}\'', 6, "result.ips[0].address"),
        ("head -c 2000000 /dev/zero", 5, "more than 1048576 bytes"),
    ],
)
def test_bad_plugins(script: Script, body: str, number: int, text: str) -> None:
    """Whatever a plugin does wrong is an error that names it."""
    error = refused(script(body))

    assert error.number == number
    assert text in str(error)


def test_stderr_is_bounded(script: Script) -> None:
    """A chatty plugin costs a bounded amount of memory and still works."""
    noise: list[str] = []
    wanted = script("head -c 300000 /dev/zero | tr '\\0' x >&2; echo '{}'")

    assert asyncio.run(run(wanted, log=noise.append)) == Result()
    assert len(noise[0]) == MAX_STDERR


def test_a_plugin_may_ignore_stdin(script: Script) -> None:
    """A plugin that ends without reading a large stdin is no error."""
    small = script("exec <&-; echo '{}'")
    body = json.loads(small.raw_stdin)
    body["padding"] = "x" * 500_000
    large = parse(small.env, json.dumps(body).encode())

    assert asyncio.run(run(large)) == Result()


def test_timeout_kills_the_whole_group(script: Script, tmp_path: Path) -> None:
    """After the time is over neither the plugin nor its children live, and the error is 11."""
    wanted = script(f"sleep 1000 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/self; wait")
    error = refused(wanted, timeout_s=0.5)

    assert error.number == 11
    assert gone(int((tmp_path / "child").read_text()))
    assert gone(int((tmp_path / "self").read_text()))


def test_cancellation_kills_the_plugin(script: Script, tmp_path: Path) -> None:
    """A cancelled call returns at once, and only when the plugin is gone."""
    os.mkfifo(tmp_path / "ready")
    wanted = script(f"echo $$ > {tmp_path}/ready; exec sleep 1000")

    async def cancelled() -> int:
        task = asyncio.ensure_future(run(wanted))
        pid = int(await asyncio.to_thread((tmp_path / "ready").read_text))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pid

    assert gone(asyncio.run(cancelled()))


def test_the_namespace_surrounds_the_start_only(script: Script) -> None:
    """The context manager is entered in a worker thread, once, and left before the plugin ends."""
    seen: list[str] = []

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    async def both() -> None:
        await run(script("read _; echo '{}'"), namespace=entered)

    asyncio.run(both())
    assert seen == ["in", "out"]


@pytest.mark.netns
def test_the_plugin_runs_in_the_callers_namespace(script: Script, tmp_path: Path) -> None:
    """With the daemon's own context manager the plugin is in that namespace, and our loop never is."""
    name = f"pwdlg{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        wanted = script(f"stat -Lc %i /proc/self/ns/net > {tmp_path}/inode; echo '{{}}'")
        asyncio.run(run(wanted, namespace=lambda: entered(fd)))
        assert int((tmp_path / "inode").read_text()) == os.fstat(fd).st_ino
        assert Path("/proc/self/ns/net").stat().st_ino != os.fstat(fd).st_ino
        os.close(fd)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_no_descriptors_are_lost(script: Script) -> None:
    """Good, failing and slow plugins leave no descriptor behind."""
    wanted, failing = script("echo '{}'"), "exit 1"
    asyncio.run(run(wanted))
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the numbers are what counts
    asyncio.run(run(wanted))
    refused(script(failing))
    refused(script("exec sleep 1000"), timeout_s=0.1)

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(
    ("name", "path", "number"),
    [
        ("fake", (), 4),
        ("a/b", ("/x",), 7),
        ("..", ("/x",), 7),
        ("", ("/x",), 7),
        ("fake", ("/nonexistent",), 7),
    ],
)
def test_find_plugin_refuses(name: str, path: tuple[str, ...], number: int) -> None:
    """No path is 4; a name with a slash and one that is nowhere are 7."""
    with pytest.raises(CniError) as caught:
        find_plugin(name, path)
    assert caught.value.number == number


def test_find_plugin_wants_a_regular_file(tmp_path: Path) -> None:
    """Directories and files that can't be executed are passed over."""
    for directory in ("a", "b", "c"):
        (tmp_path / directory).mkdir()
    (tmp_path / "a" / "p").mkdir()
    (tmp_path / "b" / "p").touch(0o644)
    (tmp_path / "c" / "p").touch(0o755)

    found = find_plugin("p", [str(tmp_path / one) for one in ("a", "b", "c")])
    assert found == tmp_path / "c" / "p"


@pytest.mark.skipif(
    not Path("/usr/lib/cni/host-local").exists(), reason="containernetworking-plugins not installed"
)
def test_host_local(tmp_path: Path) -> None:
    """The reference host-local gives an address, refuses a second one, and takes it back."""
    ipam: dict[str, object] = {
        "type": "host-local",
        "dataDir": str(tmp_path / "data"),
        "ranges": [[{"subnet": "10.1.2.0/24"}]],
    }
    wanted = request("/usr/lib/cni", ipam)
    got = asyncio.run(run(wanted))
    again = refused(wanted)
    asyncio.run(run(request("/usr/lib/cni", ipam, "DEL")))

    assert got is not None
    assert got.ips == (ResultIp(address="10.1.2.2/24", gateway="10.1.2.1"),)
    assert "duplicate allocation is not allowed" in again.msg
    assert not list((tmp_path / "data").glob("**/10.1.2.2"))
