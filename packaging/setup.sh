#!/usr/bin/env bash
# Brings this checkout from an empty Debian 12 to one where `make test` works, and does nothing,
# in well under half a second, when it is there already:
#   packages   those of packaging/apt.txt that are missing (apt-get update only then; needs root)
#   .venv      made with python3 >= 3.11, the project editable in it, with its dev group
#   build      the BPF objects and the CNI shim
# `packaging/setup.sh lab` adds what only the kernel lab needs.
# Safe to run again after any interruption; it changes nothing outside the checkout but packages.
set -euo pipefail
cd "$(dirname "$0")/.."

want_lab=${1:-}
fail() {
	echo "setup: $*" >&2
	exit 1
}

wanted_packages() {
	local line
	while read -r line; do
		[[ $line == '#'* || -z $line ]] && continue
		[[ $line == *'[lab]'* && $want_lab != lab ]] && continue
		# Any python3 that is new enough serves: do not pull Debian's beside it.
		[[ $line == python3* && -n $python ]] && continue
		echo "${line%%[[:space:]]*}"
	done <packaging/apt.txt
}

# The first python3 that is new enough and can make a virtual environment.
find_python() {
	local candidate
	for candidate in python3 python3.11 python3.12 python3.13; do
		if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			command -v "$candidate"
			return
		fi
	done
}

install_packages() {
	local missing=() wanted=()
	mapfile -t wanted < <(wanted_packages)
	if ! command -v dpkg-query >/dev/null; then
		echo "setup: not a Debian: install the equivalents of packaging/apt.txt yourself" >&2
		return
	fi
	# The status is asked of dpkg each time: a stamp would not notice a package that was removed.
	mapfile -t missing < <(
		comm -23 <(printf '%s\n' "${wanted[@]}" | sort) \
			<(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "${wanted[@]}" 2>/dev/null |
				sed -n 's/^ii  *//p' | sort -u)
	)
	((${#missing[@]})) || return 0
	((EUID == 0)) || fail "as root: apt-get install --no-install-recommends ${missing[*]}"
	echo "setup: installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	# Others may hold dpkg's lock for a while (unattended upgrades, a second checkout).
	local apt=(apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0)
	"${apt[@]}" update </dev/null || fail "apt-get update failed: is the network there?"
	"${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null ||
		fail "apt-get install failed: ${missing[*]}"
}

# Usage: install_python GROUP. The stamp holds what was installed: the text of pyproject.toml.
install_python() {
	local stamp=.venv/portwright-$1.stamp
	cmp -s pyproject.toml "$stamp" && [[ -x .venv/bin/python ]] && return
	if ! .venv/bin/python -c '' 2>/dev/null; then
		[[ -n $python ]] || python=$(find_python)
		[[ -n $python ]] || fail "no python3 >= 3.11 with venv"
		rm -rf .venv
		"$python" -m venv .venv
	fi
	echo "setup: python packages ($1)"
	# --group (PEP 735) came with pip 25.1; Debian 12's venv starts at 23.
	.venv/bin/python -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' ||
		.venv/bin/python -m pip install -q --disable-pip-version-check -U 'pip>=25.1' 2>&1 | { grep -v '^WARNING: Location' || true; }
	.venv/bin/python -m pip install -q --disable-pip-version-check -e . --group "$1" 2>&1 | { grep -v '^WARNING: Location' || true; }
	cp pyproject.toml "$stamp"
}

python=
[[ -x .venv/bin/python ]] && python=.venv/bin/python || python=$(find_python)
install_packages
[[ $python == .venv/bin/python ]] && python=
install_python dev
[[ $want_lab != lab ]] || install_python lab
make --no-print-directory -s build
