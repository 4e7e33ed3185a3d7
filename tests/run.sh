#!/bin/bash
# Unit tests, then every end-to-end suite on the containerd of Debian 12, 13 and sid. Called by
# `make test`, which has built everything.
#
# usage: tests/run.sh [bookworm|trixie|sid|system ...]    only the suites, on these
set -euo pipefail

cd "$(dirname "$0")/.."
export E2E_BIN=$PWD/target/release
# Two CPUs and many short waits: more threads than CPUs pay off.
threads=$((2 * $(nproc)))
failed=()

check() { # COMMAND...; what fails does not keep the rest from being tested
	"$@" || failed+=("$*")
}

suites() { # NAME [DIRECTORY]
	local name=$1
	echo
	echo "== end-to-end suites, containerd of $name"
	E2E_CONTAINERD=${2:-} cargo test --locked --test e2e -- --test-threads="$threads" ||
		failed+=("end-to-end suites, containerd of $name")
}

if (($# == 0)); then
	echo "== unit tests"
	check cargo test --locked --no-fail-fast --workspace --lib --bins
	echo "== what fuzzing has found"
	check cargo test --locked -p containerd-shim-proxmox-v2 --test fuzz_seeds
	echo "== init with real LXC, the bootstrap protocol, the client, the simulator and its contract"
	cargo build --locked -p pve-sim --bins
	check cargo test --locked -p proxmox-shim-init --test ct
	check cargo test --locked -p containerd-shim-proxmox-v2 --no-fail-fast --test bootstrap --test client
	check cargo test --locked --no-fail-fast -p pve-sim --tests
	echo "== the simulator and a client that was written for Proxmox VE"
	check tests/proxmoxer.sh "$E2E_BIN/pve-sim"
	check cargo test --locked --workspace --doc
	set -- bookworm trixie sid
fi

for release; do
	if [[ $release == system ]]; then
		suites system
	elif tests/containerd-debs.sh "$release"; then
		suites "$release" "$PWD/target/containerd/$release/bin"
	elif [[ $release == bookworm ]]; then
		# Without a mirror at least this machine's own containerd is tested.
		suites system
		failed+=("$release (not available)")
	else
		failed+=("$release (not available)")
	fi
done

if ((${#failed[@]})); then
	echo
	printf 'FAILED: %s\n' "${failed[@]}" >&2
	exit 1
fi
