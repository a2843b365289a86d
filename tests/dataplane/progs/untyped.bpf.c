// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Its section says nothing that libbpf or we could make a program type of. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("portwright/unheard_of")
int nameless(void *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
