#!/bin/bash
# Unpacks the containerd of other Debian releases, and the LXC of Debian 13, below
# target/containerd/<suite>/ without touching the system: a private apt configuration, nothing is
# installed, no daemon is started.
#
# usage: tests/containerd-debs.sh [bookworm|trixie|sid ...]
#
# <suite>/bin holds what the test harness wants in E2E_CONTAINERD: containerd, ctr,
# containerd-shim-runc-v2 and runc, runnable on this machine, and for trixie lxc-start and lxc-stop of
# LXC 6 (the later one of sid may not know this machine's cgroup version).
set -euo pipefail

cd "$(dirname "$0")/.."
target=$PWD/target/containerd
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
(($#)) || set -- bookworm trixie sid

# Runs an apt tool with directories of its own.
private_apt() {
	local tool=$1
	shift
	"$tool" \
		-o Dir::State="$work/state" \
		-o Dir::State::status="$work/status" \
		-o Dir::Cache="$work/cache" \
		-o Dir::Etc::sourcelist="$work/sources.list" \
		-o Dir::Etc::sourceparts=/dev/null \
		-o Dir::Etc::preferencesparts=/dev/null \
		-o Dir::Etc::preferences=/dev/null \
		-o APT::Get::List-Cleanup=false \
		-o APT::Sandbox::User=root \
		-o Acquire::Languages=none \
		-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false \
		-o Debug::NoLocking=true \
		"$@"
}

# Downloads and unpacks packages of a suite into the directory $1.
unpack() {
	local into=$1 deb
	shift
	mkdir -p "$work/debs" "$into"
	(cd "$work/debs" && private_apt apt-get -qq download "$@")
	for deb in "$work"/debs/*.deb; do
		dpkg-deb --extract "$deb" "$into"
		rm -- "$deb"
	done
}

# Some packages need a newer libc than this machine's. containerd's do not (they are Go programs
# with few libc symbols); runc's of Debian 13 does, and then the system's runc serves as well.
runs_here() {
	"$1" --version >/dev/null 2>&1 || "$1" -v >/dev/null 2>&1
}

# LXC with all libraries it needs: its own libc too, so that it runs on an older system.
unpack_lxc() {
	local tree=$1 program
	unpack "$tree/lxc" lxc liblxc1t64 libc6 libgcc-s1 libapparmor1 libcap2 libdbus-1-3 libpcre2-8-0 \
		libseccomp2 libselinux1 libsystemd0
	for program in lxc-start lxc-stop; do
		cat >"$tree/bin/$program" <<-EOF
			#!/bin/sh
			root=$tree/lxc/usr
			set -- --argv0 $program "\$root/bin/$program" "\$@"
			exec "\$root"/lib/*/ld-linux-*.so.* --library-path "\$(echo "\$root"/lib/*-linux-gnu)" "\$@"
		EOF
		chmod 0755 "$tree/bin/$program"
		runs_here "$tree/bin/$program"
	done
}

fetch() {
	local suite=$1 address=$2
	local tree=$target/$suite
	if [[ -e $tree/complete && ($suite != trixie || -e $tree/lxc) ]]; then
		echo "$suite: containerd $(cat "$tree/complete") (cached)"
		return
	fi
	rm -rf -- "$tree"
	work=$target/.apt-$suite
	rm -rf -- "$work"
	mkdir -p "$work"/{state/lists/partial,cache/archives/partial}
	: >"$work/status"
	printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$address" "$suite" >"$work/sources.list"
	private_apt apt-get -qq update
	unpack "$tree/root" containerd runc
	mkdir -p "$tree/bin"
	local program from
	for program in containerd ctr containerd-shim-runc-v2 runc; do
		from=$(find "$tree/root" -type f -name "$program" -path '*bin/*' | head -n 1)
		if [[ -z $from ]]; then
			echo "$suite: the packages hold no $program" >&2
			return 1
		fi
		if runs_here "$from"; then
			ln -s "${from/#$tree/..}" "$tree/bin/$program"
		elif [[ $program == runc ]]; then
			echo "$suite: its runc does not run with this machine's libraries, the system's is used"
		else
			echo "$suite: not runnable with this machine's libraries:" >&2
			"$from" --version >&2 || true
			return 1
		fi
	done
	if [[ $suite == trixie ]]; then
		unpack_lxc "$tree"
	fi
	private_apt apt-cache show --no-all-versions containerd |
		sed -n 's/^Version: //p' | head -n 1 >"$tree/complete"
	rm -rf -- "$work"
	echo "$suite: containerd $(cat "$tree/complete")"
}

address=$(tests/mirror.sh)
for suite; do
	fetch "$suite" "$address"
done
