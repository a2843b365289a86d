/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The gateway: it has an address in every sandbox's routes and on no device
 * of the host. ARP, neighbour discovery and echo for it are answered here, by
 * turning the question into the answer and sending it back in.
 */
#ifndef PW_ANSWER_H
#define PW_ANSWER_H

#include "guard.h"

/* Back into the sandbox that sent it, past pw_to_port, or with a mark through it. */
PW_INLINE int pw_send_back(struct __sk_buff *skb, const struct pw_port *port)
{
	if (!(port->flags & PW_PF_TAP))
		return bpf_redirect_peer(skb->ifindex, 0);
	skb->mark = PW_RESET_MARK;
	return bpf_redirect(skb->ifindex, 0);
}

/* Swaps the Ethernet addresses; the packet goes back into the sandbox. */
__noinline int pw_bounce(struct __sk_buff *skb, const struct pw_port *port)
{
	if (!port)
		return TC_ACT_SHOT;
	bpf_skb_store_bytes(skb, 0, port->mac, ETH_ALEN, 0);
	bpf_skb_store_bytes(skb, ETH_ALEN, port->gateway_mac, ETH_ALEN, 0);
	return pw_send_back(skb, port);
}

/* Does the gateway answer for @addr? It has one in each family, and stands in for all of what was a bridge. */
__noinline bool pw_answers_for(const struct pw_port *port, const struct pw_addr *addr)
{
	if (!port || !addr)
		return false;
	return pw_addr_equal(addr, &port->gateway4) || pw_addr_equal(addr, &port->gateway6) ||
	       ((port->flags & PW_PF_ONLINK) && !pw_owns(port, addr));
}

/* Returns a verdict, or TC_ACT_UNSPEC when it is no question for the gateway. */
__noinline int pw_answer_arp(struct __sk_buff *skb, const struct pw_port *port)
{
	struct pw_arp arp;
	struct pw_addr target;

	if (!port || bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)))
		return TC_ACT_UNSPEC;
	pw_addr_v4(&target, *(__be32 *)arp.tpa);
	if (arp.op != bpf_htons(ARPOP_REQUEST) || !pw_answers_for(port, &target))
		return TC_ACT_UNSPEC;
	__builtin_memcpy(arp.tpa, arp.spa, 4);
	__builtin_memcpy(arp.tha, arp.sha, ETH_ALEN);
	__builtin_memcpy(arp.spa, &target.be[3], 4);
	__builtin_memcpy(arp.sha, port->gateway_mac, ETH_ALEN);
	arp.op = bpf_htons(ARPOP_REPLY);
	bpf_skb_store_bytes(skb, ETH_HLEN, &arp, sizeof(arp), 0);
	return pw_bounce(skb, port);
}

struct pw_na {
	struct pw_nd nd;
	__u8 opt[8];
};

struct pw_pseudo {
	struct pw_addr saddr;
	struct pw_addr daddr;
	__be32 len;
	__be32 next;
};

#define PW_NA_LEN (ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct pw_na))

__noinline int pw_answer_ns(struct __sk_buff *skb, const struct pw_port *port,
			    struct pw_packet *pkt)
{
	struct pw_na na = {};
	struct pw_pseudo pseudo = {};
	struct ipv6hdr ip6;
	__s64 sum;

	/* The header chain of a solicitation has no extension (RFC 6980, 5). */
	if (!port || !pkt || pkt->l4_off != ETH_HLEN + sizeof(ip6) || pw_addr_zero(&pkt->saddr))
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, pkt->l4_off, &na.nd, sizeof(na.nd)))
		return TC_ACT_UNSPEC;
	if (na.nd.code || pw_addr_zero(&na.nd.target) || !pw_answers_for(port, &na.nd.target))
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6)))
		return TC_ACT_UNSPEC;
	/*
	 * The option is absent from some unicast probes, and may be followed by
	 * others. What can't be cut (GSO) is no solicitation: a miss.
	 */
	if (skb->len != PW_NA_LEN && bpf_skb_change_tail(skb, PW_NA_LEN, 0))
		return TC_ACT_UNSPEC;

	na.nd.type = 136;
	na.nd.csum = 0;
	na.nd.flags = bpf_htonl(0xe0000000); /* router, solicited, override */
	na.opt[0] = 2;
	na.opt[1] = 1;
	__builtin_memcpy(na.opt + 2, port->gateway_mac, ETH_ALEN);
	pseudo.saddr = na.nd.target;
	pseudo.daddr = pkt->saddr;
	pseudo.len = bpf_htonl(sizeof(na));
	pseudo.next = bpf_htonl(IPPROTO_ICMPV6);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&na, sizeof(na), sum);
	na.nd.csum = pw_fold(sum);

	ip6.payload_len = bpf_htons(sizeof(na));
	ip6.hop_limit = 255;
	__builtin_memcpy(&ip6.daddr, &pkt->saddr, sizeof(ip6.daddr));
	__builtin_memcpy(&ip6.saddr, &na.nd.target, sizeof(ip6.saddr));
	bpf_skb_store_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6), BPF_F_RECOMPUTE_CSUM);
	bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(ip6), &na, sizeof(na), BPF_F_RECOMPUTE_CSUM);
	return pw_bounce(skb, port);
}

/* Swapping source and destination leaves every checksum but ICMP's type as it was. */
__noinline int pw_answer_echo(struct __sk_buff *skb, const struct pw_port *port,
			      struct pw_packet *pkt)
{
	bool v4;
	__be16 from, to;
	__u32 csum_off;

	/* Whole, plain and with all of its header (RFC 792); else it is a miss. */
	if (!port || !pkt || (pkt->flags & (PW_P_FRAGMENT | PW_P_OPTIONS)) ||
	    pkt->l4_off + 8 > ETH_HLEN + pkt->l3_len || pw_addr_zero(&pkt->daddr))
		return TC_ACT_UNSPEC;
	v4 = pkt->be_proto == bpf_htons(ETH_P_IP);
	if (v4) {
		__be32 pair[2];

		if (pkt->icmp_type != 8 || !pw_addr_equal(&pkt->daddr, &port->gateway4))
			return TC_ACT_UNSPEC;
		pair[0] = pkt->daddr.be[3];
		pair[1] = pkt->saddr.be[3];
		bpf_skb_store_bytes(skb, ETH_HLEN + 12, pair, sizeof(pair), BPF_F_RECOMPUTE_CSUM);
		from = bpf_htons(8 << 8);
		to = 0;
	} else {
		struct pw_addr pair[2];

		if (pkt->icmp_type != 128 || !pw_addr_equal(&pkt->daddr, &port->gateway6))
			return TC_ACT_UNSPEC;
		pair[0] = pkt->daddr;
		pair[1] = pkt->saddr;
		bpf_skb_store_bytes(skb, ETH_HLEN + 8, pair, sizeof(pair), BPF_F_RECOMPUTE_CSUM);
		from = bpf_htons(128 << 8);
		to = bpf_htons(129 << 8);
	}
	csum_off = pkt->l4_off + 2;
	bpf_l4_csum_replace(skb, csum_off, from, to, sizeof(from));
	bpf_skb_store_bytes(skb, pkt->l4_off, &to, 1, BPF_F_RECOMPUTE_CSUM);
	return pw_bounce(skb, port);
}

/* The verdict of an answered question, or TC_ACT_UNSPEC. */
PW_INLINE int pw_answer(struct __sk_buff *skb, const struct pw_port *port, struct pw_packet *pkt)
{
	bool arp = pkt->be_proto == bpf_htons(ETH_P_ARP), icmp6 = pkt->proto == IPPROTO_ICMPV6;
	__u32 what = arp				   ? 1
		     : icmp6 && pkt->icmp_type == 135	   ? 2
		     : icmp6 || pkt->proto == IPPROTO_ICMP ? 3
							   : 0;
	int verdict = what == 1	  ? pw_answer_arp(skb, port)
		      : what == 2 ? pw_answer_ns(skb, port, pkt)
		      : what == 3 ? pw_answer_echo(skb, port, pkt)
				  : TC_ACT_UNSPEC;

	if (verdict != TC_ACT_UNSPEC)
		PW_STEP(skb, PW_S_ANSWERED, what, 0);
	return verdict;
}

#endif
