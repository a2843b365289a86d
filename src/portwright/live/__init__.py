"""Manifests tried on real packets: a private host, its daemon, sandboxes with real ports, and probes."""
