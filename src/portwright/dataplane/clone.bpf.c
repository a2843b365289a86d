// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * As join.bpf.c, for a guest that is one of many copies and has the addresses
 * that all of them have: what it sends leaves as its port's, what is for its
 * port arrives as its own. Guard, policy and counters are behind this, on the
 * representor, and know the port's addresses alone.
 *
 * What can't be read is handed on as it is. The guard reads by the same parser,
 * and refuses it; a guest takes nothing that isn't for an address of its own.
 */
#include <stdbool.h>
#include <linux/pkt_cls.h>

#include "packet.h"
#include "map.h"

/*
 * Packed by node/clones.py. A swap is two addresses, of which the first becomes
 * the second; both are zero where the guest has none of the family.
 */
struct pw_clone {
	__u64 port_id;
	__u32 tap, device; /* their numbers in the sandbox's namespace */
	struct pw_addr v4[2][2], v6[2][2]; /* from the guest, and to it */
	struct pw_addr group[2]; /* to it: the solicited-node address of v6 (RFC 4291, 2.7.1) */
};

/* By the filter's class id, 16 bits and not 0. The daemon names the bound when it is reached. */
PW_MAP(pw_clones, HASH, 65535, BPF_F_NO_PREALLOC, __u32, struct pw_clone);

/* 1 if @swap's address was at @off, and is the other now; 0 if it was not; else an error. */
PW_INLINE long pw_put(struct __sk_buff *skb, __u32 off, __u32 end, const struct pw_addr *swap,
		      bool v4, __u64 flags)
{
	__u32 word = v4 ? 3 : 0, len = v4 ? 4 : 16;
	struct pw_addr there = swap[0];

	if (off + len > end || bpf_skb_load_bytes(skb, off, &there.be[word], len) ||
	    !pw_addr_equal(&there, swap))
		return 0;
	return bpf_skb_store_bytes(skb, off, &swap[1].be[word], len, flags) ?: 1;
}

/*
 * The destination of an IP packet that goes @in, else its source; and where
 * neighbour discovery speaks of that address, or an error quotes a packet of
 * which it was the other end. Not 0: an error, half way.
 *
 * IPv4's header has a checksum of its own, so that no other one changes with it.
 * Those over a pseudo header, and ICMPv6's over its data, follow the addresses;
 * UDP's 0 stays. The flag with which IPv6's are stored is for skb->csum, from
 * which bpf_l4_csum_replace takes their change again, as if it were IPv4. What a
 * quote has behind its IP header stays: nobody verifies a packet that is cut.
 */
PW_INLINE long pw_swap_ip(struct __sk_buff *skb, const struct pw_packet *pkt,
			  const struct pw_addr *swap, bool v4, bool in)
{
	__s64 diff = bpf_csum_diff((__be32 *)swap, 16, (__be32 *)(swap + 1), 16, 0);
	bool udp = pkt->proto == IPPROTO_UDP || pkt->proto == IPPROTO_UDPLITE;
	bool icmp = pkt->proto == (v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
	bool nd = icmp && !v4 && (pkt->icmp_type == 135 || pkt->icmp_type == 136);
	__u32 from = v4 ? 12 : 8, to = v4 ? 16 : 24, end = ETH_HLEN + pkt->l3_len;
	__u32 sum = pkt->l4_off + (udp ? 6 : icmp ? 2 : 16), quote = pkt->l4_off + 8;
	__u64 flags = v4 ? 0 : BPF_F_RECOMPUTE_CSUM;
	long put = pw_put(skb, ETH_HLEN + (in ? to : from), end, swap, v4, flags);
	__u8 version = 0;

	if (put < 0 || (put && v4 && bpf_l3_csum_replace(skb, ETH_HLEN + 10, 0, diff, 0)))
		return -1;
	if (pkt->flags & PW_P_LATER_FRAGMENT)
		return 0;
	flags = BPF_F_PSEUDO_HDR | (udp ? BPF_F_MARK_MANGLED_0 : 0);
	if (put && (udp || (icmp && !v4) || pkt->proto == IPPROTO_TCP) && sum + 2 <= end &&
	    bpf_l4_csum_replace(skb, sum, 0, diff, flags))
		return -1;
	put = nd ? pw_put(skb, quote, end, swap, v4, 0) : 0;
	if (icmp && pw_icmp_error(pkt) && !bpf_skb_load_bytes(skb, quote, &version, 1) &&
	    version >> 4 == (v4 ? 4 : 6))
		put = pw_put(skb, quote + (in ? from : to), end, swap, v4, 0);
	if (put > 0 && v4)
		return bpf_l3_csum_replace(skb, quote + 10, 0, diff, 0);
	return put > 0 ? bpf_l4_csum_replace(skb, sum, 0, diff, 0) : put;
}

/* Of ARP for IPv4 (RFC 826) the sender, unless it comes @in, and whom it asks for. */
PW_INLINE bool pw_swap_arp(struct __sk_buff *skb, const struct pw_addr *swap, bool in)
{
	__u64 kind = 0;

	bpf_skb_load_bytes(skb, ETH_HLEN, (__u8 *)&kind + 2, 6);
	return kind == bpf_cpu_to_be64(0x000108000604) && /* Ethernet, IPv4, 6 and 4 bytes */
	       ((!in && pw_put(skb, ETH_HLEN + 14, ETH_HLEN + 28, swap, true, 0) < 0) ||
		pw_put(skb, ETH_HLEN + 24, ETH_HLEN + 28, swap, true, 0) < 0);
}

SEC("tc")
int pw_clone(struct __sk_buff *skb)
{
	__u32 index = skb->tc_classid, ifindex = skb->ifindex;
	struct pw_clone *clone = bpf_map_lookup_elem(&pw_clones, &index);
	bool in = clone && ifindex == clone->device, failed = false;
	struct pw_packet pkt = {};

	if (!clone || (!in && ifindex != clone->tap))
		return TC_ACT_SHOT;
	if (pw_parse(skb, &pkt))
		return bpf_redirect(in ? clone->tap : clone->device, 0);
	if (pkt.be_proto == bpf_htons(ETH_P_ARP))
		failed = pw_swap_arp(skb, clone->v4[in], in);
	else if (pkt.be_proto == bpf_htons(ETH_P_IP))
		failed = pw_swap_ip(skb, &pkt, clone->v4[in], true, in);
	else if (pkt.be_proto == bpf_htons(ETH_P_IPV6))
		failed = pw_swap_ip(skb, &pkt, clone->v6[in], false, in);
	if (in && clone->group[0].be[0] && pw_addr_equal(&pkt.daddr, clone->group))
		failed |= pw_swap_ip(skb, &pkt, clone->group, false, in) ||
			  bpf_skb_store_bytes(skb, 2, &clone->group[1].be[3], 4, 0);
	return failed ? TC_ACT_SHOT : bpf_redirect(in ? clone->tap : clone->device, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
