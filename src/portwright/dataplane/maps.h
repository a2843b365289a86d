/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Every map of the switch. Each bound is stated with what happens when it is reached. */
#ifndef PW_MAPS_H
#define PW_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* Ports of one host namespace; the daemon refuses port 16,385 by name. */
#define PW_MAX_PORTS 16384
/* Addresses: four a port on average; the daemon refuses beyond. */
#define PW_MAX_ADDRS 65536

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PW_MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct pw_port);
} pw_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PW_MAX_ADDRS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct pw_addr);
	__type(value, struct pw_target);
} pw_addrs SEC(".maps");

/* Pairs of networks that may talk; the daemon refuses beyond. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct pw_reach_key);
	__type(value, __u32);
} pw_reach SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, PW_MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct pw_counters);
} pw_counters SEC(".maps");

/* Full: the drop still happens, only its count is lost (pw_budget.lost says so). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, PW_MAX_PORTS * 8);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct pw_drop_key);
	__type(value, struct pw_counter);
} pw_drops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pw_state);
} pw_state SEC(".maps");

/*
 * LRU: when full the oldest flow is forgotten. The packets of a forgotten
 * flow take the fast path, where a reply that needs the host's NAT would
 * arrive untranslated and be reset by its receiver: the flow breaks, nothing
 * leaks.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct pw_flow);
	__type(value, __u32);
} pw_slow_flows SEC(".maps");

struct pw_limit {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct pw_limit_spec spec;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PW_MAX_PORTS * 2);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct pw_limit_key);
	__type(value, struct pw_limit);
} pw_limits SEC(".maps");

/* Full (nobody reads): the event is counted as lost. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} pw_events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 64); /* reasons there are, and will be */
	__type(key, __u32);
	__type(value, struct pw_budget);
} pw_budget SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pw_trace);
} pw_trace SEC(".maps");

#endif
