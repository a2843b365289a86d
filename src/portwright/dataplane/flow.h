/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Connections: who opened them, so that replies pass and a decision is made
 * once. While no policy is in force only TCP's are kept, by their SYN, FIN and
 * RST, so that a policy which comes knows the openers of what is open; what
 * else is open it judges as it comes.
 *
 * One entry a connection, found by either direction with one look-up: the key
 * has the lower (address, port) first. Every flow has a ticket in a queue that
 * a timer in the kernel turns over, a part of it at each tick, whether or not
 * a daemon lives. (A timer of its own for each flow takes memory in softirq,
 * which Linux 6.18 refuses as soon as there is a burst of them.)
 */
#ifndef PW_FLOW_H
#define PW_FLOW_H

#include <asm-generic/errno-base.h>

#include "count.h"

/*
 * Full, or the port's share of it: under a policy the packet that would open
 * another flow is dropped (PW_R_FLOW_TABLE); without one it passes, unknown.
 */
PW_MAP(pw_conns, HASH, PW_MAX_FLOWS, BPF_F_NO_PREALLOC, struct pw_flow, struct pw_conn);

/* Full, of flows that ended early and whose tickets are still about: as above. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, PW_MAX_FLOWS);
	__type(value, struct pw_ticket);
} pw_tickets SEC(".maps");

/* Tickets are all seen in a turn of so many ticks. */
#define PW_TICK (PW_SEC / 10)
#define PW_TURN 64

struct pw_ager {
	struct bpf_timer timer;
	__u32 runs;
	__u32 tickets;
	__u32 tick;
	__u32 batch; /* tickets that are looked at in each tick of this turn */
};

PW_MAP(pw_ager, ARRAY, 1, 0, __u32, struct pw_ager);

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

/* Forgets a flow, and gives its place back to the port that had it. An error: it is still there. */
PW_INLINE long pw_conn_close(const struct pw_flow *key, const struct pw_conn *conn)
{
	__u32 ifindex = conn->ifindex;
	struct pw_port *port = bpf_map_lookup_elem(&pw_ports, &ifindex);
	bool same = port && (__u32)port->port_id == conn->port_low;
	long error = bpf_map_delete_elem(&pw_conns, key);

	if (!error && same)
		__sync_fetch_and_add(&port->flows, -1);
	return error;
}

/* Looks at one flow: forgets it, or puts its ticket back. Not zero: no tickets are left. */
static int pw_age_one(__u32 index, __s32 *gone)
{
	struct pw_ticket ticket;
	struct pw_conn *conn;

	if (bpf_map_pop_elem(&pw_tickets, &ticket))
		return 1;
	conn = bpf_map_lookup_elem(&pw_conns, &ticket.key);
	/* A packet on another CPU may be newer than our clock reading. */
	if (conn && conn->ticket == ticket.number &&
	    ((__s64)(bpf_ktime_get_ns() - conn->last_ns) <
		     (__s64)pw_idle_limit(conn, ticket.key.proto) ||
	     pw_conn_close(&ticket.key, conn)) &&
	    !bpf_map_push_elem(&pw_tickets, &ticket, BPF_ANY))
		return 0;
	*gone += 1;
	return 0;
}

static int pw_age(void *map, __u32 *zero, struct pw_ager *ager)
{
	__s32 gone = 0;

	if (!(ager->tick++ % PW_TURN))
		ager->batch = ager->tickets / PW_TURN + 1;
	bpf_loop(ager->batch, pw_age_one, &gone, 0);
	__sync_fetch_and_add(&ager->tickets, -gone);
	/* First it rests, then it looks: who opens a flow looks after that whether it rests. */
	__sync_lock_test_and_set(&ager->runs, 0);
	if (ager->tickets && !bpf_timer_start(&ager->timer, PW_TICK, 0))
		ager->runs = 1;
	return 0;
}

/* A ticket for a new flow; an error if there is none. A function, for the sake of its caller's stack. */
__noinline int pw_age_from_now(struct pw_flow *key, __u32 number)
{
	struct pw_ticket ticket = { .number = number };
	__u32 zero = 0;
	struct pw_ager *ager = bpf_map_lookup_elem(&pw_ager, &zero);
	long error;

	if (!ager || !key)
		return -EINVAL;
	ticket.key = *key;
	if (bpf_map_push_elem(&pw_tickets, &ticket, BPF_ANY))
		return -ENOSPC;
	__sync_fetch_and_add(&ager->tickets, 1);
	if (READ_ONCE(ager->runs))
		return 0;
	error = bpf_timer_init(&ager->timer, &pw_ager, 1 /* CLOCK_MONOTONIC */);
	/* No memory at the moment: with the next flow. */
	if (error && error != -EBUSY)
		return 0;
	bpf_timer_set_callback(&ager->timer, pw_age);
	if (!bpf_timer_start(&ager->timer, PW_TICK, 0))
		ager->runs = 1;
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
	*key = first ? *pw_way(pkt) : pw_way_back(pkt);
	/* A reply has its request's key, and nothing else has. */
	if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6) {
		key->be_sport = pkt->be_icmp_id;
		key->be_dport = pkt->icmp_type << 8 | pkt->icmp_code;
		if (pw_icmp_reply(pkt->icmp_type))
			key->be_dport += pkt->icmp_type ? -0x100 : 0x800;
	}
	return first;
}

/* A packet of a known flow: what it tells about the flow's age and end. */
PW_INLINE void pw_conn_seen(struct pw_conn *conn, __u8 flags, bool first)
{
	__u64 at = bpf_ktime_get_coarse_ns();
	__u32 news = 0;

	if (first != !!(conn->flags & PW_CF_FIRST_OPENED))
		news |= PW_CF_REPLIED;
	if (flags & PW_TCP_FIN)
		news |= first ? PW_CF_FIN_FIRST : PW_CF_FIN_SECOND;
	if (flags & PW_TCP_RST)
		news |= PW_CF_RESET;
	news &= ~(__u32)conn->flags;
	/* Written once a second: a cache line that both directions only read stays shared. */
	if (at - conn->last_ns > PW_SEC || news)
		conn->last_ns = at;
	/* Both directions may have news at the same time; the low byte of the word are the flags. */
	if (news)
		__sync_fetch_and_or((__u32 *)&conn->flags, news);
}

/* Remembers a flow, for @port; 0, or the reason why it can't. */
PW_INLINE int pw_conn_open(struct pw_flow *key, struct pw_conn *conn, struct pw_port *port)
{
	long error;

	if (port->flows >= PW_PORT_FLOWS)
		return PW_R_FLOW_TABLE;
	conn->port_low = port->port_id;
	conn->ticket = bpf_get_prandom_u32();
	error = bpf_map_update_elem(&pw_conns, key, conn, BPF_NOEXIST);
	if (error) /* EEXIST: another CPU's packet of the same flow was first */
		return error == -EEXIST ? 0 : PW_R_FLOW_TABLE;
	__sync_fetch_and_add(&port->flows, 1);
	if (!pw_age_from_now(key, conn->ticket))
		return 0;
	pw_conn_close(key, conn); /* what can't end is not opened */
	return PW_R_FLOW_TABLE;
}

/*
 * By both addresses, protocol and, in the ports' place, identification: the
 * generation in which a datagram's first fragment was let through. LRU: of one
 * that waits too long the later fragments are dropped, as those are that come
 * before the first.
 */
PW_MAP(pw_frags, LRU_HASH, 16384, 0, struct pw_flow, __u32);

#endif
