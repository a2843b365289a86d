"""Sandboxes that stand for pods: a namespace each, held by a descriptor alone, and a port with the addresses.

The port carries the pod's identity as CNI would give it, so that the daemon lends it the labels and named
ports of the Pod manifest of that name.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from portwright.api.client import Client
from portwright.kernel import private
from portwright.live.ears import Place
from portwright.model.errors import InvalidInput
from portwright.model.network import GATEWAY4, GATEWAY6, AddressRange
from portwright.policy.rules import Endpoint

#: What CNI's Kubernetes arguments become (docs/cni.md).
_POD_NAME, _POD_NAMESPACE = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"
#: A network's ranges are as wide as this around the pods' addresses: few of them, and no pod's is the first.
_WIDTH = {4: 8, 6: 16}
_GATEWAY = {4: GATEWAY4, 6: GATEWAY6}


class Sandboxes:
    """What a daemon was asked to make for pods. ``places``: where each address is."""

    def __init__(self, client: Client, addresses: Iterable[str]) -> None:
        """``addresses``: all that pods may ever have here. Makes networks for them that reach each other.

        Raises InvalidInput for an address that no sandbox can have.
        """
        self._client = client
        self.places: dict[str, Place] = {}
        self._made: dict[tuple[str, str], tuple[Endpoint, Place]] = {}
        ranges: dict[int, tuple[AddressRange, ...]] = {}
        parsed = [ipaddress.ip_address(address) for address in addresses]
        for version, width in _WIDTH.items():
            around = {
                ipaddress.ip_network((address, width), strict=False)
                for address in parsed
                if address.version == version
            }
            if around:
                ranges[version] = tuple(
                    AddressRange(subnet=str(net), gateway=_GATEWAY[version])
                    for net in sorted(around, key=str)
                )
        for versions in ((4,), (6,), (4, 6)):
            if all(version in ranges for version in versions):
                pools = [ranges[version] for version in versions]
                client.network_create(_network(versions), ranges=pools, reach=["*"])

    @classmethod
    def of(cls, client: Client, pods: Sequence[Endpoint], progress: Callable[[str], None]) -> Self:
        """A sandbox for each pod."""
        made = cls(client, {address for pod in pods for address in pod.addresses})
        for count, pod in enumerate(pods):
            progress(f"{count:,} of {len(pods):,} sandboxes")
            made.add(pod)
        return made

    def be(self, pods: Iterable[Endpoint]) -> None:
        """Make these, and no others, the pods that there are; those that are there already stay."""
        wanted = {(pod.namespace, pod.name): pod for pod in pods}
        for key, (pod, _) in list(self._made.items()):
            if key not in wanted or wanted[key].addresses != pod.addresses:
                self._remove(key)
        for key, pod in wanted.items():
            if key not in self._made:
                self.add(pod)

    def add(self, pod: Endpoint) -> Place:
        """Make a pod's sandbox and port. Raises InvalidInput for two addresses of a family, or none."""
        versions = tuple(sorted(ipaddress.ip_address(address).version for address in pod.addresses))
        if versions not in {(4,), (6,), (4, 6)}:
            why = "a pod has an address, and one of each family at most (status.podIPs)"
            raise InvalidInput(f"Pod {pod.title}", ", ".join(pod.addresses), why)
        fd = private.new_netns()
        try:
            port = self._client.port_create(
                _network(versions),
                fd,
                ips=list(pod.addresses),
                labels={_POD_NAMESPACE: pod.namespace, _POD_NAME: pod.name},
            )
        except BaseException:
            os.close(fd)
            raise
        place = Place(fd, port.port_id)
        self._made[pod.namespace, pod.name] = pod, place
        self.places.update(dict.fromkeys(pod.addresses, place))
        return place

    def _remove(self, key: tuple[str, str]) -> None:
        pod, place = self._made.pop(key)
        for address in pod.addresses:
            self.places.pop(address, None)
        try:
            self._client.port_delete(place.port_id)
        finally:
            os.close(place.netns)

    def close(self) -> None:
        """Delete the ports and let go of the namespaces."""
        for key in list(self._made):
            self._remove(key)


def _network(versions: tuple[int, ...]) -> str:
    return "live" + "".join(map(str, versions))
