"""Firecracker as a guest's hypervisor: its API over the Unix socket."""
