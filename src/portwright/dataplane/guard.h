/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The guard: what a sandbox may claim to be. Always on, before anything else.
 *
 * Each check returns 0 or the reason to drop.
 */
#ifndef PW_GUARD_H
#define PW_GUARD_H

#include "count.h"

/* Options of one ND message that we look at; Linux sends one or two. */
#define PW_ND_OPTIONS 4

/* Ethernet, IPv4, the lengths of their addresses, and what it does (RFC 826). */
#define PW_ARP_REQUEST 0x0001080006040001ULL
#define PW_ARP_REPLY   0x0001080006040002ULL

struct pw_arp {
	__be64 head;
	__u8 sha[ETH_ALEN];
	__u8 spa[4];
	__u8 tha[ETH_ALEN];
	__u8 tpa[4];
} __attribute__((packed, aligned(4)));

#define PW_DHCP4_SERVER 67
#define PW_DHCP4_CLIENT 68
#define PW_DHCP6_CLIENT 546
#define PW_DHCP6_SERVER 547

struct pw_nd {
	__u8 type;
	__u8 code;
	__be16 csum;
	__be32 flags;
	struct pw_addr target;
};

/*
 * Is @addr one that the port may use? Its own (the first of each family needs
 * no look-up), or that of another port of the same sandbox on the same network:
 * a host with two legs answers on the one that its routes choose.
 */
__noinline bool pw_owns(const struct pw_port *port, const struct pw_addr *addr)
{
	const struct pw_target *target;
	struct pw_addr key;

	/* A port of one family has zero in the other's place: :: is not its own for that. */
	if (!port || !addr || pw_addr_zero(addr))
		return false;
	if (pw_addr_equal(addr, &port->addr4) || pw_addr_equal(addr, &port->addr6))
		return true;
	key = *addr; /* before 6.5 a key may not be a global function's argument */
	target = bpf_map_lookup_elem(&pw_addrs, &key);
	return target && target->sandbox == port->sandbox && target->net_id == port->net_id;
}

PW_INLINE int pw_guard_arp(struct __sk_buff *skb, const struct pw_port *port, struct pw_packet *pkt)
{
	struct pw_arp arp;
	__be32 spa;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)))
		return PW_R_TRUNCATED;
	if (bpf_be64_to_cpu(arp.head) >> 16 != PW_ARP_REQUEST >> 16 ||
	    !pw_mac_equal(arp.sha, port->mac))
		return PW_R_ARP_SPOOF;
	__builtin_memcpy(&spa, arp.spa, 4);
	pw_addr_v4(&pkt->saddr, spa);
	pw_addr_v4(&pkt->daddr, *(__be32 *)arp.tpa);
	/* spa 0: a probe before the address is used (RFC 5227, 2.1.1) */
	if (spa && !pw_owns(port, &pkt->saddr))
		return PW_R_ARP_SPOOF;
	return 0;
}

/* The link-layer address options of ND must name the port's own MAC. */
static __noinline int pw_guard_nd_options(struct __sk_buff *skb, const struct pw_port *port,
					  __u32 off, __u32 end)
{
	if (!port)
		return PW_R_NO_PORT;
	for (int i = 0; i < PW_ND_OPTIONS; i++) {
		__u8 opt[8];

		/* Less than an option is left: nothing, or rubbish that no receiver accepts. */
		if (off + sizeof(opt) > end)
			return 0;
		if (bpf_skb_load_bytes(skb, off, opt, sizeof(opt)))
			return PW_R_TRUNCATED;
		if (!opt[1])
			return PW_R_ND_SPOOF; /* RFC 4861, 4.6 */
		/* 1: source, 2: target link-layer address */
		if ((opt[0] == 1 || opt[0] == 2) && !pw_mac_equal(opt + 2, port->mac))
			return PW_R_ND_SPOOF;
		off += opt[1] * 8;
	}
	return off < end ? PW_R_ND_SPOOF : 0;
}

/* Global for the verifier's sake, as pw_parse_ext. */
__noinline int pw_guard_nd(struct __sk_buff *skb, const struct pw_port *port, struct pw_packet *pkt)
{
	struct pw_nd nd;
	bool unspecified;
	__u32 end;

	if (!port || !pkt)
		return PW_R_NO_PORT;
	end = ETH_HLEN + pkt->l3_len;
	unspecified = pw_addr_zero(&pkt->saddr);
	/* Nobody without an address speaks to one node (RFC 4861, 7.1.1; RFC 3590). */
	if (unspecified && !(pkt->flags & PW_P_MULTICAST))
		return PW_R_SRC_IP;
	switch (pkt->icmp_type) {
	case 134: /* router advertisement */
	case 137: /* redirect */
		return PW_R_RA;
	case 133: /* router solicitation */
		return pw_guard_nd_options(skb, port, pkt->l4_off + 8, end);
	case 135: /* neighbour solicitation */
	case 136: /* neighbour advertisement */
		break;
	default:
		/* MLD reports may come from :: (RFC 3590, RFC 3810 5.2.13) */
		if (unspecified && pkt->icmp_type != 131 && pkt->icmp_type != 143)
			return PW_R_SRC_IP;
		return 0;
	}
	if (pkt->ttl != 255) /* RFC 4861, 7.1.1 */
		return PW_R_ND_SPOOF;
	if (pkt->l4_off + sizeof(nd) > end || bpf_skb_load_bytes(skb, pkt->l4_off, &nd, sizeof(nd)))
		return PW_R_TRUNCATED;
	/* What it advertises, or probes for by DAD, must be its own. */
	if ((pkt->icmp_type == 136 || unspecified) &&
	    !pw_addr_equal(&nd.target, &port->link_local) && !pw_owns(port, &nd.target))
		return PW_R_ND_SPOOF;
	return pw_guard_nd_options(skb, port, pkt->l4_off + sizeof(nd), end);
}

/* The whole header's checksum where there are options (RFC 791). */
__noinline int pw_v4_sum_options(struct __sk_buff *skb, __u32 hlen)
{
	__be32 words[15] = {};

	if (hlen < sizeof(struct iphdr) || hlen > sizeof(words) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, words, hlen))
		return 0;
	return !pw_fold(bpf_csum_diff(NULL, 0, words, sizeof(words), 0));
}

/* The stack drops a header with a wrong checksum without a word; we count it, on both paths. */
PW_INLINE bool pw_v4_sum_ok(struct __sk_buff *skb, const struct pw_packet *pkt)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	const __u32 *words = data + ETH_HLEN;

	if (pkt->flags & PW_P_OPTIONS)
		return pw_v4_sum_options(skb, pkt->l4_off - ETH_HLEN);
	if ((void *)(words + 5) > end)
		return false;
	return !pw_fold((__u64)words[0] + words[1] + words[2] + words[3] + words[4]);
}

PW_INLINE int pw_guard_ip(struct __sk_buff *skb, const struct pw_port *port, struct pw_packet *pkt)
{
	bool v4 = pkt->be_proto == bpf_htons(ETH_P_IP);
	const struct pw_addr *first = v4 ? &port->addr4 : &port->addr6;

	if (v4 && !pw_v4_sum_ok(skb, pkt))
		return PW_R_IP_CHECKSUM;
	if (!v4 && pkt->proto == IPPROTO_ICMPV6) {
		int reason;

		/* RFC 6980: fragmented ND is refused. A later fragment alone is nothing. */
		if ((pkt->flags & PW_P_FRAGMENT) && pkt->icmp_type >= 133 && pkt->icmp_type <= 137)
			return PW_R_ND_SPOOF;
		reason = pw_guard_nd(skb, port, pkt);
		if (reason)
			return reason;
		if (pw_addr_zero(&pkt->saddr))
			return 0;
	}
	/* Nearly always the first of its addresses: no call for that. */
	if ((pw_addr_zero(first) || !pw_addr_equal(&pkt->saddr, first)) &&
	    !pw_owns(port, &pkt->saddr)) {
		/* A DHCP client that has no address yet (RFC 2131, 4.1). */
		if (v4 && pkt->saddr.be[3] == 0 && pkt->daddr.be[3] == 0xffffffff &&
		    pkt->proto == IPPROTO_UDP && pkt->be_sport == bpf_htons(PW_DHCP4_CLIENT) &&
		    pkt->be_dport == bpf_htons(PW_DHCP4_SERVER))
			return 0;
		if (v4 || !pw_addr_equal(&pkt->saddr, &port->link_local))
			return PW_R_SRC_IP;
	}
	/* A server is known by its own port, and by the clients' port that it sends to. */
	if (pkt->proto == IPPROTO_UDP && (pkt->flags & PW_P_PORTS) &&
	    (pkt->be_sport == bpf_htons(v4 ? PW_DHCP4_SERVER : PW_DHCP6_SERVER) ||
	     pkt->be_dport == bpf_htons(v4 ? PW_DHCP4_CLIENT : PW_DHCP6_CLIENT)))
		return PW_R_DHCP_SERVER;
	/* ICMP redirect and router advertisement (RFC 792, RFC 1256): ND's in the older clothes. */
	if (v4 && pkt->proto == IPPROTO_ICMP && !(pkt->flags & PW_P_LATER_FRAGMENT) &&
	    (pkt->icmp_type == 5 || pkt->icmp_type == 9))
		return PW_R_RA;
	return 0;
}

PW_INLINE bool pw_is_vlan(__be16 proto)
{
	return proto == bpf_htons(ETH_P_8021Q) || proto == bpf_htons(ETH_P_8021AD) ||
	       proto == bpf_htons(0x9100); /* the pre-standard tag of stacked VLANs */
}

/* Layer 2: addresses and tags. A tag may be in the frame or in the skb. */
PW_INLINE int pw_guard_l2(struct __sk_buff *skb, const struct pw_port *port, struct pw_packet *pkt)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	const __u8 *mac = data;

	if (data + ETH_HLEN > end)
		return PW_R_TRUNCATED;
	if (!pw_mac_equal(mac + ETH_ALEN, port->mac))
		return PW_R_SRC_MAC;
	if (skb->vlan_present || pw_is_vlan(pkt->be_proto)) {
		__be16 inner = pkt->be_proto;

		if (!skb->vlan_present &&
		    bpf_skb_load_bytes(skb, ETH_HLEN + 2, &inner, sizeof(inner)))
			return PW_R_TRUNCATED;
		return pw_is_vlan(inner) ? PW_R_DOUBLE_TAG : PW_R_VLAN;
	}
	if (mac[0] & 1)
		pkt->flags |= PW_P_GROUP_MAC;
	else if (!pw_mac_equal(mac, port->gateway_mac) && !(port->flags & PW_PF_ONLINK))
		return PW_R_DST_MAC;
	return 0;
}

#endif
