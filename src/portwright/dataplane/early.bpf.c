// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * On a host's interface, before its stack makes anything of a packet: drops what
 * comes from sources of which an untracked policy denies all. It only saves the
 * stack the work: the host's rules (policy/host) drop the same, and whatever is
 * not plain here, a fragment or an extension header, is theirs.
 */
#include <stdbool.h>

#include "packet.h"
#include "map.h"

/* Denied sources, with what was dropped of each. The daemon makes no larger set than it has room for. */
PW_MAP(pw_early, LPM_TRIE, PW_MAX_PEERS, BPF_F_NO_PREALLOC, struct pw_net_key, struct pw_counter);

/* Failsafe ports, which pass: protocol and port; 1: what is sent to it, 2: its answers. */
PW_MAP(pw_failsafes, HASH, 64, 0, __u32, __u32);

PW_INLINE bool pw_is_failsafe(__u8 proto, __be16 port, __u32 as)
{
	__u32 key = proto << 16 | bpf_ntohs(port);
	__u32 *flags = bpf_map_lookup_elem(&pw_failsafes, &key);

	return flags && (*flags & as);
}

SEC("xdp")
int pw_early_drop(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct ipv6hdr *ip6 = (void *)ip;
	__be16 *ports = (void *)(ip + 1);
	struct pw_net_key source = { .prefixlen = 128 };
	struct pw_counter *dropped;
	__u8 proto;

	if ((void *)(ports + 2) > end)
		return XDP_PASS;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		if (ip->ihl != 5 || (ip->frag_off & bpf_htons(0x3fff)))
			return XDP_PASS;
		proto = ip->protocol;
		pw_addr_v4(&source.addr, ip->saddr);
	} else {
		ports = (void *)(ip6 + 1);
		if (eth->h_proto != bpf_htons(ETH_P_IPV6) || (void *)(ports + 2) > end ||
		    pw_is_ext(ip6->nexthdr) || ip6->nexthdr == IPPROTO_ICMPV6)
			return XDP_PASS;
		proto = ip6->nexthdr;
		pw_addr_v6(&source.addr, &ip6->saddr);
	}
	dropped = bpf_map_lookup_elem(&pw_early, &source);
	if (!dropped || pw_is_failsafe(proto, ports[1], 1) || pw_is_failsafe(proto, ports[0], 2))
		return XDP_PASS;
	__sync_fetch_and_add(&dropped->packets, 1);
	__sync_fetch_and_add(&dropped->octets, end - data);
	return XDP_DROP;
}

char _license[] SEC("license") = "Dual BSD/GPL";
