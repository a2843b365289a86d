/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Every map of the switch. Each bound is stated with what happens when it is reached. */
#ifndef PW_MAPS_H
#define PW_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "map.h"

/* Ports of one host namespace; the daemon refuses port 16,385 by name. */
#define PW_MAX_PORTS 16384
/* Addresses: four a port on average; the daemon refuses beyond. */
#define PW_MAX_ADDRS 65536

PW_MAP(pw_ports, HASH, PW_MAX_PORTS, BPF_F_NO_PREALLOC, __u32, struct pw_port);

PW_MAP(pw_addrs, HASH, PW_MAX_ADDRS, BPF_F_NO_PREALLOC, struct pw_addr, struct pw_target);

/* Pairs of networks that may talk; the daemon refuses beyond. */
PW_MAP(pw_reach, HASH, 65536, BPF_F_NO_PREALLOC, struct pw_reach_key, __u32);

PW_MAP(pw_counters, PERCPU_HASH, PW_MAX_PORTS, BPF_F_NO_PREALLOC, __u64, struct pw_counters);

/* Full: the drop still happens, only its count is lost (pw_budget.lost says so). */
PW_MAP(pw_drops, PERCPU_HASH, PW_MAX_PORTS * 8, BPF_F_NO_PREALLOC, struct pw_drop_key,
       struct pw_counter);

PW_MAP(pw_state, ARRAY, 1, 0, __u32, struct pw_state);

/*
 * LRU: when full the oldest flow is forgotten. The packets of a forgotten
 * flow take the fast path, where a reply that needs the host's NAT would
 * arrive untranslated and be reset by its receiver: the flow breaks, nothing
 * leaks.
 */
PW_MAP(pw_slow_flows, LRU_HASH, 65536, 0, struct pw_flow, __u32);

struct pw_limit {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct pw_limit_spec spec;
};

PW_MAP(pw_limits, HASH, PW_MAX_PORTS * 2, BPF_F_NO_PREALLOC, struct pw_limit_key, struct pw_limit);

/* Full (nobody reads): the event is counted as lost. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} pw_events SEC(".maps");

/* By reason: those there are, and those that will be. */
PW_MAP(pw_budget, PERCPU_ARRAY, 64, 0, __u32, struct pw_budget);

PW_MAP(pw_trace, ARRAY, 1, 0, __u32, struct pw_trace);

#endif
