"""Our plugin behind another one, for a microVM: which devices get a tap, what is refused, what is answered.

The result is shaped as consumers of tc-redirect-tap read it (firecracker-go-sdk's vmconf, which Firecracker's
containerd plugin uses too): they look for the interface whose ``sandbox`` is the container's id, take MAC and
addresses from it, and the tap of its name from the other one. docs/cni.md, "Behind another plugin".
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from portwright.attach import tcfilter
from portwright.cni.config import NetConf
from portwright.cni.errors import CniCode, CniError, unsupported
from portwright.cni.request import CniRequest, check_ifname
from portwright.cni.requested import TAP_ARGS
from portwright.cni.result import Result, ResultInterface, ResultIp
from portwright.cni.version import at_least
from portwright.model.errors import InvalidInput
from portwright.model.port import Chained, Limits
from portwright.node.chain import Wish

#: Devices of one attachment: more than any guest has NICs (vmm/spec.py).
_MAX_DEVICES = 32
_MAX_ID = (1 << 32) - 2  # (uid_t) -1 is nobody's
_WAY_OUT = (
    "the device is another plugin's, nothing of ours holds it; leave it out, or use model tcfilter alone"
)


def is_chained(request: CniRequest, there: Sequence[str] = ()) -> bool:
    """Whether an ADD is for taps on another plugin's devices. ``there``: devices in the namespace.

    Raises InvalidInput for ``interfaces`` that nothing can come of.
    """
    conf = request.config
    if conf.model != tcfilter.MODEL or conf.prev_result is None:
        if conf.interfaces:
            why = "names devices of prevResult: put the plugin behind another one, with model tcfilter"
            raise InvalidInput("interfaces", list(conf.interfaces), why)
        if asked := [key for key in TAP_ARGS if key in request.args]:
            raise unsupported(f"CNI_ARGS.{asked[0]}", request.args[asked[0]], "only behind another plugin")
        return False
    return bool(conf.interfaces or _listed(request) or request.ifname in there)


def wish_of(request: CniRequest) -> Wish:
    """What an ADD asks for. Raises CniError 2 for what can't be held on another's device, InvalidInput."""
    conf = request.config
    if not at_least(conf.cni_version, "0.3.0"):
        raise InvalidInput(
            "cniVersion", conf.cni_version, "has no interfaces in its result; use 0.3.0 or newer"
        )
    _refuse_what_is_not_held(conf)
    devices = conf.interfaces or tuple(_listed(request)) or (request.ifname,)
    if len(devices) > _MAX_DEVICES:
        raise InvalidInput(
            "interfaces", len(devices), f"at most {_MAX_DEVICES} devices get a tap; name fewer"
        )
    for at, name in enumerate(devices):
        try:
            check_ifname(name)
        except CniError as error:
            raise InvalidInput(f"interfaces[{at}]", name, error.msg) from None
        if name in devices[:at]:
            raise InvalidInput(f"interfaces[{at}]", name, "is named twice")
    tap = request.args.get(TAP_ARGS[0], "")
    if tap:
        check_ifname(tap)
    return Wish(
        owner=request.owner(),
        netns=request.netns,
        devices=devices,
        queues=conf.queues,
        tap=tap,
        uid=_number(request, TAP_ARGS[1]),
        gid=_number(request, TAP_ARGS[2]),
        labels=conf.requested.labels,
    )


def result_of(request: CniRequest, made: Sequence[Chained], held: Sequence[tuple[str, str]]) -> Result:
    """``prevResult``, and behind it for each device its tap, the guest's card and the card's addresses.

    ``held``: (device, address without prefix) in the kernel, for addresses that name no interface.
    """
    prev = request.config.prev_result or Result()
    interfaces = list(prev.interfaces)
    # An index that points nowhere is no index: consumers look it up without a look at the length.
    places = range(len(interfaces))
    ips = [ip if ip.interface in places else msgspec.structs.replace(ip, interface=None) for ip in prev.ips]
    for one in made:
        port = one.port
        interfaces.append(ResultInterface(name=port.tap, mtu=port.mtu, sandbox=request.netns))
        card = len(interfaces)
        interfaces.append(
            ResultInterface(name=port.tap, mac=port.mac, mtu=port.mtu, sandbox=request.container_id)
        )
        ips += [
            msgspec.structs.replace(ip, interface=card)
            for ip in prev.ips
            if _device_of(request, prev, ip, made, held) == port.ifname
        ]
    return Result(interfaces=tuple(interfaces), ips=tuple(ips), routes=prev.routes, dns=prev.dns)


def _device_of(
    request: CniRequest,
    prev: Result,
    ip: ResultIp,
    made: Sequence[Chained],
    held: Sequence[tuple[str, str]],
) -> str:
    """The device of the sandbox that an address of prevResult is on; '' for none of them."""
    if ip.interface is not None and 0 <= ip.interface < len(prev.interfaces):
        named = prev.interfaces[ip.interface]
        return named.name if _is_inside(request, named) else ""
    bare = ip.address.partition("/")[0]
    for device, address in held:
        if address == bare:
            return device
    return made[0].port.ifname if len(made) == 1 else ""


def _listed(request: CniRequest) -> dict[str, None]:
    """The names of prevResult's devices in the sandbox, in order."""
    prev = request.config.prev_result or Result()
    return {one.name: None for one in prev.interfaces if _is_inside(request, one)}


def _is_inside(request: CniRequest, one: ResultInterface) -> bool:
    """Whether an interface is a device in the caller's namespace: not the host's, not a guest's card."""
    if not one.sandbox or one.sandbox == request.container_id:
        return False
    return one.sandbox == request.netns or os.path.realpath(one.sandbox) == os.path.realpath(request.netns)


def _refuse_what_is_not_held(conf: NetConf) -> None:
    wish = conf.requested
    given: tuple[tuple[str, object], ...] = (
        ("network", conf.network if conf.network != conf.name else ""),
        ("mtu", conf.mtu),
        ("ipMasq", conf.ip_masq),
        ("attach", conf.attach),
        ("join", conf.join),
        ("innerAddresses", list(conf.inner_addresses)),
        ("reach", list(conf.reach)),
        ("isolation", conf.isolation),
        ("ipam", conf.ipam.type if conf.ipam is not None else None),
        ("routes", [route.dst for route in conf.routes]),
        ("dns", None if conf.dns is None and wish.dns is None else "…"),
        ("mac", wish.mac),
        ("bandwidth", "…" if wish.limits != Limits() else None),
        ("portMappings", [mapping.host_port for mapping in wish.port_mappings]),
        ("ips", list(wish.ips)),
        ("ipRanges", [one.subnet for ranges in wish.ip_ranges for one in ranges]),
    )
    for field, value in given:
        if value:
            raise unsupported(field, value, _WAY_OUT)


def _number(request: CniRequest, key: str) -> int | None:
    text = request.args.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_ID)) and int(text) <= _MAX_ID):
        raise CniError(CniCode.BAD_ENVIRONMENT, f"CNI_ARGS: {key} must be a number", f"{key}={text:.80}")
    return int(text)
