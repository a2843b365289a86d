"""Guests: a virtual machine's process on the ports of a sandbox."""
