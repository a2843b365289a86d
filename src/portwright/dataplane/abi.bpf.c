// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Never loaded: a variable of every shared type, so that the compiler writes
 * all of them into this object's BTF, where generate.py reads them.
 */
#include "abi.h"

struct {
	enum pw_abi abi;
	enum pw_dir dir;
	enum pw_reason reason;
	enum pw_port_flag port_flag;
	enum pw_state_flag state_flag;
	enum pw_tc_index tc_index;
	enum pw_trace_const trace_const;
	enum pw_step step;
	enum pw_slow slow;
	enum pw_verdict verdict;
	enum pw_side side;
	enum pw_service_kind service_kind;
	enum pw_policy_const policy_const;
	enum pw_conn_flag conn_flag;
	struct pw_peer peer;
	struct pw_net_key net_key;
	struct pw_set set;
	struct pw_cell_key cell_key;
	struct pw_conn conn;
	struct pw_frag frag;
	struct pw_port port;
	struct pw_target target;
	struct pw_reach_key reach_key;
	struct pw_counters counters;
	struct pw_counter counter;
	struct pw_drop_key drop_key;
	struct pw_state state;
	struct pw_flow flow;
	struct pw_limit_key limit_key;
	struct pw_limit_spec limit_spec;
	struct pw_event event;
	struct pw_budget budget;
	struct pw_trace_step trace_step;
	struct pw_trace trace;
} pw_every_shared_type;
