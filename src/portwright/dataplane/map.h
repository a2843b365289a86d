/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef PW_MAP_H
#define PW_MAP_H

#define PW_MAP(name, kind, entries, flags, key_type, value_type) \
	struct {                                                 \
		__uint(type, BPF_MAP_TYPE_##kind);               \
		__uint(max_entries, entries);                    \
		__uint(map_flags, flags);                        \
		__type(key, key_type);                           \
		__type(value, value_type);                       \
	} name SEC(".maps")

#endif
