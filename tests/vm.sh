#!/bin/bash
# Runs the end-to-end suites in a virtual machine with Debian 13's own kernel. Called by
# `make test-vm`, which has built everything.
set -euo pipefail

usage() {
	cat <<-'END'
		usage: tests/vm.sh [--image-only] [--quick | --bench] [WORD...]

		Boots Debian 13 in QEMU (emulated where there is no KVM, or this machine is a virtual one
		itself; that is slow and takes two cores): its stock kernel, systemd, cgroup2 only, AppArmor enforcing, LXC 6 and
		containerd 1.7. In it run the end-to-end suites, or the tests with a WORD in their names.
		The machine has no network and leaves nothing behind but its logs.

		  --quick       the tests of what depends on the kernel, cgroup2, AppArmor or systemd most
		  --bench       the benchmark instead, in few rounds; emulation leaves only its ratios
		  --image-only  only build the machine's disk (once, 1 GB below target/vm)

		environment:
		  E2E_BIN       directory with the shim, init and simulator [target/release]
		  VM_TIMEOUT    seconds until the machine is switched off [5400]
		  VM_THREADS    tests at once [2]

		Exits 0 if all tests passed. Logs: target/vm/log
	END
}

cd "$(dirname "$0")/.."
vm=$PWD/target/vm
log=$vm/log
words=() image_only=no bench=no
quick=(apparmor:: limits:: oom device proxmox:: signals:: namespaces:: userns:: pods:: cri::pods_are cri::res cri::sec)
for argument; do
	case $argument in
	--help | -h) usage && exit ;;
	--image-only) image_only=yes ;;
	--bench) bench=yes ;;
	--quick) words+=("${quick[@]}") ;;
	-*) usage >&2 && exit 2 ;;
	*) words+=("$argument") ;;
	esac
done
bin=${E2E_BIN:-$PWD/target/release}
seconds=${VM_TIMEOUT:-5400}
started=$SECONDS
work='' qemu='' reader=''

say() { printf '== %s\n' "$*"; }

cleanup() {
	local status=$?
	trap - EXIT INT TERM HUP
	local pid
	for pid in $qemu $reader; do
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	done
	[[ -z $work ]] || rm -rf --one-file-system -- "$work"
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The recipe of the machine's disk: what differs from the one it was made by makes it anew.
suite=trixie
packages=(
	systemd-sysv udev kmod dbus linux-image-amd64 initramfs-tools apparmor
	lxc containerd runc busybox-static iproute2 procps curl libseccomp2
	containernetworking-plugins iptables erofs-utils e2fsprogs
)
# Kept as small as the machine needs them: a large one takes an emulated machine minutes to load.
modules=(virtio_pci virtio_blk ext4)

# Set up inside the new system ($1).
configure() {
	local root=$1
	echo vm >"$root/etc/hostname"
	printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
	# Neither of them is to start anything here: the suites have a containerd and bridges of their own.
	ln -sf /dev/null "$root/etc/systemd/system/containerd.service"
	ln -sf /dev/null "$root/etc/systemd/system/lxc-net.service"
	cat >"$root/etc/systemd/system/suites.service" <<-'END'
		[Unit]
		Description=End-to-end suites
		After=multi-user.target apparmor.service
		SuccessAction=poweroff-force
		FailureAction=poweroff-force

		[Service]
		Type=oneshot
		ExecStart=/bin/sh -c 'modprobe 9pnet_virtio && mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 host /mnt && exec /mnt/guest'
		StandardOutput=journal+console
		StandardError=journal+console
		# Of the containers' cgroups, as containerd's own unit has it.
		Delegate=yes

		[Install]
		WantedBy=default.target
	END
	mkdir -p "$root/etc/systemd/system/default.target.wants"
	ln -sf ../suites.service "$root/etc/systemd/system/default.target.wants/suites.service"
}

# The packages of the new system ($1) from a mirror ($2).
bootstrap() {
	# shellcheck disable=SC2016
	nice mmdebstrap --quiet --mode=root --variant=apt --components=main \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--include="$(IFS=,; echo "${packages[*]}")" \
		--aptopt='Acquire::Languages "none"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
		--essential-hook='echo MODULES=list >"$1/etc/initramfs-tools/conf.d/modules"' \
		--essential-hook="printf '%s\\n' ${modules[*]} >\"\$1/etc/initramfs-tools/modules\"" \
		"$suite" "$1" "$2"
}

build_image() {
	local recipe address root=$work/root
	recipe=$(declare -p suite packages modules && declare -f bootstrap configure)
	if [[ -e $vm/disk && $(cat "$vm/recipe" 2>/dev/null) == "$recipe" ]]; then
		return
	fi
	address=$(tests/mirror.sh)
	say "building the machine's disk of Debian $suite (once; some minutes)"
	rm -f -- "$vm/recipe"
	mkdir -p "$root"
	bootstrap "$root" "$address" >"$log/mmdebstrap.log" 2>&1 || {
		tail -n 20 "$log/mmdebstrap.log" >&2
		return 1
	}
	configure "$root"
	cp -L -- "$root/vmlinuz" "$vm/kernel"
	cp -L -- "$root/initrd.img" "$vm/initrd"
	# Sparse, with room for images, snapshots and logs.
	rm -f -- "$vm/disk"
	nice mke2fs -q -t ext4 -L root -d "$root" "$vm/disk" 6G >/dev/null
	rm -rf --one-file-system -- "$root"
	printf '%s\n' "$recipe" >"$vm/recipe"
}

# The path of the compiled suites, or of the benchmark.
suites() {
	local build=(test --test) name=e2e
	[[ $bench == no ]] || build=(bench --bench) name=shims
	cargo "${build[@]}" "$name" --locked --no-run --message-format=json 2>"$log/cargo.log" |
		sed -n "s/.*\"executable\":\"\([^\"]*\/$name-[^\"]*\)\".*/\1/p" || {
		tail -n 20 "$log/cargo.log" >&2
		return 1
	}
}

# What the machine runs: its words and those of the suites come back through the shared directory.
guest() {
	local arguments=--test-threads=${VM_THREADS:-2}
	[[ $bench == no ]] || arguments=--bench
	cat <<-END
		#!/bin/sh
		export HOME=/root PATH=/usr/sbin:/usr/bin LANG=C.UTF-8
		export E2E_BIN=/opt/e2e E2E_PROBE=/opt/e2e/probe E2E_LOGS=/mnt/e2e-logs
		export E2E_UNITS=systemd E2E_SLOW=4 E2E_CONTAINERD= RUST_BACKTRACE=0
		export E2E_ONLY='${words[*]}'
		exec >/mnt/output 2>&1
		printf 'root:100000:65536\\nroot:1000000:1000000\\n' | tee /etc/subuid >/etc/subgid
		cp -r /mnt/bin /opt/e2e
		profile=\$(sed -n 's,^/usr/bin/lxc-start (\(.*\)),\1,p' /sys/kernel/security/apparmor/profiles)
		echo "kernel \$(uname -r), PID 1 \$(cat /proc/1/comm), \$(stat -fc %T /sys/fs/cgroup)," \\
			"AppArmor of lxc-start: \$profile, LXC \$(lxc-start --version), \$(containerd --version)," \\
			"clock \$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
		export BENCH_ROUNDS=${BENCH_ROUNDS:-5} BENCH_STDOUT_MIB=${BENCH_STDOUT_MIB:-64}
		/opt/e2e/e2e $arguments
		echo \$? >/mnt/status
		journalctl --no-pager -b >/mnt/journal
		sync
	END
}

prepare() {
	local program
	mkdir -p "$work/share/bin"
	for program in containerd-shim-proxmox-v2 proxmox-shim-init pve-sim; do
		cp -- "$bin/$program" "$work/share/bin/"
	done
	cp -- "$(suites)" "$work/share/bin/e2e"
	cc -static -O1 -pthread -o "$work/share/bin/probe" tests/e2e/programs/probe.c
	guest >"$work/share/guest"
	chmod 0755 "$work/share/guest"
	: >"$work/share/output"
}

# KVM inside of a virtual machine often fails only when the guest is under way.
accelerator() {
	if [[ -n ${VM_ACCEL:-} ]]; then
		echo "$VM_ACCEL"
	elif [[ -w /dev/kvm ]] && ! grep -q '^flags.* hypervisor' /proc/cpuinfo; then
		echo kvm
	else
		echo tcg,thread=multi
	fi
}

boot() {
	local machine=(
		-accel "$(accelerator)" -cpu max -smp 2 -m 4096
		-nodefaults -display none -no-reboot -nic none
		-kernel "$vm/kernel" -initrd "$vm/initrd"
		-append 'root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off no5lvl norandmaps tsc=reliable systemd.show_status=0 loglevel=4 systemd.tty.term.console=dumb systemd.tty.term.ttyS0=dumb'
		-drive "file=$vm/disk,format=raw,if=virtio,snapshot=on,cache=unsafe"
		-virtfs "local,path=$work/share,mount_tag=host,security_model=none"
		-serial "file:$log/console"
	)
	TMPDIR=$work qemu-system-x86_64 "${machine[@]}" 2>"$log/qemu" &
	qemu=$!
	# With the seconds since the start, as emulation makes some tests take long.
	local begin=$SECONDS line
	tail -n +1 -f --pid="$qemu" "$work/share/output" |
		while IFS= read -r line; do
			printf '%5d  %s\n' $((SECONDS - begin)) "$line"
		done &
	reader=$!
	local deadline=$((SECONDS + seconds))
	while kill -0 "$qemu" 2>/dev/null; do
		if ((SECONDS >= deadline)); then
			echo "the machine was switched off after $seconds s" >&2
			return
		fi
		sleep 1
	done
	wait "$reader" || true
	reader=
}

mkdir -p "$log"
work=$(mktemp -d "$vm/work.XXXXXX")
build_image
[[ $image_only == no ]] || exit 0
say "copying the suites"
prepare
rm -rf -- "$log/e2e-logs" "$log/journal" "$log/output"
say "booting Debian $suite in QEMU"
boot
cp -r -- "$work"/share/{output,journal,e2e-logs} "$log/" 2>/dev/null || true
status=$(cat "$work/share/status" 2>/dev/null || echo none)
say "result: $([[ $status == 0 ]] && echo passed || echo "FAILED (status $status)")," \
	"$(((SECONDS - started) / 60)) minutes, logs in $log"
if [[ $status == none ]]; then
	echo "the suites did not come to their end; the last words of the machine:" >&2
	tail -n 15 "$log/console" "$log/qemu" >&2
fi
[[ $status == 0 ]]
