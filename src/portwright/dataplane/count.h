/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Counters, drops with their reasons, events, and the steps that `why` reads. */
#ifndef PW_COUNT_H
#define PW_COUNT_H

#include "maps.h"
#include "packet.h"

/* At most this many events a reason, a CPU and a window; the rest is counted. */
#define PW_EVENT_BURST	   64
#define PW_EVENT_WINDOW_NS (PW_SEC / 10)

PW_INLINE bool pw_traced(struct __sk_buff *skb)
{
	return skb->mark == PW_TRACE_MARK && skb->priority == PW_TRACE_PRIORITY;
}

/*
 * Cold parts are functions, so that the hot one stays small; and global ones,
 * so that the verifier looks at each once and not again for every caller.
 */
__noinline int pw_step(__u32 step, __u32 a, __u32 b)
{
	__u32 zero = 0;
	struct pw_trace *trace = bpf_map_lookup_elem(&pw_trace, &zero);

	if (trace && trace->used < PW_TRACE_STEPS)
		trace->steps[trace->used++ & (PW_TRACE_STEPS - 1)] =
			(struct pw_trace_step){ step, a, b };
	return 0;
}

#define PW_STEP(skb, step, a, b)               \
	do {                                   \
		if (pw_traced(skb))            \
			pw_step((step), a, b); \
	} while (0)

/*
 * Of what a hypervisor wrote to a tap the kernel has not counted the segments.
 * With room for the largest header, as what the guest says of its own may lie.
 */
__noinline __u32 pw_segments(struct __sk_buff *skb, const struct pw_packet *pkt)
{
	if (skb->gso_segs || !pkt || skb->len < pkt->l4_off + 60)
		return skb->gso_segs ?: 1;
	return (skb->len - pkt->l4_off - (pkt->tcp_len ?: 8) + skb->gso_size - 1) / skb->gso_size;
}

PW_INLINE void pw_add(struct pw_counter *counter, struct __sk_buff *skb, struct pw_packet *pkt,
		      __u32 octets)
{
	counter->packets += skb->gso_size ? pw_segments(skb, pkt) : 1;
	counter->octets += octets;
}

/* @octets: its length as it came; an answer may be longer or shorter than its question. */
PW_INLINE void pw_count(struct __sk_buff *skb, struct pw_packet *pkt, __u64 port_id,
			enum pw_dir dir, __u32 octets, bool slow)
{
	struct pw_counters *counters = bpf_map_lookup_elem(&pw_counters, &port_id);
	bool from = dir == PW_FROM_PORT;

	if (!counters || pw_traced(skb))
		return;
	pw_add(from ? &counters->from_total : &counters->to_total, skb, pkt, octets);
	if (slow)
		pw_add(from ? &counters->from_slow : &counters->to_slow, skb, pkt, octets);
}

__noinline int pw_event(struct __sk_buff *skb, struct pw_packet *pkt, __u64 port_id,
			__u32 dir_reason, __u32 other_net)
{
	__u32 reason = dir_reason & 0xff;
	struct pw_budget *budget = bpf_map_lookup_elem(&pw_budget, &reason);
	__u64 now = bpf_ktime_get_ns();
	struct pw_event *event;

	if (!budget || !pkt)
		return 0;
	if (now - budget->window_ns > PW_EVENT_WINDOW_NS) {
		budget->window_ns = now;
		budget->sent = 0;
	}
	event = budget->sent < PW_EVENT_BURST ? bpf_ringbuf_reserve(&pw_events, sizeof(*event), 0)
					      : NULL;
	if (!event) {
		budget->lost++;
		return 0;
	}
	budget->sent++;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = now;
	event->port_id = port_id;
	event->ifindex = skb->ifindex;
	event->len = skb->len;
	event->lost = budget->lost;
	budget->lost = 0;
	event->be_ethertype = pkt->be_proto;
	event->dir = dir_reason >> 8;
	event->reason = reason;
	bpf_skb_load_bytes(skb, 0, event->dst_mac, ETH_ALEN);
	bpf_skb_load_bytes(skb, ETH_ALEN, event->src_mac, ETH_ALEN);
	__builtin_memcpy(&event->saddr, pw_way(pkt), sizeof(struct pw_flow));
	event->other_net = other_net;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* Counts, reports and returns the verdict of a drop. */
__noinline int pw_drop(struct __sk_buff *skb, struct pw_packet *pkt, __u64 port_id,
		       __u32 dir_reason, __u32 other_net)
{
	struct pw_drop_key key = {
		.port_id = port_id,
		.dir = dir_reason >> 8,
		.reason = dir_reason & 0xff,
	};
	struct pw_counter *counter;

	if (pw_traced(skb)) {
		pw_step(PW_S_DROP, key.reason, key.dir);
		return TC_ACT_SHOT;
	}
	counter = bpf_map_lookup_elem(&pw_drops, &key);
	if (!counter) {
		struct pw_counter fresh = {};

		bpf_map_update_elem(&pw_drops, &key, &fresh, BPF_NOEXIST);
		counter = bpf_map_lookup_elem(&pw_drops, &key);
	}
	if (counter)
		pw_add(counter, skb, pkt, skb->len);
	pw_event(skb, pkt, port_id, dir_reason, other_net);
	return TC_ACT_SHOT;
}

#define PW_DROP(skb, pkt, port_id, dir, reason) pw_drop(skb, pkt, port_id, (dir) << 8 | (reason), 0)

#endif
