/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Rates by token bucket. There is no queue to wait in on the redirect path,
 * so a port over its rate loses packets, as with a policer.
 *
 * The bucket may go into debt by one packet: a GSO packet of 64 KiB passes a
 * bucket of 2 KiB once, and its debt is paid before the next one passes. A
 * bucket without debt would stop TCP for good at small bursts.
 */
#ifndef PW_LIMIT_H
#define PW_LIMIT_H

#include "count.h"

__noinline int pw_over_limit(struct __sk_buff *skb, __u64 port_id, __u32 dir)
{
	struct pw_limit_key key = { .port_id = port_id, .dir = dir };
	struct pw_limit *limit = bpf_map_lookup_elem(&pw_limits, &key);
	__u64 now = bpf_ktime_get_ns(), elapsed;
	__s64 fill;
	bool over;

	if (!limit || pw_traced(skb)) /* a trace takes no tokens */
		return false;
	bpf_spin_lock(&limit->lock);
	/* Two CPUs may read the clock in the other order than they take the lock. */
	elapsed = now > limit->spec.last_ns ? now - limit->spec.last_ns : 0;
	if (elapsed > 10 * PW_SEC)
		elapsed = 10 * PW_SEC; /* keeps the product below 2^64 up to 1.8 Tbit/s */
	fill = elapsed / 8 * limit->spec.rate / (PW_SEC / 8);
	if (fill) {
		limit->spec.last_ns = now;
		limit->spec.tokens += fill;
		if (limit->spec.tokens > (__s64)limit->spec.burst)
			limit->spec.tokens = limit->spec.burst;
	}
	over = limit->spec.tokens < 0;
	if (!over)
		limit->spec.tokens -= skb->len;
	bpf_spin_unlock(&limit->lock);
	return over;
}

#endif
