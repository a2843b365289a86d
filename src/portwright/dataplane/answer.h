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

/* Swaps the Ethernet addresses; the answer to @what (PW_S_ANSWERED's) goes back into the sandbox. */
__noinline int pw_bounce(struct __sk_buff *skb, const struct pw_port *port, __u32 what)
{
	if (!port)
		return TC_ACT_SHOT;
	PW_STEP(skb, PW_S_ANSWERED, what, 0);
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
	if (arp.head != bpf_cpu_to_be64(PW_ARP_REQUEST) || !pw_answers_for(port, &target))
		return TC_ACT_UNSPEC;
	__builtin_memcpy(arp.tpa, arp.spa, 4);
	__builtin_memcpy(arp.tha, arp.sha, ETH_ALEN);
	__builtin_memcpy(arp.spa, &target.be[3], 4);
	__builtin_memcpy(arp.sha, port->gateway_mac, ETH_ALEN);
	arp.head = bpf_cpu_to_be64(PW_ARP_REPLY);
	bpf_skb_store_bytes(skb, ETH_HLEN, &arp, sizeof(arp), 0);
	return pw_bounce(skb, port, 1);
}

struct pw_na {
	struct pw_nd nd;
	__u8 opt[8];
};

/* The sum of a pseudo header (RFC 8200, 8.1); of mapped addresses it is IPv4's, as 0xffff adds nothing. */
PW_INLINE __s64 pw_pseudo_sum(const struct pw_addr *saddr, const struct pw_addr *daddr, __u32 len,
			      __u32 proto)
{
	struct {
		struct pw_addr addrs[2];
		__be32 len_proto[2];
	} pseudo = { { *saddr, *daddr }, { bpf_htonl(len), bpf_htonl(proto) } };

	return bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
}

#define PW_NA_LEN (ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct pw_na))

__noinline int pw_answer_ns(struct __sk_buff *skb, const struct pw_port *port,
			    struct pw_packet *pkt)
{
	struct pw_na na = {};
	struct ipv6hdr ip6;
	__s64 sum;

	/* The header chain of a solicitation has no extension (RFC 6980, 5). */
	if (!port || !pkt || pkt->l4_off != ETH_HLEN + sizeof(ip6) || pw_addr_zero(&pkt->saddr))
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6)) ||
	    bpf_skb_load_bytes(skb, pkt->l4_off, &na.nd, sizeof(na.nd)) || na.nd.code ||
	    pw_addr_zero(&na.nd.target) || !pw_answers_for(port, &na.nd.target))
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
	sum = pw_pseudo_sum(&na.nd.target, &pkt->saddr, sizeof(na), IPPROTO_ICMPV6);
	na.nd.csum = pw_fold(bpf_csum_diff(NULL, 0, (__be32 *)&na, sizeof(na), sum));

	ip6.payload_len = bpf_htons(sizeof(na));
	ip6.hop_limit = 255;
	__builtin_memcpy(&ip6.daddr, &pkt->saddr, sizeof(ip6.daddr));
	__builtin_memcpy(&ip6.saddr, &na.nd.target, sizeof(ip6.saddr));
	bpf_skb_store_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6), BPF_F_RECOMPUTE_CSUM);
	bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(ip6), &na, sizeof(na), BPF_F_RECOMPUTE_CSUM);
	return pw_bounce(skb, port, 2);
}

/* The packet's addresses, swapped: every checksum stays as it was. */
PW_INLINE void pw_swap_addrs(struct __sk_buff *skb, const struct pw_packet *pkt)
{
	struct pw_addr pair[2] = { pkt->daddr, pkt->saddr };
	__be32 pair4[2] = { pkt->daddr.be[3], pkt->saddr.be[3] };

	if (pkt->be_proto == bpf_htons(ETH_P_IP))
		bpf_skb_store_bytes(skb, ETH_HLEN + 12, pair4, sizeof(pair4), BPF_F_RECOMPUTE_CSUM);
	else
		bpf_skb_store_bytes(skb, ETH_HLEN + 8, pair, sizeof(pair), BPF_F_RECOMPUTE_CSUM);
}

__noinline int pw_answer_echo(struct __sk_buff *skb, const struct pw_port *port,
			      struct pw_packet *pkt)
{
	bool v4 = pkt && pkt->be_proto == bpf_htons(ETH_P_IP);
	__u8 asked = v4 ? 8 : 128, answer = v4 ? 0 : 129;

	/* Whole, plain and with all of its header (RFC 792); else it is a miss. */
	if (!port || !pkt || (pkt->flags & (PW_P_FRAGMENT | PW_P_OPTIONS)) ||
	    pkt->l4_off + 8 > ETH_HLEN + pkt->l3_len || pkt->icmp_type != asked ||
	    pw_addr_zero(&pkt->daddr) ||
	    !pw_addr_equal(&pkt->daddr, v4 ? &port->gateway4 : &port->gateway6))
		return TC_ACT_UNSPEC;
	pw_swap_addrs(skb, pkt);
	bpf_l4_csum_replace(skb, pkt->l4_off + 2, bpf_htons(asked << 8), bpf_htons(answer << 8), 2);
	bpf_skb_store_bytes(skb, pkt->l4_off, &answer, 1, BPF_F_RECOMPUTE_CSUM);
	return pw_bounce(skb, port, 3);
}

/* The verdict of an answered question, or TC_ACT_UNSPEC. */
PW_INLINE int pw_answer(struct __sk_buff *skb, const struct pw_port *port, struct pw_packet *pkt)
{
	if (pkt->be_proto == bpf_htons(ETH_P_ARP))
		return pw_answer_arp(skb, port);
	if (pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type == 135)
		return pw_answer_ns(skb, port, pkt);
	if (pkt->proto == IPPROTO_ICMPV6 || pkt->proto == IPPROTO_ICMP)
		return pw_answer_echo(skb, port, pkt);
	return TC_ACT_UNSPEC;
}

#endif
