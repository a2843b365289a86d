// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Joins two devices of one namespace, a tap and the device that a runtime
 * knows: what comes in on one goes out on the other. Which one that is stands
 * in the filter's class id (net/sched/cls_bpf.c hands it over, 16 bits of it),
 * so all ports share this program and it needs no map.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("tc")
int pw_join(struct __sk_buff *skb)
{
	return bpf_redirect(skb->tc_classid, 0);
}

/*
 * The tap's, where asked for: from the tap to the end that the device has in
 * the host, by no transmission on the device and no queue behind it.
 */
SEC("tc")
int pw_join_peer(struct __sk_buff *skb)
{
	return bpf_redirect_peer(skb->tc_classid, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
