"""Generated from abi.h by portwright.dataplane.generate: do not edit."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple


class PwAbi(enum.IntEnum):
    """``enum pw_abi`` of abi.h, without the prefix."""

    ABI_VERSION = 5


class PwConnFlag(enum.IntEnum):
    """``enum pw_conn_flag`` of abi.h, without the prefix."""

    CF_FIRST_OPENED = 1
    CF_REPLIED = 2
    CF_FIN_FIRST = 4
    CF_FIN_SECOND = 8
    CF_FINS = 12
    CF_RESET = 16


class PwDir(enum.IntEnum):
    """``enum pw_dir`` of abi.h, without the prefix."""

    FROM_PORT = 0
    TO_PORT = 1


class PwPolicyConst(enum.IntEnum):
    """``enum pw_policy_const`` of abi.h, without the prefix."""

    MAX_FLOWS = 262144
    PORT_FLOWS = 32768
    SET_STARTS = 256
    SLOTS = 8
    MAX_PEERS = 131072
    BOUNDS_DEPTH = 6
    MAX_CELLS = 1048576


class PwPortFlag(enum.IntEnum):
    """``enum pw_port_flag`` of abi.h, without the prefix."""

    PF_LIMIT_FROM = 1
    PF_LIMIT_TO = 2
    PF_DOWN = 4
    PF_NAMES = 8
    PF_TAP = 16
    PF_ONLINK = 32


class PwReason(enum.IntEnum):
    """``enum pw_reason`` of abi.h, without the prefix."""

    R_NONE = 0
    R_NO_PORT = 1
    R_TRUNCATED = 2
    R_SRC_MAC = 3
    R_SRC_IP = 4
    R_ARP_SPOOF = 5
    R_ND_SPOOF = 6
    R_DHCP_SERVER = 7
    R_RA = 8
    R_VLAN = 9
    R_DOUBLE_TAG = 10
    R_ETHERTYPE = 11
    R_FRAGMENT = 12
    R_EXT_HEADERS = 13
    R_MTU = 14
    R_ISOLATION = 15
    R_LIMIT = 16
    R_LOOP = 17
    R_DST_MAC = 18
    R_IP_VERSION = 19
    R_IP_CHECKSUM = 20
    R_LINK_DOWN = 21
    R_POLICY = 22
    R_NOT_READY = 23
    R_FLOW_TABLE = 24
    R_FRAGMENT_ORDER = 25
    R_MAX = 26


class PwServiceKind(enum.IntEnum):
    """``enum pw_service_kind`` of abi.h, without the prefix."""

    SV_TCP = 0
    SV_UDP = 1
    SV_SCTP = 2
    SV_ICMP = 3
    SV_ICMP6 = 4
    SV_OTHER = 5
    SV_PORTLESS = 6


class PwSide(enum.IntEnum):
    """``enum pw_side`` of abi.h, without the prefix."""

    SIDE_EGRESS = 1
    SIDE_INGRESS = 2


class PwSlow(enum.IntEnum):
    """``enum pw_slow`` of abi.h, without the prefix."""

    SLOW_NONE = 0
    SLOW_CONFIG = 1
    SLOW_TTL = 2
    SLOW_MTU = 3
    SLOW_FRAGMENT = 4
    SLOW_FLOW = 5
    SLOW_OPTIONS = 6
    SLOW_SCOPE = 7
    SLOW_PADDING = 8
    SLOW_ERROR = 9
    SLOW_NAMES = 10
    SLOW_TAP = 11


class PwStateFlag(enum.IntEnum):
    """``enum pw_state_flag`` of abi.h, without the prefix."""

    SF_SLOW_ONLY = 1


class PwStep(enum.IntEnum):
    """``enum pw_step`` of abi.h, without the prefix."""

    S_PORT = 1
    S_PARSED = 2
    S_GUARD_OK = 3
    S_ANSWERED = 4
    S_NO_TARGET = 6
    S_TARGET = 7
    S_REACH_OK = 8
    S_FAST = 9
    S_SLOW = 10
    S_DROP = 11
    S_DELIVER = 12
    S_MULTICAST = 13
    S_POLICY = 14


class PwTraceConst(enum.IntEnum):
    """``enum pw_trace_const`` of abi.h, without the prefix."""

    TRACE_MARK = 1886876281
    TRACE_PRIORITY = 2003335472
    TRACE_STEPS = 16
    RESET_MARK = 1886876275


class PwVerdict(enum.IntEnum):
    """``enum pw_verdict`` of abi.h, without the prefix."""

    V_RULE = 4194303
    V_RESET = 134217728
    V_KEEP = 268435456
    V_LOG = 536870912
    V_DENY = 1073741824


_pw_bounds = struct.Struct("=64s64s64s")
assert _pw_bounds.size == 192  # noqa: S101 - the generator's own check


class PwBounds(NamedTuple):
    """``struct pw_bounds`` of abi.h."""

    high: bytes
    low: bytes
    classes: bytes

    def pack(self) -> bytes:
        """Its 192 bytes, as C lays them out."""
        return _pw_bounds.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwBounds:
        """The inverse of ``pack``; ``struct.error`` unless of 192 bytes."""
        return cls._make(_pw_bounds.unpack(data))


_pw_budget = struct.Struct("=QII")
assert _pw_budget.size == 16  # noqa: S101 - the generator's own check


class PwBudget(NamedTuple):
    """``struct pw_budget`` of abi.h."""

    window_ns: int
    sent: int
    lost: int

    def pack(self) -> bytes:
        """Its 16 bytes, as C lays them out."""
        return _pw_budget.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwBudget:
        """The inverse of ``pack``; ``struct.error`` unless of 16 bytes."""
        return cls._make(_pw_budget.unpack(data))


_pw_cell_key = struct.Struct("=III")
assert _pw_cell_key.size == 12  # noqa: S101 - the generator's own check


class PwCellKey(NamedTuple):
    """``struct pw_cell_key`` of abi.h."""

    set_id: int
    class_id: int
    port_class: int

    def pack(self) -> bytes:
        """Its 12 bytes, as C lays them out."""
        return _pw_cell_key.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwCellKey:
        """The inverse of ``pack``; ``struct.error`` unless of 12 bytes."""
        return cls._make(_pw_cell_key.unpack(data))


_pw_conn = struct.Struct("=QIIIIIBB2xI4x")
assert _pw_conn.size == 40  # noqa: S101 - the generator's own check


class PwConn(NamedTuple):
    """``struct pw_conn`` of abi.h."""

    last_ns: int
    generation: int
    egress: int
    ingress: int
    ifindex: int
    port_low: int
    flags: int
    sides: int
    ticket: int

    def pack(self) -> bytes:
        """Its 40 bytes, as C lays them out."""
        return _pw_conn.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwConn:
        """The inverse of ``pack``; ``struct.error`` unless of 40 bytes."""
        return cls._make(_pw_conn.unpack(data))


_pw_counter = struct.Struct("=QQ")
assert _pw_counter.size == 16  # noqa: S101 - the generator's own check


class PwCounter(NamedTuple):
    """``struct pw_counter`` of abi.h."""

    packets: int
    octets: int

    def pack(self) -> bytes:
        """Its 16 bytes, as C lays them out."""
        return _pw_counter.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwCounter:
        """The inverse of ``pack``; ``struct.error`` unless of 16 bytes."""
        return cls._make(_pw_counter.unpack(data))


_pw_counters = struct.Struct("=QQQQQQQQ")
assert _pw_counters.size == 64  # noqa: S101 - the generator's own check


class PwCounters(NamedTuple):
    """``struct pw_counters`` of abi.h."""

    from_total_packets: int
    from_total_octets: int
    from_slow_packets: int
    from_slow_octets: int
    to_total_packets: int
    to_total_octets: int
    to_slow_packets: int
    to_slow_octets: int

    def pack(self) -> bytes:
        """Its 64 bytes, as C lays them out."""
        return _pw_counters.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwCounters:
        """The inverse of ``pack``; ``struct.error`` unless of 64 bytes."""
        return cls._make(_pw_counters.unpack(data))


_pw_drop_key = struct.Struct("=QBB6x")
assert _pw_drop_key.size == 16  # noqa: S101 - the generator's own check


class PwDropKey(NamedTuple):
    """``struct pw_drop_key`` of abi.h."""

    port_id: int
    dir: int
    reason: int

    def pack(self) -> bytes:
        """Its 16 bytes, as C lays them out."""
        return _pw_drop_key.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwDropKey:
        """The inverse of ``pack``; ``struct.error`` unless of 16 bytes."""
        return cls._make(_pw_drop_key.unpack(data))


_pw_event = struct.Struct("=QQIII2sBB6s6s16s16s2s2sB3xI")
assert _pw_event.size == 88  # noqa: S101 - the generator's own check


class PwEvent(NamedTuple):
    """``struct pw_event`` of abi.h."""

    time_ns: int
    port_id: int
    ifindex: int
    len: int
    lost: int
    be_ethertype: bytes
    dir: int
    reason: int
    src_mac: bytes
    dst_mac: bytes
    saddr: bytes
    daddr: bytes
    be_sport: bytes
    be_dport: bytes
    proto: int
    other_net: int

    def pack(self) -> bytes:
        """Its 88 bytes, as C lays them out."""
        return _pw_event.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwEvent:
        """The inverse of ``pack``; ``struct.error`` unless of 88 bytes."""
        return cls._make(_pw_event.unpack(data))


_pw_flow = struct.Struct("=16s16s2s2sB3x")
assert _pw_flow.size == 40  # noqa: S101 - the generator's own check


class PwFlow(NamedTuple):
    """``struct pw_flow`` of abi.h."""

    saddr: bytes
    daddr: bytes
    be_sport: bytes
    be_dport: bytes
    proto: int

    def pack(self) -> bytes:
        """Its 40 bytes, as C lays them out."""
        return _pw_flow.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwFlow:
        """The inverse of ``pack``; ``struct.error`` unless of 40 bytes."""
        return cls._make(_pw_flow.unpack(data))


_pw_limit_key = struct.Struct("=QI4x")
assert _pw_limit_key.size == 16  # noqa: S101 - the generator's own check


class PwLimitKey(NamedTuple):
    """``struct pw_limit_key`` of abi.h."""

    port_id: int
    dir: int

    def pack(self) -> bytes:
        """Its 16 bytes, as C lays them out."""
        return _pw_limit_key.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwLimitKey:
        """The inverse of ``pack``; ``struct.error`` unless of 16 bytes."""
        return cls._make(_pw_limit_key.unpack(data))


_pw_limit_spec = struct.Struct("=QQqQ")
assert _pw_limit_spec.size == 32  # noqa: S101 - the generator's own check


class PwLimitSpec(NamedTuple):
    """``struct pw_limit_spec`` of abi.h."""

    rate: int
    burst: int
    tokens: int
    last_ns: int

    def pack(self) -> bytes:
        """Its 32 bytes, as C lays them out."""
        return _pw_limit_spec.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwLimitSpec:
        """The inverse of ``pack``; ``struct.error`` unless of 32 bytes."""
        return cls._make(_pw_limit_spec.unpack(data))


_pw_net_key = struct.Struct("=I16s")
assert _pw_net_key.size == 20  # noqa: S101 - the generator's own check


class PwNetKey(NamedTuple):
    """``struct pw_net_key`` of abi.h."""

    prefixlen: int
    addr: bytes

    def pack(self) -> bytes:
        """Its 20 bytes, as C lays them out."""
        return _pw_net_key.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwNetKey:
        """The inverse of ``pack``; ``struct.error`` unless of 20 bytes."""
        return cls._make(_pw_net_key.unpack(data))


_pw_peer = struct.Struct("=IIII")
assert _pw_peer.size == 16  # noqa: S101 - the generator's own check


class PwPeer(NamedTuple):
    """``struct pw_peer`` of abi.h."""

    class_id: int
    set_in: int
    set_out: int
    owner: int

    def pack(self) -> bytes:
        """Its 16 bytes, as C lays them out."""
        return _pw_peer.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwPeer:
        """The inverse of ``pack``; ``struct.error`` unless of 16 bytes."""
        return cls._make(_pw_peer.unpack(data))


_pw_port = struct.Struct("=QQIII6s6s16s16s16s16s16si4x")
assert _pw_port.size == 128  # noqa: S101 - the generator's own check


class PwPort(NamedTuple):
    """``struct pw_port`` of abi.h."""

    port_id: int
    sandbox: int
    net_id: int
    mtu: int
    flags: int
    mac: bytes
    gateway_mac: bytes
    addr4: bytes
    addr6: bytes
    link_local: bytes
    gateway4: bytes
    gateway6: bytes
    flows: int

    def pack(self) -> bytes:
        """Its 128 bytes, as C lays them out."""
        return _pw_port.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwPort:
        """The inverse of ``pack``; ``struct.error`` unless of 128 bytes."""
        return cls._make(_pw_port.unpack(data))


_pw_reach_key = struct.Struct("=II")
assert _pw_reach_key.size == 8  # noqa: S101 - the generator's own check


class PwReachKey(NamedTuple):
    """``struct pw_reach_key`` of abi.h."""

    from_net: int
    to_net: int

    def pack(self) -> bytes:
        """Its 8 bytes, as C lays them out."""
        return _pw_reach_key.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwReachKey:
        """The inverse of ``pack``; ``struct.error`` unless of 8 bytes."""
        return cls._make(_pw_reach_key.unpack(data))


_pw_set = struct.Struct("=1024s1024s256s")
assert _pw_set.size == 2304  # noqa: S101 - the generator's own check


class PwSet(NamedTuple):
    """``struct pw_set`` of abi.h."""

    starts: bytes
    defaults: bytes
    classes: bytes

    def pack(self) -> bytes:
        """Its 2304 bytes, as C lays them out."""
        return _pw_set.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwSet:
        """The inverse of ``pack``; ``struct.error`` unless of 2304 bytes."""
        return cls._make(_pw_set.unpack(data))


_pw_state = struct.Struct("=III4x")
assert _pw_state.size == 16  # noqa: S101 - the generator's own check


class PwState(NamedTuple):
    """``struct pw_state`` of abi.h."""

    abi: int
    flags: int
    slow_flows: int

    def pack(self) -> bytes:
        """Its 16 bytes, as C lays them out."""
        return _pw_state.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwState:
        """The inverse of ``pack``; ``struct.error`` unless of 16 bytes."""
        return cls._make(_pw_state.unpack(data))


_pw_target = struct.Struct("=QQIIII6s6s4x")
assert _pw_target.size == 48  # noqa: S101 - the generator's own check


class PwTarget(NamedTuple):
    """``struct pw_target`` of abi.h."""

    port_id: int
    sandbox: int
    net_id: int
    ifindex: int
    mtu: int
    flags: int
    mac: bytes
    gateway_mac: bytes

    def pack(self) -> bytes:
        """Its 48 bytes, as C lays them out."""
        return _pw_target.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwTarget:
        """The inverse of ``pack``; ``struct.error`` unless of 48 bytes."""
        return cls._make(_pw_target.unpack(data))


_pw_ticket = struct.Struct("=16s16s2s2sB3xI")
assert _pw_ticket.size == 44  # noqa: S101 - the generator's own check


class PwTicket(NamedTuple):
    """``struct pw_ticket`` of abi.h."""

    key_saddr: bytes
    key_daddr: bytes
    key_be_sport: bytes
    key_be_dport: bytes
    key_proto: int
    number: int

    def pack(self) -> bytes:
        """Its 44 bytes, as C lays them out."""
        return _pw_ticket.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwTicket:
        """The inverse of ``pack``; ``struct.error`` unless of 44 bytes."""
        return cls._make(_pw_ticket.unpack(data))


_pw_trace = struct.Struct("=I192s")
assert _pw_trace.size == 196  # noqa: S101 - the generator's own check


class PwTrace(NamedTuple):
    """``struct pw_trace`` of abi.h."""

    used: int
    steps: bytes

    def pack(self) -> bytes:
        """Its 196 bytes, as C lays them out."""
        return _pw_trace.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwTrace:
        """The inverse of ``pack``; ``struct.error`` unless of 196 bytes."""
        return cls._make(_pw_trace.unpack(data))


_pw_trace_step = struct.Struct("=III")
assert _pw_trace_step.size == 12  # noqa: S101 - the generator's own check


class PwTraceStep(NamedTuple):
    """``struct pw_trace_step`` of abi.h."""

    step: int
    a: int
    b: int

    def pack(self) -> bytes:
        """Its 12 bytes, as C lays them out."""
        return _pw_trace_step.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> PwTraceStep:
        """The inverse of ``pack``; ``struct.error`` unless of 12 bytes."""
        return cls._make(_pw_trace_step.unpack(data))


#: Bytes of each struct, as the compiler laid it out.
SIZES: dict[str, int] = {
    "PwBounds": 192,
    "PwBudget": 16,
    "PwCellKey": 12,
    "PwConn": 40,
    "PwCounter": 16,
    "PwCounters": 64,
    "PwDropKey": 16,
    "PwEvent": 88,
    "PwFlow": 40,
    "PwLimitKey": 16,
    "PwLimitSpec": 32,
    "PwNetKey": 20,
    "PwPeer": 16,
    "PwPort": 128,
    "PwReachKey": 8,
    "PwSet": 2304,
    "PwState": 16,
    "PwTarget": 48,
    "PwTicket": 44,
    "PwTrace": 196,
    "PwTraceStep": 12,
}
