/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What the BPF programs and Python share: map keys, map values, events, enums.
 *
 * Written once, here. `python -m portwright.dataplane.generate` reads the BTF
 * of the compiled object and writes abi.py; a test keeps the two equal. Sizes
 * stand behind each struct's name; the Makefile makes assertions of them, and
 * abi.py has them too.
 *
 * An address is always 16 bytes: IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2).
 * Multi-byte fields are in host order unless the name says `be`.
 */
#ifndef PW_ABI_H
#define PW_ABI_H

#include <linux/types.h>

/* Bumped when a map's layout or meaning changes: pins of another ABI are not reused. */
enum pw_abi {
	PW_ABI_VERSION = 5,
};

struct pw_addr { /* 16 bytes */
	__u32 be[4];
};

/* Seen from the sandbox: FROM is what it sends. */
enum pw_dir {
	PW_FROM_PORT = 0,
	PW_TO_PORT = 1,
};

/* Why a packet was dropped. Names are shown to people, in lower case. */
enum pw_reason {
	PW_R_NONE = 0,
	PW_R_NO_PORT = 1, /* no record of a port for this device */
	PW_R_TRUNCATED = 2, /* a header is cut off, or lengths disagree */
	PW_R_SRC_MAC = 3,
	PW_R_SRC_IP = 4,
	PW_R_ARP_SPOOF = 5,
	PW_R_ND_SPOOF = 6,
	PW_R_DHCP_SERVER = 7,
	PW_R_RA = 8, /* router advertisement or redirect */
	PW_R_VLAN = 9, /* a tag on an access port */
	PW_R_DOUBLE_TAG = 10,
	PW_R_ETHERTYPE = 11, /* neither IPv4, IPv6 nor ARP */
	PW_R_FRAGMENT = 12, /* a fragment that hides the header it must carry */
	PW_R_EXT_HEADERS = 13, /* more IPv6 extension headers than we follow */
	PW_R_MTU = 14,
	PW_R_ISOLATION = 15, /* two networks that do not name each other */
	PW_R_LIMIT = 16, /* over the port's rate */
	PW_R_LOOP = 17, /* to an address of the very port that sent it */
	PW_R_DST_MAC = 18, /* not the gateway's; or a group MAC around a port's address */
	PW_R_IP_VERSION = 19, /* version nibble or header length out of range; IPv4-mapped IPv6 */
	PW_R_IP_CHECKSUM = 20,
	PW_R_LINK_DOWN = 21, /* the owner disabled the receiving port's link */
	PW_R_POLICY = 22, /* a rule denies it, or a tier's default */
	PW_R_NOT_READY = 23, /* policy is in force, and this port's not yet */
	PW_R_FLOW_TABLE = 24, /* no room to remember another flow, of the host's or of the port's */
	PW_R_FRAGMENT_ORDER = 25, /* a fragment before the first one of its datagram */
	PW_R_MAX = 26,
};

enum pw_port_flag {
	PW_PF_LIMIT_FROM = 1,
	PW_PF_LIMIT_TO = 2,
	PW_PF_DOWN = 4, /* of a target: its link is disabled */
	PW_PF_NAMES = 8, /* of a port: its policy names domains, so its look-ups are proxied */
	/* The representor is a tap that the sandbox's hypervisor holds: it has no peer. */
	PW_PF_TAP = 16,
	/* Of a port: its sandbox takes itself for one of a segment, as it came off a bridge. */
	PW_PF_ONLINK = 32,
};

enum pw_state_flag {
	PW_SF_SLOW_ONLY = 1, /* no redirect: all goes through the host's stack */
};

/* Map pw_ports, by the representor's ifindex. */
struct pw_port { /* 128 bytes */
	__u64 port_id;
	__u64 sandbox; /* cookie of its namespace: its ports may use each other's addresses */
	__u32 net_id;
	__u32 mtu; /* bytes of layer 3 */
	__u32 flags; /* enum pw_port_flag */
	__u8 mac[6]; /* the device's */
	__u8 gateway_mac[6]; /* the representor's */
	struct pw_addr addr4; /* first IPv4 address, or zero */
	struct pw_addr addr6; /* first IPv6 address, or zero */
	struct pw_addr link_local; /* EUI-64 of mac (RFC 4291, appendix A) */
	struct pw_addr gateway4;
	struct pw_addr gateway6;
	__s32 flows; /* of pw_conns that it opened; kept by the data path */
	__u32 pad;
};

/* Map pw_addrs, by address: all that delivery to it needs. */
struct pw_target { /* 48 bytes */
	__u64 port_id;
	__u64 sandbox;
	__u32 net_id;
	__u32 ifindex; /* of the representor */
	__u32 mtu;
	__u32 flags; /* enum pw_port_flag */
	__u8 mac[6];
	__u8 gateway_mac[6];
	__u8 pad[4];
};

/* Map pw_reach: present = packets may go from one network to the other. */
struct pw_reach_key { /* 8 bytes */
	__u32 from_net;
	__u32 to_net;
};

/* Packets count as gso_segs, bytes are layer 2 without FCS. */
struct pw_counter { /* 16 bytes */
	__u64 packets;
	__u64 octets;
};

/* Map pw_counters, per CPU, by port_id; created and deleted with the port. */
struct pw_counters { /* 64 bytes */
	struct pw_counter from_total;
	struct pw_counter from_slow; /* the part received on the representor */
	struct pw_counter to_total;
	struct pw_counter to_slow; /* the part transmitted on the representor */
};

/* Map pw_drops, per CPU. */
struct pw_drop_key { /* 16 bytes */
	__u64 port_id;
	__u8 dir; /* enum pw_dir */
	__u8 reason; /* enum pw_reason */
	__u8 pad[6];
};

/* Map pw_state, one entry. */
struct pw_state { /* 16 bytes */
	__u32 abi;
	__u32 flags; /* enum pw_state_flag */
	__u32 slow_flows; /* set by the data path once pw_slow_flows was used */
	__u32 pad;
};

/* Map pw_slow_flows (LRU): this direction of a flow must take the slow path. */
struct pw_flow { /* 40 bytes */
	struct pw_addr saddr;
	struct pw_addr daddr;
	__u16 be_sport;
	__u16 be_dport;
	__u8 proto;
	__u8 pad[3];
};

/* Map pw_limits: a token bucket that may go into debt by one packet. */
struct pw_limit_key { /* 16 bytes */
	__u64 port_id;
	__u32 dir;
	__u32 pad;
};

struct pw_limit_spec { /* 32 bytes */
	__u64 rate; /* bytes per second */
	__u64 burst; /* bytes */
	__s64 tokens; /* bytes; below zero: in debt */
	__u64 last_ns;
};

/* Ring pw_events: one record a reported drop. */
struct pw_event { /* 88 bytes */
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 port_id;
	__u32 ifindex;
	__u32 len;
	__u32 lost; /* events suppressed on this CPU for this reason before this one */
	__u16 be_ethertype;
	__u8 dir;
	__u8 reason;
	__u8 src_mac[6];
	__u8 dst_mac[6];
	struct pw_flow;
	__u32 other_net; /* PW_R_ISOLATION: the network on the other side; PW_R_POLICY: the rule */
};

/* Map pw_budget, per CPU, by reason: how many events this window had. */
struct pw_budget { /* 16 bytes */
	__u64 window_ns;
	__u32 sent;
	__u32 lost;
};

/*
 * `why` runs these very programs by BPF_PROG_TEST_RUN. A run with this mark
 * and priority writes its steps to pw_trace and changes no counter. A sandbox
 * can't set either: both are cleared when a packet leaves its namespace
 * (____dev_forward_skb, skb_scrub_packet).
 */
enum pw_trace_const {
	PW_TRACE_MARK = 0x70777279,
	PW_TRACE_PRIORITY = 0x77687930,
	PW_TRACE_STEPS = 16,
	/* Of a RST that we send in a sandbox's name, between the programs. */
	PW_RESET_MARK = 0x70777273,
};

enum pw_step {
	PW_S_PORT = 1, /* a: net_id */
	PW_S_PARSED = 2, /* a: ethertype, b: proto */
	PW_S_GUARD_OK = 3,
	PW_S_ANSWERED = 4, /* a: 1 ARP, 2 ND, 3 echo */
	PW_S_NO_TARGET = 6, /* destination is no port: to the representor */
	PW_S_TARGET = 7, /* a: ifindex, b: net_id */
	PW_S_REACH_OK = 8, /* a: from_net, b: to_net */
	PW_S_FAST = 9, /* a: ifindex */
	PW_S_SLOW = 10, /* a: enum pw_slow */
	PW_S_DROP = 11, /* a: reason, b: dir */
	PW_S_DELIVER = 12, /* slow path hands it to the device */
	PW_S_MULTICAST = 13,
	PW_S_POLICY = 14, /* a: verdict of the sender's policy, b: of the receiver's */
};

/* Why a packet for a local port takes the slow path. */
enum pw_slow {
	PW_SLOW_NONE = 0,
	PW_SLOW_CONFIG = 1,
	PW_SLOW_TTL = 2,
	PW_SLOW_MTU = 3,
	PW_SLOW_FRAGMENT = 4,
	PW_SLOW_FLOW = 5,
	PW_SLOW_OPTIONS = 6,
	PW_SLOW_SCOPE = 7, /* a link-local source, which no router forwards */
	PW_SLOW_PADDING = 8, /* bytes behind the packet, which a router takes off */
	PW_SLOW_ERROR = 9, /* an ICMP error, perhaps about a flow that the host translates */
	PW_SLOW_NAMES = 10, /* a look-up, which the host steers to the proxy */
	PW_SLOW_TAP = 11, /* to a tap, which has no other side to redirect to */
};

struct pw_trace_step { /* 12 bytes */
	__u32 step;
	__u32 a;
	__u32 b;
};

struct pw_trace { /* 196 bytes */
	__u32 used; /* steps written */
	struct pw_trace_step steps[16];
};

/* Policy. A verdict is a rule's number and these bits; 0 is "allowed, no policy selects it". */
enum pw_verdict {
	PW_V_RULE = 0x003fffff,
	PW_V_RESET = 0x08000000, /* a denial that ends what is open: TCP's ends are told */
	PW_V_KEEP = 0x10000000, /* a denial of what is opened: what is open stays */
	PW_V_LOG = 0x20000000, /* a rule with action Log matched on the way */
	PW_V_DENY = 0x40000000,
};

/* Whose policy binds a packet, along its way. */
enum pw_side {
	PW_SIDE_EGRESS = 1,
	PW_SIDE_INGRESS = 2,
};

/* The high half of a service number; the low half is a port, a type and code, or a protocol. */
enum pw_service_kind {
	PW_SV_TCP = 0,
	PW_SV_UDP = 1,
	PW_SV_SCTP = 2,
	PW_SV_ICMP = 3,
	PW_SV_ICMP6 = 4,
	PW_SV_OTHER = 5,
	PW_SV_PORTLESS = 6, /* TCP, UDP or SCTP of which the ports are not known */
};

enum pw_policy_const {
	PW_MAX_FLOWS = 262144,
	PW_PORT_FLOWS = 32768, /* of them that one port may have opened */
	PW_SET_STARTS = 256,
	PW_SLOTS = 8,
	PW_MAX_PEERS = 131072, /* addresses, and as many nets */
	PW_BOUNDS_DEPTH = 6, /* 9^6 - 1 bounds: of each net two */
	PW_MAX_CELLS = 1048576,
};

/* Inner map pw_peers, by address: an endpoint's, or one that a name resolved to. */
struct pw_peer { /* 16 bytes */
	__u32 class_id;
	__u32 set_in; /* what may be opened to it; 0: no policy selects it */
	__u32 set_out;
	__u32 owner; /* the endpoint's number; 0: of none that policy selects */
};

/*
 * Inner map pw_bounds: a node of a search tree of nine ways, children of node n
 * being 9n + 1 to 9n + 9. Its bounds ascend, unused ones are ~0; classes are of
 * what lies below the first, between each two, and from the last on, unless a
 * child knows better.
 */
struct pw_bounds { /* 192 bytes */
	__u64 high[8]; /* halves of addresses, in host order */
	__u64 low[8];
	__u32 classes[16]; /* nine, and room */
};

/* Of map pw_early (LPM). */
struct pw_net_key { /* 20 bytes */
	__u32 prefixlen; /* of 128: IPv4's plus 96 */
	struct pw_addr addr;
};

/*
 * Inner map pw_sets: where its intervals of services begin, ascending from 0;
 * unused ones are ~0. A first one that is not 0: they are intervals of source
 * ports, and the defaults numbers of the sets that hold in each.
 */
struct pw_set { /* 2304 bytes */
	__u32 starts[256];
	__u32 defaults[256]; /* each interval's commonest verdict */
	__u8 classes[256]; /* each interval's port class */
};

/* Inner map pw_cells: the verdicts that differ from their interval's default. */
struct pw_cell_key { /* 12 bytes */
	__u32 set_id;
	__u32 class_id;
	__u32 port_class;
};

enum pw_conn_flag {
	PW_CF_FIRST_OPENED = 1, /* by the first side of its key */
	PW_CF_REPLIED = 2,
	PW_CF_FIN_FIRST = 4,
	PW_CF_FIN_SECOND = 8,
	PW_CF_FINS = 12,
	PW_CF_RESET = 16,
};

/* Map pw_conns; the key is a pw_flow with the lower (address, port) first. */
struct pw_conn { /* 40 bytes */
	__u64 last_ns; /* of its latest packet, to the second */
	__u32 generation; /* that judged it */
	__u32 egress; /* enum pw_verdict */
	__u32 ingress;
	__u32 ifindex; /* of the port that it counts for, with */
	__u32 port_low; /* the low half of its port_id */
	__u8 flags; /* enum pw_conn_flag; first of a word, which is written as one */
	__u8 sides; /* enum pw_side, along the way of its opener */
	__u8 pad[2];
	__u32 ticket; /* number of the one in pw_tickets */
	__u32 pad2;
};

/* Queue pw_tickets: a flow that will end. Stale if the flow has another number. */
struct pw_ticket { /* 44 bytes */
	struct pw_flow key;
	__u32 number;
};

#endif
