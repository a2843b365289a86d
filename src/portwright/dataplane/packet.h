/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A packet as the programs see it: parsed once, into one small struct on the stack. */
#ifndef PW_PACKET_H
#define PW_PACKET_H

#include <linux/bpf.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

#define PW_INLINE    static __always_inline
#define PW_SEC	     1000000000ULL
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))

/* Extension headers followed before we give up; Linux senders use at most three. */
#define PW_EXT_MAX 6
/* Bytes that must be linear: Ethernet, IPv4 with options, and 8 of layer 4. */
#define PW_PULL 128

enum pw_packet_flag {
	PW_P_FRAGMENT = 1, /* any fragment, the first included */
	PW_P_LATER_FRAGMENT = 2, /* no layer 4 header inside */
	PW_P_OPTIONS = 4, /* IPv4 options or IPv6 extension headers */
	PW_P_MULTICAST = 8,
	PW_P_PORTS = 16, /* be_sport and be_dport are valid */
	PW_P_GROUP_MAC = 32, /* sent to a broadcast or multicast MAC */
	PW_P_OPENS = 64, /* answers nothing: a SYN, an INIT, an ICMP message that is no reply */
};

struct pw_packet {
	struct pw_flow; /* proto: layer 4, after extension headers */
	__u32 l4_off; /* from the start of the frame */
	__u32 l3_len; /* as the header says; headers included */
	__u32 wire_l3; /* pw_wire_l3(), once it is known */
	__u32 be_frag_id; /* of a fragment: what its siblings carry too */
	__u16 be_proto; /* ethertype */
	__u16 be_icmp_id; /* of a request or a reply */
	__u8 icmp_type;
	__u8 ttl;
	__u8 flags; /* enum pw_packet_flag */
	__u8 icmp_code;
	__u8 tcp_flags; /* 0 where the packet holds too little of the header */
	__u8 tcp_len; /* of its header, in bytes; likewise */
	__u8 pad2[2];
};

/* The packet's own way, and its answer's. */
PW_INLINE const struct pw_flow *pw_way(const struct pw_packet *pkt)
{
	return (const struct pw_flow *)pkt;
}

PW_INLINE struct pw_flow pw_way_back(const struct pw_packet *pkt)
{
	return (struct pw_flow){ pkt->daddr, pkt->saddr, pkt->be_dport, pkt->be_sport, pkt->proto };
}

PW_INLINE void pw_addr_v4(struct pw_addr *addr, __be32 v4)
{
	*addr = (struct pw_addr){ .be = { 0, 0, bpf_htonl(0xffff), v4 } };
}

PW_INLINE void pw_addr_v6(struct pw_addr *addr, const struct in6_addr *v6)
{
	__builtin_memcpy(addr, v6, sizeof(*addr));
}

PW_INLINE bool pw_addr_equal(const struct pw_addr *a, const struct pw_addr *b)
{
	return !((a->be[0] ^ b->be[0]) | (a->be[1] ^ b->be[1]) | (a->be[2] ^ b->be[2]) |
		 (a->be[3] ^ b->be[3]));
}

PW_INLINE bool pw_addr_zero(const struct pw_addr *a)
{
	return !(a->be[0] | a->be[1] | a->be[2] | a->be[3]);
}

PW_INLINE bool pw_mac_equal(const __u8 *a, const __u8 *b)
{
	const __u16 *x = (const void *)a, *y = (const void *)b; /* at even places, all of them */

	return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]));
}

/* What a sum of 16-bit words is as a checksum: 0 of a header whose own is right (RFC 1071). */
PW_INLINE __u16 pw_fold(__s64 sum)
{
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + ((sum >> 32) & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~((sum & 0xffff) + (sum >> 16));
}

PW_INLINE bool pw_icmp_error(const struct pw_packet *pkt)
{
	if (pkt->proto == IPPROTO_ICMPV6)
		return pkt->icmp_type < 128;
	/* RFC 792: unreachable, quench, redirect, time exceeded, parameter problem */
	return pkt->proto == IPPROTO_ICMP && pkt->icmp_type < 32 && (0x1838 >> pkt->icmp_type & 1);
}

/* To a request of echo, timestamp, information or mask; in IPv6 of echo or node information. */
PW_INLINE bool pw_icmp_reply(__u8 type)
{
	return !type || type == 14 || type == 16 || type == 18 || type == 129 || type == 140;
}

/* Of TCP's header up to its flags (RFC 9293, 3.1); the others' ports stand in the same place. */
struct pw_tcp_head {
	__be16 ports[2];
	__u32 seq[2];
	__u8 offset; /* words of 32 bits, in the high half */
	__u8 flags;
} __attribute__((packed));

/* What neither TCP nor UDP is. A function, so that the verifier looks at it once. */
__noinline int pw_parse_rare_l4(struct __sk_buff *skb, struct pw_packet *pkt)
{
	__u32 end;
	__u8 chunk;

	if (!pkt)
		return PW_R_TRUNCATED;
	end = ETH_HLEN + pkt->l3_len;
	if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6) {
		if (pkt->l4_off + 1 > end ||
		    bpf_skb_load_bytes(skb, pkt->l4_off, &pkt->icmp_type, 1))
			return PW_R_TRUNCATED;
		if (pkt->l4_off + 1 < end)
			bpf_skb_load_bytes(skb, pkt->l4_off + 1, &pkt->icmp_code, 1);
		if (pkt->l4_off + 6 <= end)
			bpf_skb_load_bytes(skb, pkt->l4_off + 4, &pkt->be_icmp_id, 2);
		if (!pw_icmp_reply(pkt->icmp_type))
			pkt->flags |= PW_P_OPENS;
	}
	if (pkt->proto != IPPROTO_SCTP && pkt->proto != IPPROTO_UDPLITE)
		return 0;
	/* Both ports at once: they stand side by side in the packet and in @pkt. */
	if (pkt->l4_off + 4 > end || bpf_skb_load_bytes(skb, pkt->l4_off, &pkt->be_sport, 4))
		return PW_R_TRUNCATED;
	pkt->flags |= PW_P_PORTS;
	/* SCTP's INIT is its packet's only chunk (RFC 9260, 6.10). */
	if (pkt->proto == IPPROTO_SCTP && pkt->l4_off + 13 <= end &&
	    !bpf_skb_load_bytes(skb, pkt->l4_off + 12, &chunk, 1) && chunk == 1)
		pkt->flags |= PW_P_OPENS;
	return 0;
}

/* Ports and TCP's flags, or the ICMP type, of a packet that carries its layer 4 header. */
PW_INLINE int pw_parse_l4(struct __sk_buff *skb, struct pw_packet *pkt)
{
	__u32 end = ETH_HLEN + pkt->l3_len;
	struct pw_tcp_head head;

	if (pkt->proto != IPPROTO_TCP && pkt->proto != IPPROTO_UDP)
		return pw_parse_rare_l4(skb, pkt);
	/* What lies behind the packet's end is padding, and no header. */
	if (pkt->proto == IPPROTO_TCP && pkt->l4_off + sizeof(head) <= end &&
	    !bpf_skb_load_bytes(skb, pkt->l4_off, &head, sizeof(head))) {
		pkt->tcp_flags = head.flags;
		pkt->tcp_len = (head.offset >> 4) * 4;
		if ((head.flags & 0x12) == 0x02) /* SYN without ACK */
			pkt->flags |= PW_P_OPENS;
	} else if (pkt->l4_off + sizeof(head.ports) > end ||
		   bpf_skb_load_bytes(skb, pkt->l4_off, head.ports, sizeof(head.ports))) {
		return PW_R_TRUNCATED;
	}
	pkt->be_sport = head.ports[0];
	pkt->be_dport = head.ports[1];
	pkt->flags |= PW_P_PORTS;
	return 0;
}

PW_INLINE int pw_parse_v4(struct __sk_buff *skb, struct pw_packet *pkt, struct iphdr *ip, void *end)
{
	__u32 hlen;
	__u16 frag;

	if ((void *)(ip + 1) > end)
		return PW_R_TRUNCATED;
	hlen = ip->ihl * 4;
	if (ip->version != 4 || hlen < sizeof(*ip))
		return PW_R_IP_VERSION;
	pkt->l3_len = bpf_ntohs(ip->tot_len);
	/* A GSO packet over 64 KiB (BIG TCP) has tot_len 0 (net/ipv4/ip_output.c). */
	if (!pkt->l3_len && skb->gso_size)
		pkt->l3_len = skb->len - ETH_HLEN;
	if (pkt->l3_len < hlen || pkt->l3_len > skb->len - ETH_HLEN)
		return PW_R_TRUNCATED;
	pw_addr_v4(&pkt->saddr, ip->saddr);
	pw_addr_v4(&pkt->daddr, ip->daddr);
	pkt->proto = ip->protocol;
	pkt->ttl = ip->ttl;
	pkt->l4_off = ETH_HLEN + hlen;
	if (hlen > sizeof(*ip))
		pkt->flags |= PW_P_OPTIONS;
	/* 224/4 and 255.255.255.255 */
	if ((bpf_ntohl(ip->daddr) >> 28) == 0xe || ip->daddr == 0xffffffff)
		pkt->flags |= PW_P_MULTICAST;

	frag = bpf_ntohs(ip->frag_off) & 0x3fff;
	if (!frag)
		return 0;
	pkt->flags |= PW_P_FRAGMENT;
	pkt->be_frag_id = ip->id;
	if (frag & 0x1fff) {
		pkt->flags |= PW_P_LATER_FRAGMENT;
		/*
		 * RFC 1858 and 3128: a fragment at offset 8 could replace the
		 * ports or flags that the first one showed.
		 */
		return (frag & 0x1fff) == 1 ? PW_R_FRAGMENT : 0;
	}
	if (pkt->l3_len - hlen < 16 && (pkt->proto == IPPROTO_TCP || pkt->proto == IPPROTO_UDP))
		return PW_R_FRAGMENT;
	return 0;
}

PW_INLINE bool pw_is_ext(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT || next == IPPROTO_AH;
}

/*
 * Follows the chain of extension headers from pkt->l4_off, where one of type
 * pkt->proto is, to the upper layer. Returns 0 or the reason to drop.
 *
 * Global, so that the verifier looks at its loop once and by itself: as part
 * of its caller it would be walked again for each state before it, five times
 * the work of all the rest.
 */
__noinline int pw_parse_ext(struct __sk_buff *skb, struct pw_packet *pkt)
{
	__u32 off, end;
	__u8 next;

	if (!pkt)
		return PW_R_TRUNCATED;
	off = pkt->l4_off;
	end = ETH_HLEN + pkt->l3_len;
	next = pkt->proto;
	pkt->flags |= PW_P_OPTIONS;
	for (int i = 0; i < PW_EXT_MAX; i++) {
		__u8 hdr[8]; /* the least that any of them is long */

		if (bpf_skb_load_bytes(skb, off, hdr, sizeof(hdr)))
			return PW_R_TRUNCATED;
		if (next == IPPROTO_FRAGMENT) {
			__u16 frag = (hdr[2] << 8 | hdr[3]) & 0xfff9;

			__builtin_memcpy(&pkt->be_frag_id, hdr + 4, 4);
			off += 8;
			/* offset 0 and no more: an atomic fragment, whole (RFC 6946) */
			if (frag)
				pkt->flags |= PW_P_FRAGMENT;
			if (frag >> 3)
				pkt->flags |= PW_P_LATER_FRAGMENT;
		} else if (next == IPPROTO_AH) {
			off += (hdr[1] + 2) * 4;
		} else {
			off += (hdr[1] + 1) * 8;
		}
		if (off > end)
			return PW_R_TRUNCATED;
		next = hdr[0];
		pkt->proto = next;
		pkt->l4_off = off;
		/*
		 * What follows a later fragment's header is data, whatever next
		 * says. At offset 8 it could replace TCP's flags, as in IPv4.
		 */
		if (pkt->flags & PW_P_LATER_FRAGMENT)
			return next == IPPROTO_TCP && !hdr[2] && hdr[3] >> 3 == 1 ? PW_R_FRAGMENT
										  : 0;
		if (!pw_is_ext(next))
			return 0;
		/* It could replace what stands behind these too. */
		if (pkt->flags & PW_P_FRAGMENT)
			return PW_R_FRAGMENT;
	}
	return PW_R_EXT_HEADERS;
}

/*
 * ::ffff:0:0/96 stands for IPv4 in our maps and in sockets, never in a packet
 * (RFC 4291, 2.5.5.2): an IPv6 header could borrow an IPv4 identity with it.
 */
PW_INLINE bool pw_is_mapped(const struct pw_addr *a)
{
	return !(a->be[0] | a->be[1] | (a->be[2] ^ bpf_htonl(0xffff)));
}

PW_INLINE int pw_parse_v6(struct __sk_buff *skb, struct pw_packet *pkt, struct ipv6hdr *ip6,
			  void *end)
{
	if ((void *)(ip6 + 1) > end)
		return PW_R_TRUNCATED;
	if (ip6->version != 6)
		return PW_R_IP_VERSION;
	pkt->l3_len = bpf_ntohs(ip6->payload_len) + sizeof(*ip6);
	/* Payload length 0: a jumbogram, which only GSO may be (RFC 2675). */
	if (!ip6->payload_len && skb->gso_size)
		pkt->l3_len = skb->len - ETH_HLEN;
	if (pkt->l3_len > skb->len - ETH_HLEN)
		return PW_R_TRUNCATED;
	pw_addr_v6(&pkt->saddr, &ip6->saddr);
	pw_addr_v6(&pkt->daddr, &ip6->daddr);
	pkt->ttl = ip6->hop_limit;
	pkt->proto = ip6->nexthdr;
	pkt->l4_off = ETH_HLEN + sizeof(*ip6);
	if (ip6->daddr.in6_u.u6_addr8[0] == 0xff)
		pkt->flags |= PW_P_MULTICAST;
	if (pw_is_mapped(&pkt->saddr) || pw_is_mapped(&pkt->daddr))
		return PW_R_IP_VERSION;

	return pw_is_ext(pkt->proto) ? pw_parse_ext(skb, pkt) : 0;
}

/*
 * Fills @pkt. Returns 0 or the reason to drop. Ethertypes that are not IP are
 * left to the caller: only be_proto is set then.
 */
PW_INLINE int pw_parse(struct __sk_buff *skb, struct pw_packet *pkt)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	bool v6;
	int reason;

	if (data + ETH_HLEN + sizeof(struct ipv6hdr) > end) {
		/* Short, or headers in a page fragment: linearise and look again. */
		bpf_skb_pull_data(skb, skb->len < PW_PULL ? skb->len : PW_PULL);
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		eth = data;
	}
	if ((void *)(eth + 1) > end)
		return PW_R_TRUNCATED;
	pkt->be_proto = eth->h_proto;
	v6 = pkt->be_proto == bpf_htons(ETH_P_IPV6);
	if (!v6 && pkt->be_proto != bpf_htons(ETH_P_IP))
		return 0;
	reason = v6 ? pw_parse_v6(skb, pkt, (void *)(eth + 1), end)
		    : pw_parse_v4(skb, pkt, (void *)(eth + 1), end);
	if (reason || (pkt->flags & PW_P_LATER_FRAGMENT))
		return reason;
	/* RFC 7112: the first fragment holds the whole header chain; of TCP's its flags. */
	if (pw_parse_l4(skb, pkt) || ((pkt->flags & PW_P_FRAGMENT) && pkt->proto == IPPROTO_TCP &&
				      pkt->l4_off + 14 > ETH_HLEN + pkt->l3_len))
		return v6 && (pkt->flags & PW_P_FRAGMENT) ? PW_R_FRAGMENT : PW_R_TRUNCATED;
	return 0;
}

/* Layer 3 bytes of the largest frame that this packet becomes on a wire. */
PW_INLINE __u32 pw_wire_l3(struct __sk_buff *skb, const struct pw_packet *pkt)
{
	__u32 l4_len = 8;

	if (!skb->gso_size)
		return skb->len - ETH_HLEN;
	if (pkt->proto == IPPROTO_TCP) {
		l4_len = pkt->tcp_len ? pkt->tcp_len : 20;
	} else if (pkt->proto == IPPROTO_SCTP) {
		/* gso_size is GSO_BY_FRAGS: chunks were built to the sender's MTU */
		return 0;
	}
	return pkt->l4_off - ETH_HLEN + l4_len + skb->gso_size;
}

#endif
