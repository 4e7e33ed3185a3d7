#!/bin/bash
# Drives the simulator with proxmoxer, a Proxmox VE client in Python, from PyPI in a virtual
# environment below target/. Needs root, LXC, busybox and python3-venv.
#
# usage: tests/proxmoxer.sh PVE_SIM
set -euo pipefail

cd "$(dirname "$0")/.."
simulator=$(realpath "$1")
environment=target/proxmoxer
packages=(proxmoxer==2.3.0 requests==2.34.2 requests-toolbelt==1.0.0)

if ! "$environment/bin/python" -c 'import proxmoxer, requests, requests_toolbelt' 2>/dev/null; then
	python3 -m venv "$environment"
	"$environment/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
fi

root=$(mktemp -d)
pid=
finish() {
	if [[ -n $pid ]]; then
		kill "$pid" 2>/dev/null || true
		wait "$pid" || true
	fi
	rm -rf -- "$root"
}
trap finish EXIT

mkdir -p "$root"/rootfs/{bin,dev,etc,proc,sys}
cp /bin/busybox "$root/rootfs/bin/"
ln -s busybox "$root/rootfs/bin/sleep"
tar -czf "$root/bb_1.0_amd64.tar.gz" -C "$root/rootfs" .

"$simulator" --root "$root/sim" >"$root/out" 2>"$root/err" &
pid=$!
for ((n = 0; n < 200; n++)); do
	[[ ! -s $root/sim/ready.json ]] || break
	kill -0 "$pid" 2>/dev/null || break
	sleep 0.05
done
if [[ ! -s $root/sim/ready.json ]]; then
	cat "$root/err" >&2
	exit 1
fi
# A VMID of this process's own, as the cgroups of all CTs of a host lie side by side.
VMID=$((600000000 + $$ % 100000 * 1000)) "$environment/bin/python" tests/pve-sim/tests/with_proxmoxer.py \
	"$root/sim/ready.json" "$root/bb_1.0_amd64.tar.gz"
