"""Black-box CNI conformance: sixty cases that any plugin can be held to."""
