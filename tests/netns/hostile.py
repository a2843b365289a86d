"""A daemon under attack: what it had before, how to attack it, and what must hold afterwards."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from portwright.cni.errors import CniCode
from tests.deadline import PATIENCE, wait_until
from tests.faults.audit import audit
from tests.fix_daemon import Daemon, Sandbox, make_world
from tests.fix_netns import TestNetns

CALM = "calm"
#: What all the attacks of one test may leave the daemon's memory larger by: the allocator's slack.
MEMORY = 24 << 20
#: Descriptors that come and stay: the sockets that the reaper keeps for deletions at once (kernel/reaper.py).
KEPT = 8
#: The same for all tests together.
MEMORY_IN_ALL = 128 << 20

Json = dict[str, Any]


class Answer(NamedTuple):
    """What the shim printed and how it ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> Json:
        """The error object; AssertionError if stdout is not exactly one that is well made."""
        body = json.loads(self.stdout)
        assert isinstance(body, dict), self.stdout[:500]
        assert {"cniVersion", "code", "msg"} <= set(body) <= {"cniVersion", "code", "msg", "details"}, body
        assert isinstance(body["code"], int), body
        assert body["msg"], body
        assert len(self.stdout) < 40_000, len(self.stdout)
        return body


class Target:
    """A daemon with two ports that nobody attacks, and one namespace for attackers to use."""

    def __init__(self, stack: ExitStack) -> None:
        """Start everything; ``stack`` ends it."""
        self._stack = stack
        self.most_fds = self.most_memory = 0
        world, self.host = self.namespace(), self.namespace()
        make_world(self.host, world)
        self.daemon = Daemon(self.host, Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-")))
        stack.callback(self.daemon.close)
        self.daemon.start()
        self.daemon.install()
        self.victim = self.namespace()
        with self.daemon.client() as client:
            client.network_create(CALM, subnets=["10.99.0.0/24", "fd00:99::/64"])
            one, two = self.namespace(), self.namespace()
            self.calm = [Sandbox(ns, client.port_create(CALM, ns.path, name=ns.name)) for ns in (one, two)]
        assert self.calm[0].ping(self.calm[1].ip4)

    def clean(self) -> None:
        """Take away what a failed test left, so that it does not fail the others too."""
        calm = {sandbox.port.port_id for sandbox in self.calm}
        with self.daemon.client() as client:
            for port in client.port_list():
                if port.port_id not in calm:
                    client.port_delete(port.port_id)
            for network in client.network_list():
                if network.name != CALM:
                    client.network_delete(network.name)

    def namespace(self) -> TestNetns:
        """A fresh one, closed at the end."""
        made = TestNetns(f"pwt-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        self._stack.callback(made.close)
        return made

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self.daemon.process is not None
        children = Path(f"/proc/{self.daemon.process.pid}/task/{self.daemon.process.pid}/children")
        # nsenter --net executes the daemon in its own place.
        return (
            int(children.read_text().split()[0]) if children.read_text().split() else self.daemon.process.pid
        )

    def fds(self) -> int:
        """How many descriptors the daemon has open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def memory(self) -> int:
        """The daemon's resident set, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def shim(
        self,
        command: str,
        stdin: bytes,
        *,
        env: Mapping[str, str | bytes] | None = None,
        netns: str | None = None,
        timeout: float = 60,
    ) -> Answer:
        """Run the installed plugin as a runtime would, in the host's namespace."""
        variables: dict[bytes, bytes] = {
            b"CNI_COMMAND": command.encode(),
            b"CNI_CONTAINERID": b"evil",
            b"CNI_IFNAME": b"eth0",
            b"CNI_NETNS": (self.victim.path if netns is None else netns).encode(),
            b"CNI_PATH": f"{self.daemon.bin_dir}:/usr/lib/cni".encode(),
        }
        for key, value in (env or {}).items():
            variables[key.encode()] = value if isinstance(value, bytes) else value.encode()
        done = subprocess.run(
            ["/usr/bin/nsenter", f"--net={self.host.path}", "--", str(self.daemon.bin_dir / "portwright")],
            env=variables,
            input=stdin,
            capture_output=True,
            check=False,
            timeout=timeout * PATIENCE,
        )
        return Answer(done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace"))

    def add(self, conf: Json | bytes, **options: Any) -> Answer:
        """ADD with a configuration; a dict is written as JSON."""
        return self.shim("ADD", as_bytes(conf), **options)

    def delete(self, conf: Json | bytes, **options: Any) -> Answer:
        """DEL likewise."""
        return self.shim("DEL", as_bytes(conf), **options)

    @contextmanager
    def unharmed(self, memory: int = MEMORY) -> Iterator[None]:
        """After the block the daemon is the same process, has what it had, and works.

        Its descriptors and memory are bounded by what they were; record and kernel agree; the log
        has no traceback; ports and links are those from before; other ports pass packets.
        """
        pid, resident = self.pid, self.memory()
        # Of the first attack for all of them, or a slow leak would pass one test after the other.
        self.most_fds = self.most_fds or self.fds() + KEPT
        self.most_memory = self.most_memory or resident + MEMORY_IN_ALL
        links, ports, told = self._links(), self._ports(), self._log_size()
        try:
            yield
            self._check(pid, resident + memory, links, ports, told)
        finally:
            self.clean()

    def _check(self, pid: int, memory: int, links: set[str], ports: set[str], told: int) -> None:
        assert self.daemon.process is not None
        assert self.daemon.process.poll() is None, self.daemon.tail()
        assert self.pid == pid
        wait_until(lambda: self.fds() <= self.most_fds, 40, f"at most {self.most_fds} descriptors")
        log = self.daemon.log.read_bytes()[told:].decode(errors="replace")
        assert "Traceback" not in log, log[-4000:]
        assert self._ports() == ports, (self._ports(), ports)
        assert self._links() == links, (self._links(), links)
        with self.daemon.client() as client:
            status = client.node_status()
        assert status.ready, status
        problems = audit(self.daemon)
        assert not problems, problems
        memory = min(memory, self.most_memory)
        assert self.memory() < memory, f"{self.memory() >> 20} MiB, not {memory >> 20}"
        assert self.calm[0].ping(self.calm[1].ip4)
        assert self.calm[1].ping(self.calm[0].ip6)

    def _links(self) -> set[str]:
        out = self.host.run(["ip", "-o", "link", "show"]).stdout
        return {line.split(":")[1].strip() for line in out.splitlines()}

    def _ports(self) -> set[str]:
        with self.daemon.client() as client:
            return {port.port_id for port in client.port_list()}

    def _log_size(self) -> int:
        return self.daemon.log.stat().st_size


@contextmanager
def target() -> Iterator[Target]:
    """A target, and its end."""
    with ExitStack() as stack:
        yield Target(stack)


def fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every field in ``value``, its containers too."""
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(below, (dict, list)):
            yield from fields(below, (*path, key))


def replaced(base: Json, path: tuple[str | int, ...], value: Any) -> Json:
    """A copy of ``base`` with ``value`` at ``path``."""
    made: Any = copy.deepcopy(base)
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return made  # type: ignore[no-any-return]


def as_bytes(conf: Json | bytes) -> bytes:
    """The configuration as stdin; lone surrogates are written as escapes, as an attacker would."""
    return conf if isinstance(conf, bytes) else json.dumps(conf).encode()


#: Codes that a caller may be given for what it sent: all but those that call it our bug.
REFUSALS = {int(code) for code in CniCode} - {int(CniCode.INTERNAL), int(CniCode.KERNEL_TOO_OLD)}
