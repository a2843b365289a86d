"""``python -m demo``: two real containers, on ports that the host counts, guards and can question.

As root; 30 seconds at most. Exit status: 0 if every step's check held, else 1.

The machine's own configuration stays as it is: everything runs in a box (demo/box.py), whose network
namespace plays the host, and in it a namespace "world" that plays what is outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from demo.box import Box, make_rootfs, remove_cgroups
from demo.story import Failed, Story

NAME = f"pw{os.getpid()}"
"""containerd's namespace, and so a word in what it makes on the machine; short, for the tables."""
ROOTFS = "/opt/rootfs"
CONFLIST = "/etc/cni/net.d/10-portwright-demo.conflist"
PAGE = "hello from web\n"
BLOB = 4 << 20  # bytes that the counters are compared with
PINGS, PING_SIZE = 10, 1000


def main() -> int:
    """Run the demo; its exit status."""
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f"pw-demo-{NAME}-"))
    try:
        env = {"CONTAINERD_NAMESPACE": NAME, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        box = Box(work, env=env)
        story = Story(box)
        try:
            Demo(story, work).play()
        except (Failed, subprocess.TimeoutExpired) as error:
            print(f"\ndemo: FAILED: {error}", file=sys.stderr)
            for log in ("daemon.log", "containerd.log", "web.log", "client.log"):
                if (work / log).exists():
                    print(f"\n--- end of {log}\n{(work / log).read_text()[-1500:]}", file=sys.stderr)
            return 1
        finally:
            box.close()
            remove_cgroups(NAME)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    left = machine()
    try:
        story.check(
            not left, "no namespace, mount, cgroup, folder or process of the demo is left on this machine"
        )
    except Failed as error:
        print(f"demo: FAILED: {error}: {sorted(left)}", file=sys.stderr)
        return 1
    print(f"\nAll {story.checks} checks held, in {time.monotonic() - began:.1f} s.")
    return 0


class Count(NamedTuple):
    """Packets and bytes."""

    packets: int
    bytes: int

    def __sub__(self, then: Count) -> Count:
        return Count(self.packets - then.packets, self.bytes - then.bytes)

    def __str__(self) -> str:
        return f"{self.packets} packets, {self.bytes} bytes"


class Traffic(NamedTuple):
    """From the container's view."""

    sent: Count
    received: Count

    def __sub__(self, then: Traffic) -> Traffic:
        return Traffic(self.sent - then.sent, self.received - then.received)


class Demo:
    """The steps, in order."""

    def __init__(self, story: Story, work: Path) -> None:
        """Nothing runs yet."""
        self.story = story
        self.box = story.box
        self.work = work
        rootfs = make_rootfs(self.box.path(ROOTFS))
        (rootfs / "www/index.html").write_text(PAGE)
        (rootfs / "www/blob").write_bytes(os.urandom(BLOB))
        self.ports: dict[str, Any] = {}

    def play(self) -> None:
        """All steps. Raises Failed at the first check that does not hold."""
        print(
            "Portwright's first few minutes. Every command below is real, and is what you would type on\n"
            "your own host. Here they run in namespaces of their own: this machine keeps its configuration."
        )
        self.make_world()
        links = self.links()
        self.start_daemon()
        self.start_containers()
        self.talk()
        self.publish()
        self.count()
        self.spoof()
        self.explain()
        self.clean(links)

    # -- the host --------------------------------------------------------------------------------

    def make_world(self) -> None:
        """The uplink, and somebody behind it."""
        self.story.step(
            "A host with an uplink",
            """A namespace plays this host; its uplink up0 leads to a second one, "world": the outside.""",
        )
        for command in (
            "ip netns add world",
            "ip link add up0 type veth peer name w0 netns world",
            "ip addr add 192.0.2.2/24 dev up0",
            "ip addr add 2001:db8::2/64 dev up0 nodad",
            "ip link set up0 up",
            "ip -n world addr add 192.0.2.1/24 dev w0",
            "ip -n world addr add 2001:db8::1/64 dev w0 nodad",
            "ip -n world link set w0 up",
            "ip -n world link set lo up",
            "ip route add default via 192.0.2.1",
            "ip -6 route add default via 2001:db8::1",
        ):
            self.story.run(command, show=False)
        out = self.story.run("ip -brief address show up0")
        self.story.check("192.0.2.2/24" in out, "the host has an uplink, in both address families", out)

    def start_daemon(self) -> None:
        """Portwright's daemon, a network, the CNI plugin."""
        self.story.step(
            "Portwright's daemon, a network, and the CNI plugin",
            """One daemon owns all ports. A network is what ports join. "install" puts the plugin and the
            network's list where container runtimes look for them: /opt/cni/bin and /etc/cni/net.d.""",
        )
        self.story.say_command("portwright node run &")
        self.box.start("portwright", "node", "run", log=self.work / "daemon.log")
        self.story.wait("the daemon", self.story.succeeds("portwright node status"))
        self.story.run("portwright network create demo --subnet 10.88.0.0/24 --subnet fd88::/64 --masquerade")
        self.story.run("portwright install --network demo")
        self.story.check(self.box.path(CONFLIST).exists(), "runtimes will find the network 'demo'")

    def start_containers(self) -> None:
        """Two containers by containerd's own client, each with a port."""
        story = self.story
        story.step(
            "Two containers, started by containerd",
            f"""The root file system is one static busybox. "web" serves /www over HTTP, and its list
            publishes it at the host's port 8080 (ctr has no option; podman -p and Kubernetes' hostPort do).
            "client" even gets CAP_NET_ADMIN: we will see how far that takes it. ({CONFLIST})""",
        )
        story.say_command("containerd &")
        self.box.start("containerd", log=self.work / "containerd.log")
        story.wait("containerd", story.succeeds("ctr version"))
        conflist = self.box.path(CONFLIST)
        plain = conflist.read_text()
        body = json.loads(plain)
        body["plugins"][0]["portMappings"] = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
        replace(conflist, json.dumps(body, indent=2))
        self.container("web", "httpd -f -h /www")
        replace(conflist, plain)
        self.container("client", "sleep 600", options="--cap-add CAP_NET_ADMIN ")
        story.run("ctr task list")
        out = story.run("portwright port list")
        story.check(
            out.count("attached") == 2, "each container has a port, and the host its representor", out
        )

    def container(self, name: str, command: str, options: str = "") -> None:
        """Start one in the background, and wait for its port."""
        known = {port["port_id"] for port in self.port_list()}
        run = f"ctr run --rm --cni {options}--env PATH=/bin --rootfs {ROOTFS} {name} {command}"
        self.story.say_command(f"{run} &")
        self.box.start(*run.split(), log=self.work / f"{name}.log")

        def attached() -> Any:
            new = [p for p in self.port_list() if p["port_id"] not in known and p["state"] == "attached"]
            return new[0] if new else None

        self.ports[name] = self.story.wait(f"the port of {name}", attached)

        def running() -> bool:
            return bool(re.search(rf"(?m)^{name}\s.*RUNNING", self.story.run("ctr task list", show=False)))

        self.story.wait(f"{name} to run", running)

    # -- traffic ---------------------------------------------------------------------------------

    def talk(self) -> None:
        """HTTP between the containers."""
        self.story.step("HTTP from container to container, over IPv4 and IPv6")
        for url in (f"http://{self.ip('web', 4)}/", f"http://[{self.ip('web', 6)}]/"):
            out = self.read("client", f"wget -q -O - {url}")
            self.story.check(out == PAGE.rstrip(), f"web answers at {url}", out)
        for address in ("192.0.2.1", "2001:db8::1"):
            self.client(f"ping -c 1 -W 2 {address}", show=False)
        self.story.check(True, "client reaches the world outside as well (ping 192.0.2.1 and 2001:db8::1)")

    def publish(self) -> None:
        """The published port, from outside and from the host."""
        self.story.step(
            "The host's port 8080, mapped to web", "Asked from the world outside, and from the host."
        )
        for where, url in (
            ("ip netns exec world ", "http://192.0.2.2:8080/"),
            ("ip netns exec world ", "http://[2001:db8::2]:8080/"),
            ("", "http://192.0.2.2:8080/"),
            ("", "http://127.0.0.1:8080/"),
        ):
            out = self.story.run(f"{where}curl -sS --max-time 5 {url}")
            self.story.check(
                out == PAGE.rstrip(), f"web answers {'the world' if where else 'the host'} at {url}", out
            )

    def count(self) -> None:
        """What the representors counted, beside what was sent."""
        story = self.story
        story.step(
            "The representors count what the containers send",
            f"""First {PINGS} pings of {PING_SIZE} bytes in each family, whose size on the wire is known. Then
            {BLOB >> 20} MiB over HTTP. Each time, the representor's count in the host is compared with the
            device's own count inside of the container (which also sends a few packets of its own, such as
            neighbour discovery).""",
        )
        start = self.counters("client")
        for family in (4, 6):
            self.client(f"ping -q -c {PINGS} -i 0.05 -s {PING_SIZE} {self.ip('web', family)}")
        device, counted = (now - then for now, then in zip(self.counters("client"), start, strict=True))
        # Ethernet 14, IPv4 20 or IPv6 40, ICMP echo 8 (RFC 792, RFC 4443)
        wire = PINGS * ((14 + 20 + 8 + PING_SIZE) + (14 + 40 + 8 + PING_SIZE))
        story.check(
            device.sent == counted.sent and wire <= counted.sent.bytes < 1.1 * wire,
            f"from_port: pings of {wire} bytes; client's device sent {device.sent}, counted {counted.sent}",
            f"device {device.sent}, representor {counted.sent}",
        )
        story.check(
            device.received == counted.received and wire <= counted.received.bytes < 1.1 * wire,
            f"to_port: as many back; client's device received {device.received}, counted {counted.received}",
            f"device {device.received}, representor {counted.received}",
        )
        start = self.counters("web")
        self.client(f"wget -q -O /dev/null http://{self.ip('web', 4)}/blob")
        self.client(f"wget -q -O /dev/null http://[{self.ip('web', 6)}]/blob")
        device, counted = (now - then for now, then in zip(self.counters("web"), start, strict=True))
        story.check(
            device.sent.bytes == counted.sent.bytes and 2 * BLOB < counted.sent.bytes < 2.1 * BLOB,
            f"from_port: {2 * BLOB} bytes of HTTP body; web's device sent {device.sent.bytes} bytes,"
            f" counted {counted.sent.bytes} bytes",
            f"device {device.sent}, representor {counted.sent}",
        )
        story.run("portwright stats")

    def spoof(self) -> None:
        """A packet with a false source."""
        story = self.story
        story.step(
            "A spoofed packet",
            """client, root with CAP_NET_ADMIN, gives itself another address and sends from it. No address
            but the port's own gets past its representor.""",
        )
        self.client("ip addr add 10.88.0.99/32 dev eth0")
        out = self.client(f"ping -c 2 -i 0.1 -W 1 -I 10.88.0.99 {self.ip('web', 4)}", fails=True)
        story.check("0 packets received" in out, "no answer comes back", out)
        out = story.run("portwright drops")
        rows = json.loads(story.run("portwright drops --json", show=False))
        mine = [
            r for r in rows if r["port_id"] == self.ports["client"]["port_id"] and r["reason"] == "src_ip"
        ]
        story.check(
            bool(mine) and mine[0]["direction"] == "from_port" and mine[0]["packets"] == 2,
            "both packets were dropped at client's port, with their reason: src_ip",
            out,
        )
        self.client("ip addr del 10.88.0.99/32 dev eth0")

    def explain(self) -> None:
        """``why`` for a packet that passes and for one that does not."""
        story = self.story
        story.step(
            "Ask why",
            """"why" makes the packet, hands it to the very program and maps that real packets meet, and says
            what happened, step by step. First client to web; then to a sandbox on another network, made by
            hand: networks don't reach each other unless they say so.""",
        )
        client, web = (self.ports[name]["port_id"] for name in ("client", "web"))
        out = story.run(f"portwright why {client[:8]} {web[:8]} --dport 80")
        story.check("verdict: allowed" in out, "client to web is allowed", out)
        story.run("portwright network create secret --subnet 10.99.0.0/24 --subnet fd99::/64", show=False)
        story.run("ip netns add vault")
        story.run("portwright port create --network secret --netns vault --name vault --json", show=False)
        out = story.run(f"portwright why {client[:8]} vault --dport 80")
        story.check("verdict: refused" in out and "isolation" in out, "client to vault is refused", out)
        vault = json.loads(story.run("portwright port show vault --json", show=False))
        self.client(f"ping -c 1 -W 1 {vault['addresses'][0]['address']}", fails=True)
        story.check(True, "and so is a real packet")

    # -- the end ---------------------------------------------------------------------------------

    def clean(self, links: set[str]) -> None:
        """Containers, ports, daemon: all gone."""
        story = self.story
        story.step("Everything gone again", "The runtime's DEL takes a port with its container.")
        for name in ("client", "web"):
            story.run(f"ctr task kill --signal SIGKILL {name}")
        story.wait("the containers' ports to go", lambda: len(self.port_list()) == 1)
        story.run("portwright port delete vault")
        story.run("ip netns del vault")
        out = story.run("portwright port list --json")
        story.check(json.loads(out) == [], "no port is on record", out)
        for name in ("demo", "secret"):
            story.run(f"portwright network delete {name}")
        story.run("portwright node stop")
        story.wait("the namespaces' devices to go", lambda: self.links() == links)
        story.check(True, f"the host has the links that it began with: {', '.join(sorted(links))}")
        tables = story.run("nft list tables", show=False)
        story.check("portwright" not in tables, "no nftables table is left", tables)
        mounts = story.run("cat /proc/mounts", show=False)
        story.check("/run/portwright/bpf" not in mounts, "no pinned BPF program or map is left", mounts)

    # -- questions -------------------------------------------------------------------------------

    def client(self, command: str, *, fails: bool = False, show: bool = True) -> str:
        """Run a command in the container client."""
        return self.story.run(f"ctr task exec --exec-id x client {command}", fails=fails, show=show)

    def read(self, name: str, command: str, *, show: bool = True) -> str:
        """What a command in a container says that is never silent: ctr may lose it, and is asked again."""
        command = f"ctr task exec --exec-id x {name} {command}"
        return next(filter(None, (self.story.run(command, show=show) for _ in range(5))), "")

    def port_list(self) -> list[Any]:
        """The daemon's ports."""
        found = json.loads(self.story.run("portwright port list --json", show=False))
        assert isinstance(found, list)  # noqa: S101 - for mypy
        return found

    def ip(self, name: str, family: int) -> str:
        """A container's address."""
        return next(
            str(a["address"]) for a in self.ports[name]["addresses"] if (":" in a["address"]) == (family == 6)
        )

    def counters(self, name: str) -> tuple[Traffic, Traffic]:
        """(what the container's device counted, what its representor counted), at one moment."""

        def at_rest() -> tuple[Traffic, Traffic] | None:
            device = self.device(name)
            counted = self.representor(name)
            return (device, counted) if device == self.device(name) else None

        return self.story.wait(f"{name} to be quiet for a moment", at_rest)

    def representor(self, name: str) -> Traffic:
        """Totals of a container's port."""
        port_id = self.ports[name]["port_id"]
        found = json.loads(self.story.run(f"portwright stats {port_id} --json", show=False))[0]
        return Traffic(*(Count(**found[way]["total"]) for way in ("from_port", "to_port")))

    def device(self, name: str) -> Traffic:
        """The same, of the device inside of it."""
        text = self.read(name, "cat /proc/net/dev", show=False)
        found = re.search(r"eth0:\s*(.*)", text)
        assert found  # noqa: S101 - the kernel's format: eight columns received, eight sent
        columns = [int(word) for word in found[1].split()]
        return Traffic(Count(columns[9], columns[8]), Count(columns[1], columns[0]))

    def links(self) -> set[str]:
        """Names of the host's links."""
        found = json.loads(self.story.run("ip -json link show", show=False))
        return {link["ifname"] for link in found}


def replace(path: Path, text: str) -> None:
    """Replace a file in one step: containerd reads the folder at any moment."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def machine() -> set[str]:
    """What carries the demo's name on the machine: all that it could leave there."""
    netns = Path("/run/netns")
    found = {f"namespace {p.name}" for p in netns.iterdir()} if netns.is_dir() else set()
    found |= {f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines()}
    found |= {f"cgroup {p}" for depth in ("*", "*/*") for p in Path("/sys/fs/cgroup").glob(depth)}
    found |= {f"folder {p}" for p in Path(tempfile.gettempdir()).iterdir()}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                env = (folder / "environ").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.add(f"process {folder.name} {env}")
    return {text for text in found if re.search(rf"\b{NAME}\b", text)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted; everything is gone again")
