/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Policy: who may open a flow to whom (reference/policy.md, 3.3).
 *
 * Each generation of policy is four inner maps under one slot, filled before
 * the slot's number is written to pw_generation: a packet reads that number once,
 * so all that it is judged by is of one generation. A decision costs the same
 * however many rules there are: address to class and policy sets (pw_peers,
 * else pw_nets), service to port class (the set's intervals), and one cell.
 * What a slot misses is a deny: a generation that is not there lets nothing by.
 */
#ifndef PW_POLICY_H
#define PW_POLICY_H

#include "answer.h"
#include "flow.h"

/*
 * Whom policy takes the sender for: its address, or the port's first one for
 * fe80::/10, which it may also send from, and for one that the host put there.
 */
PW_INLINE const struct pw_addr *pw_own_addr(const struct pw_port *port, const struct pw_packet *pkt)
{
	bool v4 = pkt->be_proto == bpf_htons(ETH_P_IP);

	if (pw_owns(port, &pkt->saddr))
		return &pkt->saddr;
	return pw_addr_zero(v4 ? &port->addr4 : &port->addr6) == v4 ? &port->addr6 : &port->addr4;
}

/* Discovery and listener reports on the link: what policy never meant (RFC 4890, 4.4). */
PW_INLINE bool pw_is_nd(const struct pw_packet *pkt)
{
	return pkt->proto == IPPROTO_ICMPV6 &&
	       (pkt->daddr.be[0] == bpf_htonl(0xff020000) ||
		(pkt->daddr.be[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000)) &&
	       ((pkt->icmp_type >= 130 && pkt->icmp_type <= 137) || pkt->icmp_type == 143);
}

#define PW_SIDES (PW_SIDE_EGRESS | PW_SIDE_INGRESS)

/* Behind a reason: the receiver's policy decided; the number of the rule that did; to be reset. */
#define PW_BY_RECEIVER 0x100
#define PW_RULE_SHIFT  9
#define PW_RESETS      0x80000000

#define barrier() asm volatile("" ::: "memory")
#define keep(x)	  asm volatile("" : "+r"(x))

/* A map of which each slot holds one generation's. */
#define PW_SLOTTED(name, kind, entries, flags, key_bytes, value_bytes) \
	struct name##_inner {                                          \
		__uint(type, BPF_MAP_TYPE_##kind);                     \
		__uint(max_entries, entries);                          \
		__uint(map_flags, flags);                              \
		__uint(key_size, key_bytes);                           \
		__uint(value_size, value_bytes);                       \
	};                                                             \
	struct {                                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);              \
		__uint(max_entries, PW_SLOTS);                         \
		__type(key, __u32);                                    \
		__array(values, struct name##_inner);                  \
	} name SEC(".maps")

PW_SLOTTED(pw_peers, HASH, PW_MAX_PEERS, BPF_F_NO_PREALLOC, sizeof(struct pw_addr),
	   sizeof(struct pw_peer));
PW_SLOTTED(pw_bounds, ARRAY, 1, BPF_F_INNER_MAP, sizeof(__u32), sizeof(struct pw_bounds));
PW_SLOTTED(pw_sets, ARRAY, 1, BPF_F_INNER_MAP, sizeof(__u32), sizeof(struct pw_set));
PW_SLOTTED(pw_cells, HASH, PW_MAX_CELLS, BPF_F_NO_PREALLOC, sizeof(struct pw_cell_key),
	   sizeof(__u32));

/*
 * 0: the generation in force, its slot in the low bits; 0 if no policy is.
 * 1: the last that was given out: none comes twice, as flows remember theirs.
 */
PW_MAP(pw_generation, ARRAY, 2, 0, __u32, __u32);

/*
 * One number for what a packet is: compile.py cuts the same line into port
 * classes. @icmp: type and code; of an answer its question's.
 */
PW_INLINE __u32 pw_service(const struct pw_packet *pkt, __u16 be_port, __u16 icmp)
{
	__u32 kind = PW_SV_TCP;

	if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6)
		return (pkt->proto == IPPROTO_ICMP ? PW_SV_ICMP : PW_SV_ICMP6) << 16 | icmp;
	if (pkt->proto != IPPROTO_TCP)
		kind = pkt->proto == IPPROTO_UDP    ? PW_SV_UDP
		       : pkt->proto == IPPROTO_SCTP ? PW_SV_SCTP
						    : PW_SV_OTHER;
	if (kind == PW_SV_OTHER)
		return kind << 16 | pkt->proto;
	if (!(pkt->flags & PW_P_PORTS))
		return PW_SV_PORTLESS << 16 | pkt->proto;
	return kind << 16 | bpf_ntohs(be_port);
}

/* Does @a - @b - @lent borrow: is it below? Without a branch: the verifier has one way to look at. */
PW_INLINE __u64 pw_borrows(__u64 a, __u64 b, __u64 lent)
{
	return ((~a & b) | (~(a ^ b) & (a - b - lent))) >> 63;
}

/*
 * False: this generation is not there. An address of nobody has a class, that
 * of the last bound which is not above it, and no sets.
 */
__noinline int pw_find_peer(__u32 slot, const struct pw_addr *addr, struct pw_peer *out)
{
	void *inner = bpf_map_lookup_elem(&pw_peers, &slot);
	struct pw_bounds *node, *last = NULL;
	struct pw_peer *peer;
	struct pw_addr key;
	__u64 high, low, past = 0;
	__u32 place = 0;

	if (!inner || !addr || !out)
		return false;
	key = *addr;
	peer = bpf_map_lookup_elem(inner, &key);
	*out = peer ? *peer : (struct pw_peer){};
	if (peer)
		return true;
	inner = bpf_map_lookup_elem(&pw_bounds, &slot);
	if (!inner)
		return false;
	high = (__u64)bpf_ntohl(key.be[0]) << 32 | bpf_ntohl(key.be[1]);
	low = (__u64)bpf_ntohl(key.be[2]) << 32 | bpf_ntohl(key.be[3]);
	for (int depth = 0; depth < PW_BOUNDS_DEPTH; depth++) {
		node = bpf_map_lookup_elem(inner, &place);
		if (!node)
			break;
		last = node;
		past = 8;
#pragma clang loop unroll(disable)
		for (int i = 0; i < 8; i++)
			past -= pw_borrows(high, node->high[i], pw_borrows(low, node->low[i], 0));
		place = place * 9 + 1 + past;
	}
	if (last)
		out->class_id = last->classes[past & 15];
	return true;
}

/*
 * The interval of a service: the last that does not begin above it (the first
 * begins at 0, unused ones at ~0). Without branches, so that the verifier has
 * one way to look at.
 */
PW_INLINE __u32 pw_interval(const struct pw_set *set, __u32 service)
{
	__u32 at = 0;

#pragma unroll
	for (__u32 step = PW_SET_STARTS / 2; step; step /= 2) {
		__u32 next = at + step;
		__s64 past;

		keep(next); /* else the compiler, which knows the bound, leaves it out */
		next &= PW_SET_STARTS - 1;
		past = (__s64)service - set->starts[next];
		keep(past); /* else it becomes a branch, and two ways for the verifier */
		at += step & ~(past >> 63);
	}
	keep(at);
	return at & (PW_SET_STARTS - 1);
}

/*
 * The verdict of one policy set on a peer's class and a service. Global, so
 * that the verifier looks at it once.
 */
__noinline __u32 pw_cell(__u32 slot, __u32 set_id, __u32 class_id, __u32 service, __u32 be_sport)
{
	struct pw_cell_key key = { .set_id = set_id, .class_id = class_id };
	void *inner = bpf_map_lookup_elem(&pw_sets, &slot);
	struct pw_set *set;
	__u32 *verdict;
	__u32 at;

	if (!set_id)
		return 0;
	if (!inner)
		return PW_V_DENY;
	set = bpf_map_lookup_elem(inner, &set_id);
	if (set && set->starts[0]) { /* another set for each interval of source ports */
		at = pw_interval(set, (service & ~0xffff) | bpf_ntohs(be_sport));
		key.set_id = set->defaults[at];
		set = bpf_map_lookup_elem(inner, &key.set_id);
	}
	if (!set)
		return PW_V_DENY;
	at = pw_interval(set, service);
	key.port_class = set->classes[at];
	inner = bpf_map_lookup_elem(&pw_cells, &slot);
	if (!inner)
		return PW_V_DENY;
	verdict = bpf_map_lookup_elem(inner, &key);
	return verdict ? *verdict : set->defaults[at];
}

/* Both sides' verdicts on a flow from @from to @to; of a side that does not bind it stays 0. */
PW_INLINE void pw_decide(__u32 slot, const struct pw_peer *from, const struct pw_peer *to,
			 __u32 service, __u16 be_sport, __u32 sides, struct pw_conn *conn)
{
	if (sides & PW_SIDE_EGRESS)
		conn->egress = pw_cell(slot, from->set_out, to->class_id, service, be_sport);
	if (sides & PW_SIDE_INGRESS)
		conn->ingress = pw_cell(slot, to->set_in, from->class_id, service, be_sport);
}

/* 0, or the reason to drop, with the rule's number. */
PW_INLINE __u32 pw_denied(const struct pw_conn *conn)
{
	__u32 verdict = conn->egress, side = 0;

	if (!(verdict & PW_V_DENY)) {
		verdict = conn->ingress;
		side = PW_BY_RECEIVER;
	}
	if (!(verdict & PW_V_DENY))
		return 0;
	return PW_R_POLICY | side | (verdict & PW_V_RULE) << PW_RULE_SHIFT |
	       (verdict & PW_V_RESET ? PW_RESETS : 0);
}

/* A side that would deny what is open, and keeps it: it goes by the @old verdict. */
PW_INLINE __u32 pw_kept(__u32 verdict, __u32 old)
{
	return (verdict & (PW_V_DENY | PW_V_KEEP)) == (PW_V_DENY | PW_V_KEEP) ? old : verdict;
}

__noinline int pw_parse_quoted_l4(struct __sk_buff *skb, struct pw_packet *quoted)
{
	return quoted ? pw_parse_l4(skb, quoted) : PW_R_TRUNCATED;
}

/* The layer 4 header of the packet that an ICMP error quotes, as a packet of its own. */
PW_INLINE bool pw_quoted(struct __sk_buff *skb, const struct pw_packet *pkt, struct pw_packet *in)
{
	__u32 off = pkt->l4_off + 8;

	in->l3_len = skb->len; /* what is cut off can't be read */
	if (pkt->be_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, off, &ip, sizeof(ip)))
			return false;
		/* No header, or of a piece without ports. */
		if (ip.version != 4 || ip.ihl < 5 || (ip.frag_off & bpf_htons(0x1fff)))
			return false;
		pw_addr_v4(&in->saddr, ip.saddr);
		pw_addr_v4(&in->daddr, ip.daddr);
		in->proto = ip.protocol;
		in->l4_off = off + ip.ihl * 4;
	} else {
		struct ipv6hdr ip6;

		if (bpf_skb_load_bytes(skb, off, &ip6, sizeof(ip6)))
			return false;
		pw_addr_v6(&in->saddr, &ip6.saddr);
		pw_addr_v6(&in->daddr, &ip6.daddr);
		in->proto = ip6.nexthdr;
		in->l4_off = off + sizeof(ip6);
		if (pw_is_ext(in->proto) && pw_parse_ext(skb, in))
			return false;
	}
	return !(in->flags & PW_P_LATER_FRAGMENT) && !pw_parse_quoted_l4(skb, in);
}

/*
 * Is it an ICMP error about a flow that we let through? It goes to the quoted
 * packet's sender; one that a sandbox sends comes from its receiver, as a
 * sandbox is no router.
 */
__noinline int pw_related(struct __sk_buff *skb, struct pw_packet *pkt, __u32 generation,
			  __u32 sides)
{
	struct pw_packet in = {};
	struct pw_flow key = {};
	struct pw_conn *known;

	if (!pkt || (pkt->flags & PW_P_LATER_FRAGMENT) || !pw_quoted(skb, pkt, &in))
		return 0;
	if (!pw_addr_equal(&in.saddr, &pkt->daddr))
		return 0;
	if ((sides & PW_SIDE_EGRESS) && !pw_addr_equal(&in.daddr, &pkt->saddr))
		return 0;
	pw_flow_key(&key, &in);
	known = bpf_map_lookup_elem(&pw_conns, &key);
	/* As policy said of the packet that it is about; and nobody outside saw a flow between ports. */
	return known && known->generation == generation &&
	       !(sides == PW_SIDE_INGRESS && known->sides == PW_SIDES);
}

/*
 * A later fragment goes the way of its datagram's first one, which has the
 * ports: 0 if that was let through in this generation. @first: it was.
 */
__noinline int pw_fragment(struct pw_packet *pkt, __u32 generation, __u32 first)
{
	struct pw_flow key;
	__u32 *judged;

	if (!pkt || !generation)
		return 0;
	key = *pw_way(pkt);
	__builtin_memcpy(&key.be_sport, &pkt->be_frag_id, sizeof(pkt->be_frag_id));
	if (first)
		return bpf_map_update_elem(&pw_frags, &key, &generation, BPF_ANY);
	judged = bpf_map_lookup_elem(&pw_frags, &key);
	return judged && *judged == generation ? 0 : PW_R_FRAGMENT_ORDER;
}

/*
 * Is the packet one of this open flow, or does it open another on its key? It
 * does if it comes another way: the target has become a port since the flow
 * was judged, or it comes from outside with a port's address.
 */
PW_INLINE bool pw_is_of(const struct pw_packet *pkt, const struct pw_conn *conn, __u32 sides,
			bool answers)
{
	bool icmp = pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6;
	bool opens = pkt->flags & PW_P_OPENS;

	if (icmp ? opens == answers : opens)
		return false;
	if (answers)
		return (sides == PW_SIDES) == (conn->sides == PW_SIDES);
	return sides == conn->sides;
}

/*
 * The flow of a packet, judged: 0, or the reason to drop. @port: whose flow it
 * is if it is new; the sender's where the sender's policy binds. @sides: whose
 * policies bind here, along the packet's way.
 *
 * What opens is a flow of its own, whatever is open on its key: else what may
 * answer could also open, and what may stay could be opened again.
 */
__noinline __u32 pw_policy(struct __sk_buff *skb, struct pw_packet *pkt, struct pw_port *port,
			   __u32 generation, __u32 sides)
{
	__u32 slot = generation & (PW_SLOTS - 1);
	struct pw_conn conn;
	struct pw_peer source, target;
	struct pw_conn *known;
	struct pw_flow key = {};
	bool first, answers = false, open = false;
	__u8 tcp = pkt ? pkt->tcp_flags : 0;
	__u32 reason = 0;

	if (!pkt || !port)
		return PW_R_NOT_READY;
	first = pw_flow_key(&key, pkt);
	known = bpf_map_lookup_elem(&pw_conns, &key);
	if (known) {
		answers = first != !!(known->flags & PW_CF_FIRST_OPENED);
		open = pw_is_of(pkt, known, sides, answers);
		if (open && known->generation == generation)
			goto seen;
		if (!open)
			answers = false;
	}
	conn = (struct pw_conn){ .generation = generation, .sides = sides };
	if (generation) {
		if (!pw_find_peer(slot,
				  sides & PW_SIDE_EGRESS ? pw_own_addr(port, pkt) : &pkt->saddr,
				  &source) ||
		    !pw_find_peer(slot, &pkt->daddr, &target))
			return PW_R_NOT_READY;
		/* A port whose address the generation does not know waits for one that does. */
		if (((sides & PW_SIDE_EGRESS) && !source.owner) ||
		    ((sides & PW_SIDE_INGRESS) && !target.owner))
			return PW_R_NOT_READY;
		/* A port's address that comes from elsewhere is a lie, and would be an identity. */
		if (sides == PW_SIDE_INGRESS && source.owner &&
		    bpf_map_lookup_elem(&pw_addrs, first ? &key.saddr : &key.daddr))
			return PW_R_SRC_IP;
		if (answers)
			pw_decide(slot, &target, &source,
				  pw_service(pkt, pkt->be_sport, key.be_dport), pkt->be_dport,
				  known->sides, &conn);
		else
			pw_decide(slot, &source, &target,
				  pw_service(pkt, pkt->be_dport,
					     pkt->icmp_type << 8 | pkt->icmp_code),
				  pkt->be_sport, sides, &conn);
		if (open) {
			conn.egress = pw_kept(conn.egress, known->egress);
			conn.ingress = pw_kept(conn.ingress, known->ingress);
		}
		reason = pw_denied(&conn);
		PW_STEP(skb, PW_S_POLICY, conn.egress, conn.ingress);
	}
	if (pw_traced(skb) || (reason && !open))
		return reason & ~PW_RESETS;
	if (reason) {
		if (!(reason & PW_RESETS) || pkt->proto != IPPROTO_TCP) {
			pw_conn_close(&key, known);
			return reason & ~PW_RESETS;
		}
		/* Known for a minute more, in which its ends' packets tell them. */
		if (known->flags & PW_CF_REPLIED) {
			known->flags &= ~PW_CF_REPLIED;
			known->last_ns = bpf_ktime_get_coarse_ns();
		}
		return reason;
	}
	if ((conn.egress | conn.ingress) & PW_V_LOG && !open)
		pw_event(skb, pkt, port->port_id, sides == PW_SIDE_INGRESS ? PW_TO_PORT << 8 : 0,
			 (conn.egress & PW_V_LOG ? conn.egress : conn.ingress) & PW_V_RULE);
	if (known) {
		known->egress = conn.egress;
		known->ingress = conn.ingress;
		known->generation = generation;
		if (!answers)
			known->sides = sides;
		if (!open)
			known->flags = first ? PW_CF_FIRST_OPENED : 0;
		goto seen;
	}
	if (!generation && (tcp & (PW_TCP_SYN | PW_TCP_ACK)) != PW_TCP_SYN)
		return 0; /* of a flow that nobody saw opened */
	conn.last_ns = bpf_ktime_get_coarse_ns();
	conn.flags = first ? PW_CF_FIRST_OPENED : 0;
	conn.ifindex = skb->ifindex;
	barrier(); /* else the two loads become one through a computed pointer, which ctx does not allow */
	if (sides & PW_SIDE_EGRESS)
		conn.ifindex = skb->ingress_ifindex;
	reason = pw_conn_open(&key, &conn, port);
	return generation ? reason : 0;
seen:
	if (!pw_traced(skb))
		pw_conn_seen(known, tcp, first);
	return 0;
}

/*
 * Tells the sender of a TCP packet that its connection has ended: turns the
 * packet into the RST of its other end. @port: whose sandbox the sender is;
 * NULL: it is outside.
 */
__noinline int pw_reset(struct __sk_buff *skb, struct pw_packet *pkt, const struct pw_port *port)
{
	bool v4 = pkt && pkt->be_proto == bpf_htons(ETH_P_IP);
	__u32 off = ETH_HLEN + (v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	__u32 check_off = off + offsetof(struct tcphdr, check);
	__u32 len_off = ETH_HLEN + (v4 ? 2 : 4); /* of tot_len; of payload_len */
	struct tcphdr tcp, rst = {};
	__be16 len = bpf_htons(sizeof(rst) + (v4 ? sizeof(struct iphdr) : 0)), old_len;
	__u8 macs[2 * ETH_ALEN];
	__u16 check, again;
	__s64 sum;

	if (!pkt || bpf_skb_load_bytes(skb, pkt->l4_off, &tcp, sizeof(tcp)) || tcp.rst)
		return TC_ACT_SHOT;
	/* With options it is dropped like others: an end that lives sends plain ones too. */
	if (pkt->l4_off != off || bpf_skb_change_tail(skb, off + sizeof(rst), 0))
		return TC_ACT_SHOT;
	bpf_skb_load_bytes(skb, 0, macs, sizeof(macs));
	bpf_skb_store_bytes(skb, 0, macs + ETH_ALEN, ETH_ALEN, 0);
	bpf_skb_store_bytes(skb, ETH_ALEN, macs, ETH_ALEN, 0);
	bpf_skb_load_bytes(skb, len_off, &old_len, sizeof(old_len));
	bpf_skb_store_bytes(skb, len_off, &len, sizeof(len), 0);
	if (v4)
		bpf_l3_csum_replace(skb, ETH_HLEN + 10, old_len, len, sizeof(len));
	pw_swap_addrs(skb, pkt);
	rst.source = tcp.dest;
	rst.dest = tcp.source;
	rst.seq = tcp.ack_seq;
	rst.doff = sizeof(rst) / 4;
	rst.rst = 1;
	sum = pw_pseudo_sum(&pkt->daddr, &pkt->saddr, sizeof(rst), IPPROTO_TCP);
	/*
	 * Is the checksum still to be made, by whoever sends it on? Then this
	 * changes nothing, and the sum of the pseudo header belongs there.
	 */
	bpf_skb_load_bytes(skb, check_off, &check, sizeof(check));
	bpf_l4_csum_replace(skb, check_off, 0, bpf_htons(1), sizeof(check));
	bpf_skb_load_bytes(skb, check_off, &again, sizeof(again));
	rst.check = check == again
			    ? ~pw_fold(sum)
			    : pw_fold(bpf_csum_diff(NULL, 0, (__be32 *)&rst, sizeof(rst), sum));
	bpf_skb_store_bytes(skb, off, &rst, sizeof(rst), BPF_F_INVALIDATE_HASH);
	if (port) {
		if (!(port->flags & PW_PF_TAP)) /* else pw_to_port does */
			pw_count(skb, pkt, port->port_id, PW_TO_PORT, skb->len, false);
		return pw_send_back(skb, port);
	}
	skb->mark = PW_RESET_MARK;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/* A function, so that ctx is used at its fields' own places. */
__noinline int pw_unmark(struct __sk_buff *skb)
{
	skb->mark = 0;
	return 0;
}

/* The end of a packet that policy refuses: counted, and where the rule says so its sender is told. */
PW_INLINE int pw_refuse(struct __sk_buff *skb, struct pw_packet *pkt, __u64 port_id, __u32 dir,
			__u32 verdict, const struct pw_port *sender)
{
	pw_drop(skb, pkt, port_id, dir << 8 | (verdict & 0xff),
		verdict >> PW_RULE_SHIFT & PW_V_RULE);
	return verdict & PW_RESETS ? pw_reset(skb, pkt, sender) : TC_ACT_SHOT;
}

#endif
