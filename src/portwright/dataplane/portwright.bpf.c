// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The switch: one program for each direction of a representor.
 *
 *   pw_from_port  ingress of the representor: all that the sandbox sends
 *   pw_to_port    egress of the representor: all that the host's stack, or an
 *                 operator, transmits to the sandbox
 *
 * A packet between two ports of this host goes from pw_from_port straight into
 * the other sandbox (bpf_redirect_peer) and never meets pw_to_port. The rule
 * that binds both ways of delivery: same verdict, same packet, same totals
 * (reference/representor.md, R7). Whatever the fast path can't do exactly as
 * the host's stack would - an expired TTL, a packet over the target's MTU,
 * fragments, options, flows that the host translates - it leaves to the stack.
 */
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <stddef.h>

#include "abi.h"
#include "maps.h"
#include "packet.h"
#include "count.h"
#include "guard.h"
#include "answer.h"
#include "limit.h"
#include "policy.h"

/*
 * TCX_NEXT and clsact's TC_ACT_UNSPEC are the same -1: go on to the next
 * program, an operator's filter may follow ours.
 */
#define PW_NEXT TC_ACT_UNSPEC

/*
 * skb->tc_index of a packet that a sandbox addressed to a port itself: what the
 * host's stack hands to the target's representor is then the same flow, not a
 * translated one. It survives forwarding and reassembly, and each packet from
 * a sandbox has it set anew.
 */
#define PW_TC_DIRECT 0x7077

/* May packets pass between these networks? */
PW_INLINE bool pw_may_reach(__u32 from_net, __u32 to_net)
{
	struct pw_reach_key key = { .from_net = from_net, .to_net = to_net };

	return from_net == to_net || bpf_map_lookup_elem(&pw_reach, &key);
}

/* Must this packet for a local port go through the host's stack, and why? */
PW_INLINE __u32 pw_slow_reason(struct __sk_buff *skb, const struct pw_port *port,
			       const struct pw_packet *pkt, const struct pw_target *target)
{
	__u32 zero = 0;
	struct pw_state *state = bpf_map_lookup_elem(&pw_state, &zero);

	if (!state || (state->flags & PW_SF_SLOW_ONLY))
		return PW_SLOW_CONFIG;
	/* What its answer opens has to be open before the sandbox hears it (plan/steer.py). */
	if ((port->flags & PW_PF_NAMES) && pkt->be_dport == bpf_htons(53) &&
	    (pkt->proto == IPPROTO_UDP || pkt->proto == IPPROTO_TCP))
		return PW_SLOW_NAMES;
	if (target->flags & PW_PF_TAP)
		return PW_SLOW_TAP;
	if (pkt->ttl <= 1)
		return PW_SLOW_TTL;
	/* fe80::/10 to a global address: the stack refuses it and says so (RFC 4443, 3.1). */
	if ((pkt->saddr.be[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return PW_SLOW_SCOPE;
	/* Reassembled there, so that a translated flow stays translated. */
	if (pkt->flags & PW_P_FRAGMENT)
		return PW_SLOW_FRAGMENT;
	if (pkt->flags & PW_P_OPTIONS)
		return PW_SLOW_OPTIONS;
	if (skb->len != ETH_HLEN + pkt->l3_len)
		return PW_SLOW_PADDING;
	/* Of tunnels' and SCTP's super-packets we can't tell how large they become. */
	if (skb->gso_size && pkt->proto != IPPROTO_TCP && pkt->proto != IPPROTO_UDP)
		return PW_SLOW_MTU;
	if (pkt->wire_l3 > target->mtu)
		return PW_SLOW_MTU;
	if (state->slow_flows) {
		if (bpf_map_lookup_elem(&pw_slow_flows, pw_way(pkt)))
			return PW_SLOW_FLOW;
		/* It quotes the packet that caused it, which may need translation too. */
		if (pw_icmp_error(pkt))
			return PW_SLOW_ERROR;
	}
	return PW_SLOW_NONE;
}

/* Ethernet, and IPv4's header to its checksum. */
struct pw_rewrite {
	__u8 macs[2 * ETH_ALEN];
	__be16 proto;
	__u16 ip[6];
} __attribute__((packed));

/*
 * What the host's stack does to a packet that it forwards: TTL and MACs. By
 * the helper only: a write through skb->data would have every packet looked at
 * for being a clone, in the program's prologue, and not only this one.
 */
PW_INLINE int pw_forward(struct __sk_buff *skb, const struct pw_packet *pkt,
			 const struct pw_target *target)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u8 hop_limit = pkt->ttl - 1;
	__u32 ifindex = target->ifindex;
	__u32 len = sizeof(struct pw_rewrite);
	struct pw_rewrite head;
	__u32 check;

	if (data + sizeof(head) > end)
		return TC_ACT_SHOT;
	__builtin_memcpy(&head, data, sizeof(head));
	__builtin_memcpy(head.macs, target->mac, ETH_ALEN);
	__builtin_memcpy(head.macs + ETH_ALEN, target->gateway_mac, ETH_ALEN);
	if (pkt->be_proto == bpf_htons(ETH_P_IP)) {
		/* ip_decrease_ttl(): the checksum moves with it (RFC 1624) */
		check = head.ip[5] + bpf_htons(0x0100);
		head.ip[4] -= bpf_htons(0x0100);
		head.ip[5] = check + (check >= 0xffff);
	} else {
		len = sizeof(head.macs);
		bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, hop_limit), &hop_limit,
				    1, BPF_F_RECOMPUTE_CSUM);
	}
	if (bpf_skb_store_bytes(skb, 0, &head, len, 0))
		return TC_ACT_SHOT;
	return bpf_redirect_peer(ifindex, 0);
}

/*
 * What policy says of the packet: 0, or the reason to drop, with PW_BY_RECEIVER
 * where the receiver's policy decided. @port: as in pw_policy().
 */
PW_INLINE __u32 pw_judge(struct __sk_buff *skb, struct pw_packet *pkt, struct pw_port *port,
			 __u32 sides)
{
	__u32 zero = 0, generation, reason;
	__u32 *in_force = bpf_map_lookup_elem(&pw_generation, &zero);

	if (!in_force)
		return PW_R_NOT_READY;
	if (skb->mark == PW_RESET_MARK)
		return pw_unmark(skb); /* a RST of pw_reset() */
	/* Read once: all of the verdict is of one generation. */
	generation = READ_ONCE(*in_force);
	if (!generation && !(pkt->tcp_flags & (PW_TCP_SYN | PW_TCP_FIN | PW_TCP_RST)))
		return 0;
	if (pw_is_nd(pkt))
		return 0;
	if (pkt->flags & PW_P_LATER_FRAGMENT)
		return pw_fragment(pkt, generation, false);
	if (pw_icmp_error(pkt) && pw_related(skb, pkt, generation, sides))
		return 0;
	reason = pw_policy(skb, pkt, port, generation, sides);
	if (!reason && (pkt->flags & PW_P_FRAGMENT))
		pw_fragment(pkt, generation, true);
	return reason;
}

/* To a port of this host, or to whatever the host's stack makes of it. */
PW_INLINE int pw_deliver(struct __sk_buff *skb, struct pw_port *port, struct pw_packet *pkt)
{
	const struct pw_target *target = NULL;
	__u32 slow, verdict;

	skb->tc_index = 0;
	if (pkt->flags & PW_P_MULTICAST) {
		PW_STEP(skb, PW_S_MULTICAST, 0, 0);
	} else {
		target = bpf_map_lookup_elem(&pw_addrs, &pkt->daddr);
		if (!target)
			PW_STEP(skb, PW_S_NO_TARGET, 0, 0);
	}
	if (target) {
		PW_STEP(skb, PW_S_TARGET, target->ifindex, target->net_id);
		if (target->ifindex == skb->ifindex)
			return PW_DROP(skb, pkt, port->port_id, PW_FROM_PORT, PW_R_LOOP);
		/* RFC 1812, 5.3.4: a router does not forward what was broadcast to it. */
		if (pkt->flags & PW_P_GROUP_MAC)
			return PW_DROP(skb, pkt, port->port_id, PW_FROM_PORT, PW_R_DST_MAC);
		if (!pw_may_reach(port->net_id, target->net_id))
			return pw_drop(skb, pkt, port->port_id, PW_FROM_PORT << 8 | PW_R_ISOLATION,
				       target->net_id);
		if (port->net_id != target->net_id)
			PW_STEP(skb, PW_S_REACH_OK, port->net_id, target->net_id);
	}
	verdict = pw_judge(skb, pkt, port, target ? PW_SIDES : PW_SIDE_EGRESS);
	if (verdict && !(target && (verdict & PW_BY_RECEIVER)))
		return pw_refuse(skb, pkt, port->port_id, PW_FROM_PORT, verdict, port);
	if (!target)
		return PW_NEXT;
	if (verdict)
		goto refused;
	/* A redirect to the peer would not look at the representor's state. */
	verdict = PW_R_LINK_DOWN;
	if (target->flags & PW_PF_DOWN)
		goto refused;
	slow = pw_slow_reason(skb, port, pkt, target);
	if (slow) {
		PW_STEP(skb, PW_S_SLOW, slow, 0);
		skb->tc_index = PW_TC_DIRECT;
		return PW_NEXT;
	}
	verdict = PW_R_LIMIT;
	if ((target->flags & PW_PF_LIMIT_TO) && pw_over_limit(skb, target->port_id, PW_TO_PORT))
		goto refused;
	PW_STEP(skb, PW_S_FAST, target->ifindex, 0);
	pw_count(skb, pkt, port->port_id, PW_FROM_PORT, skb->len, false);
	pw_count(skb, pkt, target->port_id, PW_TO_PORT, skb->len, false);
	return pw_forward(skb, pkt, target);
refused:
	/* The sender's part was carried; the receiver's port refused it. */
	pw_count(skb, pkt, port->port_id, PW_FROM_PORT, skb->len, false);
	return pw_refuse(skb, pkt, target->port_id, PW_TO_PORT, verdict, port);
}

SEC("tc")
int pw_from_port(struct __sk_buff *skb)
{
	struct pw_packet pkt = {};
	__u32 ifindex = skb->ifindex;
	struct pw_port *port;
	int reason, verdict;
	__u32 octets;

	port = bpf_map_lookup_elem(&pw_ports, &ifindex);
	if (!port)
		return PW_DROP(skb, &pkt, 0, PW_FROM_PORT, PW_R_NO_PORT);
	PW_STEP(skb, PW_S_PORT, port->net_id, 0);

	reason = pw_parse(skb, &pkt);
	/* Layer 2 first: a stranger's frame is a stranger's whatever it holds. */
	verdict = pw_guard_l2(skb, port, &pkt);
	if (verdict)
		reason = verdict;
	if (reason)
		return PW_DROP(skb, &pkt, port->port_id, PW_FROM_PORT, reason);
	PW_STEP(skb, PW_S_PARSED, bpf_ntohs(pkt.be_proto), pkt.proto);

	if (pkt.be_proto == bpf_htons(ETH_P_ARP)) {
		reason = pw_guard_arp(skb, port, &pkt);
	} else if (pkt.be_proto == bpf_htons(ETH_P_IP) || pkt.be_proto == bpf_htons(ETH_P_IPV6)) {
		reason = pw_guard_ip(skb, port, &pkt);
		pkt.wire_l3 = pw_wire_l3(skb, &pkt);
		if (!reason && pkt.wire_l3 > port->mtu)
			reason = PW_R_MTU;
	} else {
		reason = PW_R_ETHERTYPE;
	}
	if (reason)
		return PW_DROP(skb, &pkt, port->port_id, PW_FROM_PORT, reason);
	PW_STEP(skb, PW_S_GUARD_OK, 0, 0);

	if ((port->flags & PW_PF_LIMIT_FROM) && pw_over_limit(skb, port->port_id, PW_FROM_PORT))
		return PW_DROP(skb, &pkt, port->port_id, PW_FROM_PORT, PW_R_LIMIT);

	octets = skb->len;
	verdict = pw_answer(skb, port, &pkt);
	if (verdict != TC_ACT_UNSPEC) {
		pw_count(skb, &pkt, port->port_id, PW_FROM_PORT, octets, false);
		if (!(port->flags & PW_PF_TAP)) /* else pw_to_port does */
			pw_count(skb, &pkt, port->port_id, PW_TO_PORT, skb->len, false);
		return verdict;
	}
	if (pkt.be_proto != bpf_htons(ETH_P_ARP))
		verdict = pw_deliver(skb, port, &pkt); /* else it is PW_NEXT */
	/* To a neighbour's MAC, as it believes: whose it is, is ours to find. */
	if (verdict == PW_NEXT && (port->flags & PW_PF_ONLINK) && !(pkt.flags & PW_P_GROUP_MAC))
		bpf_skb_change_type(skb, PACKET_HOST);
	if (verdict == PW_NEXT)
		pw_count(skb, &pkt, port->port_id, PW_FROM_PORT, octets, true);
	return verdict;
}

/*
 * What the host transmits on the representor is for the sandbox, whoever sent
 * it (R5). Only a packet that the stack *forwarded* from another port of ours
 * is traffic between sandboxes; skb_iif says so, and is 0 for what the host
 * itself sends, whatever addresses it carries.
 */
SEC("tc")
int pw_to_port(struct __sk_buff *skb)
{
	struct pw_packet pkt = {};
	__u32 ifindex = skb->ifindex;
	__u32 from_ifindex = skb->ingress_ifindex;
	struct pw_port *port, *from = NULL;
	bool is_ip, unread;
	__u32 sides, verdict;

	port = bpf_map_lookup_elem(&pw_ports, &ifindex);
	if (!port)
		return PW_DROP(skb, &pkt, 0, PW_TO_PORT, PW_R_NO_PORT);
	PW_STEP(skb, PW_S_PORT, port->net_id, 0);

	if (from_ifindex && from_ifindex != ifindex)
		from = bpf_map_lookup_elem(&pw_ports, &from_ifindex);
	/* An unreadable header is no reason to refuse what the host sends. */
	unread = pw_parse(skb, &pkt);
	if (unread)
		pkt.flags |= PW_P_FRAGMENT | PW_P_LATER_FRAGMENT;
	is_ip = pkt.be_proto == bpf_htons(ETH_P_IP) || pkt.be_proto == bpf_htons(ETH_P_IPV6);
	if (from) {
		if (!pw_may_reach(from->net_id, port->net_id))
			return pw_drop(skb, &pkt, port->port_id, PW_TO_PORT << 8 | PW_R_ISOLATION,
				       from->net_id);
		if (from->net_id != port->net_id)
			PW_STEP(skb, PW_S_REACH_OK, from->net_id, port->net_id);
		if (skb->tc_index != PW_TC_DIRECT && is_ip) {
			/* Translated, as far as we know: its replies must come back to the stack. */
			struct pw_flow reply = pw_way_back(&pkt);
			__u32 zero = 0, one = 1;
			struct pw_state *state = bpf_map_lookup_elem(&pw_state, &zero);

			if (state && !pw_traced(skb)) {
				if (!bpf_map_lookup_elem(&pw_slow_flows, &reply))
					bpf_map_update_elem(&pw_slow_flows, &reply, &one, BPF_ANY);
				if (!state->slow_flows)
					state->slow_flows = 1;
			}
		}
	}
	sides = from ? PW_SIDES : from_ifindex ? PW_SIDE_INGRESS : 0;
	if (is_ip && (sides || !unread)) {
		verdict = pw_judge(skb, &pkt, from ? from : port, sides);
		if (verdict)
			return pw_refuse(skb, &pkt, port->port_id, PW_TO_PORT, verdict, NULL);
	}
	if (is_ip && pkt.l4_off && pw_wire_l3(skb, &pkt) > port->mtu)
		return PW_DROP(skb, &pkt, port->port_id, PW_TO_PORT, PW_R_MTU);
	if ((port->flags & PW_PF_LIMIT_TO) && pw_over_limit(skb, port->port_id, PW_TO_PORT))
		return PW_DROP(skb, &pkt, port->port_id, PW_TO_PORT, PW_R_LIMIT);
	PW_STEP(skb, PW_S_DELIVER, ifindex, 0);
	pw_count(skb, &pkt, port->port_id, PW_TO_PORT, skb->len, true);
	return PW_NEXT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
