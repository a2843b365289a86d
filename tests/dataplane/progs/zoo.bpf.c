// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * One of each: what the binding's tests load. Programs look only at frames of
 * the local experimental ethertype, so that a namespace's own chatter (IPv6
 * neighbour discovery) is not counted.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define ETH_P_TEST 0x88B5

struct odd {
	__u32 packets;
	__u32 bytes;
	__u32 last;
};

struct lpm_key {
	__u32 prefixlen;
	__u8 addr[4];
};

struct event {
	__u32 ifindex;
	__u32 len;
	__u64 serial;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1024);
} hash SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 16);
} array SEC(".maps");

/* 12 bytes: the kernel's slots are 16 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct odd);
	__uint(max_entries, 4);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 64);
} percpu_hash SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1024);
} lru SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct lpm_key);
	__type(value, __u32);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} prefixes SEC(".maps");

struct rules {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 32);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 8);
	__array(values, struct rules);
} sets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} events SEC(".maps");

/* would be pinned in /sys/fs/bpf by libbpf's own loader */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} wants_a_pin SEC(".maps");

const volatile __u32 verdict = TC_ACT_OK;
const volatile __u64 slot;
__u64 serial;

static __always_inline int is_test(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_TEST);
}

static __always_inline void count(struct __sk_buff *skb, __u32 key)
{
	struct odd *value = bpf_map_lookup_elem(&counts, &key);

	if (!value)
		return;
	value->packets++;
	value->bytes += skb->len;
	value->last = skb->ifindex;
}

SEC("tcx/ingress")
int count_slot(struct __sk_buff *skb)
{
	if (is_test(skb))
		count(skb, slot);
	return verdict;
}

SEC("tc")
int drop_test(struct __sk_buff *skb)
{
	if (!is_test(skb))
		return TC_ACT_OK;
	count(skb, 3);
	return TC_ACT_SHOT;
}

SEC("netkit/primary")
int emit(struct __sk_buff *skb)
{
	struct event *event;

	if (!is_test(skb))
		return -1;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (event) {
		event->ifindex = skb->ifindex;
		event->len = skb->len;
		event->serial = __sync_fetch_and_add(&serial, 1);
		bpf_ringbuf_submit(event, 0);
	}
	return -1;
}

/* the rule of set 7 for the frame's length, or 99; keeps the mark it was given */
SEC("tc")
int look_in_set(struct __sk_buff *skb)
{
	__u32 key = 7, len = skb->len, *value;
	void *set = bpf_map_lookup_elem(&sets, &key);

	skb->mark++;
	if (!set)
		return 99;
	value = bpf_map_lookup_elem(set, &len);
	return value ? *value : 98;
}

/* grows the frame by 8 bytes of zero */
SEC("tc")
int grow(struct __sk_buff *skb)
{
	return bpf_skb_change_tail(skb, skb->len + 8, 0) ? TC_ACT_SHOT : TC_ACT_OK;
}

SEC("xdp")
int xdp_pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("cgroup/connect4")
int refuse(struct bpf_sock_addr *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
