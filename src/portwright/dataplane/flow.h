/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Connections: who opened them, so that replies pass and a decision is made
 * once. While no policy is in force only TCP's are kept, by their SYN, FIN and
 * RST, so that a policy which comes knows the openers of what is open; what
 * else is open it judges as it comes.
 *
 * One entry a connection, found by either direction with one look-up: the key
 * has the lower (address, port) first. An entry ends by its own timer, in the
 * kernel, whether or not a daemon lives.
 */
#ifndef PW_FLOW_H
#define PW_FLOW_H

#include "count.h"

#define PW_SEC 1000000000ULL

struct pw_conn_value {
	struct bpf_timer timer;
	struct pw_conn conn;
};

/*
 * Full, or the port's share of it: under a policy the packet that would open
 * another flow is dropped (PW_R_FLOW_TABLE); without one it passes, unknown.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PW_MAX_FLOWS);
	__uint(map_flags, BPF_F_NO_PREALLOC); /* else 40 MB, whether or not there are flows */
	__type(key, struct pw_flow);
	__type(value, struct pw_conn_value);
} pw_conns SEC(".maps");

#define PW_TCP_FIN 0x01
#define PW_TCP_SYN 0x02
#define PW_TCP_RST 0x04
#define PW_TCP_ACK 0x10

/* Nanoseconds without a packet after which a flow is forgotten. */
PW_INLINE __u64 pw_idle_limit(const struct pw_conn *conn, __u8 proto)
{
	if (proto == IPPROTO_TCP) {
		if (conn->flags & PW_CF_RESET || (conn->flags & PW_CF_FINS) == PW_CF_FINS)
			return 10 * PW_SEC;
		return conn->flags & PW_CF_REPLIED ? 24 * 3600 * PW_SEC : 60 * PW_SEC;
	}
	if (proto == IPPROTO_SCTP)
		return conn->flags & PW_CF_REPLIED ? 3600 * PW_SEC : 60 * PW_SEC;
	return conn->flags & PW_CF_REPLIED ? 180 * PW_SEC : 30 * PW_SEC;
}

/* Forgets a flow, and gives its place back to the port that had it. */
PW_INLINE void pw_conn_close(const struct pw_flow *key, const struct pw_conn_value *value)
{
	__u32 ifindex = value->conn.ifindex;
	struct pw_port *port = bpf_map_lookup_elem(&pw_ports, &ifindex);
	bool same = port && (__u32)port->port_id == value->conn.port_low;

	if (!bpf_map_delete_elem(&pw_conns, key) && same)
		__sync_fetch_and_add(&port->flows, -1);
}

/* Its ends are to be told that it is over: with their next packets, if these come within a minute. */
PW_INLINE __u32 pw_conn_fades(struct pw_conn_value *value)
{
	if (value->conn.flags & PW_CF_REPLIED) {
		value->conn.flags &= ~PW_CF_REPLIED;
		value->conn.last_ns = bpf_ktime_get_coarse_ns();
		bpf_timer_start(&value->timer, pw_idle_limit(&value->conn, IPPROTO_TCP), 0);
	}
	return 0;
}

static int pw_conn_expire(void *map, struct pw_flow *key, struct pw_conn_value *value)
{
	__u64 limit = pw_idle_limit(&value->conn, key->proto);
	__u64 idle = bpf_ktime_get_ns() - value->conn.last_ns;

	/* A packet on another CPU may be newer than our clock reading. */
	if ((__s64)idle >= (__s64)limit)
		pw_conn_close(key, value);
	else
		bpf_timer_start(&value->timer, limit - ((__s64)idle > 0 ? idle : 0), 0);
	return 0;
}

/* Fills @key; true if the packet's source is its first side. Any order will do, if it is total. */
PW_INLINE bool pw_flow_key(struct pw_flow *key, const struct pw_packet *pkt)
{
	const __u32 *s = pkt->saddr.be, *d = pkt->daddr.be;
	__u64 s0 = (__u64)s[0] << 32 | s[1], s1 = (__u64)s[2] << 32 | s[3];
	__u64 d0 = (__u64)d[0] << 32 | d[1], d1 = (__u64)d[2] << 32 | d[3];
	bool first = pkt->be_sport <= pkt->be_dport;

	if (s0 != d0)
		first = s0 < d0;
	else if (s1 != d1)
		first = s1 < d1;
	key->proto = pkt->proto;
	if (first) {
		key->saddr = pkt->saddr;
		key->daddr = pkt->daddr;
		key->be_sport = pkt->be_sport;
		key->be_dport = pkt->be_dport;
	} else {
		key->saddr = pkt->daddr;
		key->daddr = pkt->saddr;
		key->be_sport = pkt->be_dport;
		key->be_dport = pkt->be_sport;
	}
	return first;
}

/* A packet of a known flow: what it tells about the flow's age and end. */
PW_INLINE void pw_conn_seen(struct pw_conn_value *value, __u8 proto, __u8 flags, bool first)
{
	struct pw_conn *conn = &value->conn;
	__u8 old = conn->flags, now = old;
	__u64 at = bpf_ktime_get_coarse_ns();

	if (first != !!(old & PW_CF_FIRST_OPENED))
		now |= PW_CF_REPLIED;
	if (flags & PW_TCP_FIN)
		now |= first ? PW_CF_FIN_FIRST : PW_CF_FIN_SECOND;
	if (flags & PW_TCP_RST)
		now |= PW_CF_RESET;
	/* Written once a second: a cache line that both directions only read stays shared. */
	if (at - conn->last_ns > PW_SEC || now != old)
		conn->last_ns = at;
	if (now != old) {
		conn->flags = now;
		bpf_timer_start(&value->timer, pw_idle_limit(conn, proto), 0);
	}
}

/* Remembers a flow, for @port; 0, or the reason why it can't. */
PW_INLINE int pw_conn_open(const struct pw_flow *key, const struct pw_conn *conn,
			   struct pw_port *port)
{
	struct pw_conn_value fresh = {};
	struct pw_conn_value *value;

	if (port->flows >= PW_PORT_FLOWS)
		return PW_R_FLOW_TABLE;
	fresh.conn = *conn;
	fresh.conn.port_low = port->port_id;
	if (!bpf_map_update_elem(&pw_conns, key, &fresh, BPF_NOEXIST))
		__sync_fetch_and_add(&port->flows, 1);
	value = bpf_map_lookup_elem(&pw_conns, key);
	if (!value)
		return PW_R_FLOW_TABLE;
	/* EBUSY: another CPU's packet of the same flow was first, and armed it. */
	if (bpf_timer_init(&value->timer, &pw_conns, 1 /* CLOCK_MONOTONIC */))
		return 0;
	bpf_timer_set_callback(&value->timer, pw_conn_expire);
	bpf_timer_start(&value->timer, pw_idle_limit(&value->conn, key->proto), 0);
	return 0;
}

/*
 * LRU: of a datagram that waits too long the later fragments are dropped,
 * as those are that come before the first.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct pw_frag);
	__type(value, __u32);
} pw_frags SEC(".maps");

#endif
