#!/usr/bin/env bash
# The first few minutes with Portwright; see demo/__main__.py. `make demo` installs what it needs first.
set -euo pipefail
cd "$(dirname "$0")/.."
((EUID == 0)) || {
	echo "demo: needs root (it makes network namespaces and loads BPF programs)" >&2
	exit 1
}
exec .venv/bin/python -m demo "$@"
