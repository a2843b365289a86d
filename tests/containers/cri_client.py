"""A client of the Container Runtime Interface: what the kubelet says to containerd, over its socket."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import platform
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
from grpc_tools import protoc

from tests.deadline import wait_until
from tests.fix_containerd import PAUSE_IMAGE, Runtimes

PROTO = Path(__file__).with_name("cri.proto")
_CALL_WITHIN = 60.0  # seconds


class Cri:
    """Speaks to containerd in the box of ``runtimes``. Close it."""

    def __init__(self, runtimes: Runtimes) -> None:
        """Compile the messages, load the pause image, connect."""
        self._runtimes = runtimes
        self._m = _messages(runtimes.work / "proto")
        _load_image(runtimes)
        # A Unix socket's path has room for 107 bytes; /proc/PID/root leads into the box.
        self._channel = grpc.insecure_channel(f"unix:{runtimes.box.path('/run/containerd/containerd.sock')}")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, method: str, **fields: Any) -> Any:
        """Call a method of RuntimeService by name, with the request's fields as plain values."""
        request = getattr(self._m, f"{method}Request")(**fields)
        ask = self._channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(self._m, f"{method}Response").FromString,
        )

        def answer() -> Any:
            try:
                return ask(request, timeout=_CALL_WITHIN, wait_for_ready=True)
            except grpc.RpcError as error:
                # A containerd that was just started listens before it serves.
                if error.details() != "server is not initialized yet":
                    raise
                return None

        return wait_until(answer, _CALL_WITHIN, f"containerd to serve {method}")

    def pod(self, name: str, **config: Any) -> Pod:
        """RunPodSandbox. ``config`` are further fields of PodSandboxConfig."""
        full = {
            "metadata": {"name": name, "uid": f"uid-{name}", "namespace": "tests"},
            "hostname": name,
            "linux": {"cgroup_parent": f"/{self._runtimes.name}"},
            **config,
        }
        return Pod(self, full, self.call("RunPodSandbox", config=full).pod_sandbox_id)


class Pod:
    """A pod that runs."""

    def __init__(self, cri: Cri, config: dict[str, Any], pod_id: str) -> None:
        """Holds them."""
        self.cri = cri
        self.config = config
        self.id = pod_id

    def container(self, *command: str) -> str:
        """Create and start a container in it, from the pause image (a busybox); its id."""
        made = self.cri.call(
            "CreateContainer",
            pod_sandbox_id=self.id,
            config={"metadata": {"name": "main"}, "image": {"image": PAUSE_IMAGE}, "command": command},
            sandbox_config=self.config,
        )
        self.cri.call("StartContainer", container_id=made.container_id)
        return str(made.container_id)

    def exec(self, container: str, *command: str) -> tuple[int, str]:
        """Run a command in one of its containers; (exit status, output)."""
        done = self.cri.call("ExecSync", container_id=container, cmd=command, timeout=20)
        return done.exit_code, (done.stdout + done.stderr).decode()

    def ips(self) -> list[str]:
        """The addresses that the runtime knows."""
        network = self.cri.call("PodSandboxStatus", pod_sandbox_id=self.id).status.network
        return [network.ip, *(one.ip for one in network.additional_ips)]

    def stop(self) -> None:
        """StopPodSandbox, which is the CNI DEL; may be repeated."""
        self.cri.call("StopPodSandbox", pod_sandbox_id=self.id)

    def remove(self) -> None:
        """RemovePodSandbox."""
        self.cri.call("RemovePodSandbox", pod_sandbox_id=self.id)


def _messages(folder: Path) -> ModuleType:
    """Compile cri.proto and import the result; once in a process, as protobuf wants it."""
    name = "pwt_cri_pb2"
    if name in sys.modules:
        return sys.modules[name]
    folder.mkdir()
    source = folder / "pwt_cri.proto"
    source.write_text(PROTO.read_text())
    assert protoc.main(["protoc", f"-I{folder}", f"--python_out={folder}", str(source)]) == 0
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def _load_image(runtimes: Runtimes) -> None:
    """Import the pause image: one layer with busybox, which sleeps (OCI image layout 1.0)."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for entry in sorted(runtimes.rootfs.rglob("*")):
            tar.add(entry, str(entry.relative_to(runtimes.rootfs)), recursive=False)
    image = _Layout()
    diff = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64"),
        "os": "linux",
        "config": {"Entrypoint": ["/bin/sleep", "100000"], "Env": ["PATH=/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": image.blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode()),
        "layers": [image.blob("application/vnd.oci.image.layer.v1.tar", layer.getvalue())],
    }
    described = image.blob(str(manifest["mediaType"]), json.dumps(manifest).encode())
    described["annotations"] = {"io.containerd.image.name": PAUSE_IMAGE}
    image.file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    image.file("index.json", json.dumps({"schemaVersion": 2, "manifests": [described]}).encode())
    image.tar.close()
    runtimes.box.path("/opt/pause.tar").write_bytes(image.raw.getvalue())
    runtimes.run("ctr", "-n", "k8s.io", "images", "import", "--all-platforms", "/opt/pause.tar")


class _Layout:
    """An OCI image layout as a tar in memory."""

    def __init__(self) -> None:
        self.raw = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.raw, mode="w")  # noqa: SIM115 - closed by its user

    def file(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def blob(self, kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        self.file(f"blobs/sha256/{digest}", data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}
