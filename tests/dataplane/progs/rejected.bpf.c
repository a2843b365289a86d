// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Reads the packet without having asked how long it is: no verifier lets that pass. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("tc")
int fine(struct __sk_buff *skb)
{
	return 0;
}

SEC("tc")
int reads_too_far(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data;

	return data[1500];
}

char _license[] SEC("license") = "Dual BSD/GPL";
