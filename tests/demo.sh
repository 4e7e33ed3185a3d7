#!/bin/bash
# The demonstration of `make demo`: an unmodified containerd runs containers as Proxmox VE CTs.
#
# Everything lives below one temporary directory: the Proxmox VE simulator (a real HTTPS API over
# real LXC containers), containerd with its own root, state and socket, the image, the logs. Each
# step is checked; the first deviation ends the script with the reason and a non-zero status.
set -euo pipefail

cd "$(dirname "$0")/.."
bin=${DEMO_BIN:-$PWD/target/release}
# Another runtime shows that the steps themselves are right; its CTs are not on Proxmox then.
runtime=${DEMO_RUNTIME:-io.containerd.proxmox.v2}
vmids=${DEMO_VMIDS:-90000-90099}
export PATH=$bin:$PATH:/usr/sbin:/sbin
export LC_ALL=C
image=docker.io/library/demo:1
started=$SECONDS
# The transcript, also from functions whose output is caught.
exec 3>&1

if [[ -t 1 ]]; then
	bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
else
	bold='' dim='' red='' green='' plain=''
fi

step=0
heading() {
	step=$((step + 1))
	printf '\n%s%d. %s%s\n' "$bold" "$step" "$*" "$plain"
}
note() { printf '%s   %s%s\n' "$dim" "$*" "$plain"; }
prompt() { printf '%s$ %s%s\n' "$bold" "$*" "$plain"; }
indent() { sed 's/^/   /'; }
good() { printf '   %s✓%s %s\n' "$green" "$plain" "$*"; }
fail() {
	printf '\n%sdemo failed:%s %s\n' "$red" "$plain" "$*" >&2
	if [[ -s $root/containerd.log ]]; then
		printf 'last warnings of containerd:\n' >&2
		grep -E 'level=(warn|error)' "$root/containerd.log" | tail -n 5 >&2 || true
	fi
	exit 1
}
# equal WHAT ACTUAL EXPECTED
equal() { [[ $2 == "$3" ]] || fail "$1 is '$2', expected '$3'"; }
# contains WHAT TEXT PART
contains() { [[ $2 == *"$3"* ]] || fail "$1 does not contain '$3': $2"; }
# within SECONDS WHAT COMMAND...: repeats the command until it succeeds
within() {
	local tries=$(($1 * 20)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		((tries-- > 0)) || fail "$what"
		sleep 0.05
	done
}
on_proxmox() { [[ $runtime == io.containerd.proxmox.v2 ]]; }

# --- the private world and its end -------------------------------------------------------------

root=$(mktemp -d /tmp/demo.XXXXXX)
chmod 0700 "$root"
namespace=demo-$$
export CONTAINERD_ADDRESS=$root/c.sock CONTAINERD_NAMESPACE=$namespace
containerd_pid='' sim_pid='' events_pid=''

stop() { # PID
	[[ -n $1 ]] || return 0
	kill "$1" 2>/dev/null || return 0
	for _ in {1..200}; do
		kill -0 "$1" 2>/dev/null || return 0
		sleep 0.05
	done
	kill -9 "$1" 2>/dev/null || true
}
mounts() { awk -v root="$root/" 'index($5, root) == 1 {print $5}' /proc/self/mountinfo; }
cgroups() { find /sys/fs/cgroup -mindepth 1 -type d -path "*/$namespace/*"; }
sockets() {
	local id
	for id in hello web victim; do
		ls "/run/containerd/s/$(printf %s "$root/c.sock/$namespace/$id" | sha256sum | cut -d ' ' -f 1)"
	done
}
shims() { pgrep -f "containerd-shim-.*$root/c.sock" || true; }

cleanup() {
	local status=$? id pid mount
	trap - EXIT INT TERM HUP
	set +e
	exec 2>/dev/null
	if [[ -S $CONTAINERD_ADDRESS ]]; then
		for id in $(timeout 5 ctr containers ls -q); do
			timeout 10 ctr tasks delete --force "$id"
			timeout 5 ctr containers delete "$id"
		done >/dev/null
	fi
	stop "$events_pid"
	stop "$containerd_pid"
	for pid in $(shims); do kill -9 "$pid"; done
	stop "$sim_pid"
	# A paused workload dies only when it is thawed.
	cgroups | while read -r group; do
		[[ -e $group/freezer.state ]] && echo THAWED >"$group/freezer.state"
		[[ -e $group/cgroup.freeze ]] && echo 0 >"$group/cgroup.freeze"
	done
	for pid in $(cgroups | while read -r group; do cat "$group/cgroup.procs"; done | sort -u); do
		kill -9 "$pid"
	done
	sleep 0.1
	sockets | while read -r socket; do rm -f -- "$socket"; done
	while read -r mount; do umount -l -- "$mount"; done < <(mounts | tac)
	find /sys/fs/cgroup -depth -type d -path "*/$namespace*" -exec rmdir {} +
	rm -rf -- "$root"
	rmdir /run/containerd/s /run/containerd 2>/dev/null
	exit "$status"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# ctr with this demo's private paths, which would only hide what matters in the transcript.
private=(--fifo-dir "$root/fifo")
if on_proxmox; then
	run_flags=(--runtime "$runtime" --runtime-config-path "$root/shim.toml")
else
	run_flags=(--runtime "$runtime" --runc-root "$root/runc")
fi
quoted() { # as a person would type it
	local word
	for word; do
		if [[ $word =~ ^[[:alnum:]_./:@=-]+$ ]]; then
			printf ' %s' "$word"
		else
			printf " '%s'" "$word"
		fi
	done
}
run() {
	printf '%s$ ctr run --runtime %s%s%s\n' "$bold" "$runtime" "$(quoted "$@")" "$plain" >&3
	ctr run "${run_flags[@]}" "${private[@]}" "$@"
}
task_exec() { # FLAGS... CONTAINER COMMAND...
	printf '%s$ ctr tasks exec%s%s\n' "$bold" "$(quoted "$@")" "$plain" >&3
	ctr tasks exec "${private[@]}" "$@"
}
task_field() { ctr tasks ls | awk -v id="$1" -v field="$2" '$1 == id {print $field}'; }
task_is() { [[ $(task_field "$1" 3) == "$2" ]]; }

# The Proxmox API as the administrator. The token goes through a file, never through argv.
api() { # METHOD PATH [curl arguments]
	local method=$1 path=$2
	shift 2
	curl --silent --show-error --fail-with-body --noproxy '*' --max-time 20 \
		--config "$root/curl.conf" --request "$method" "$@" "$endpoint/api2/json$path"
}

# A file of a container's cgroup: cgroup PID ID CONTROLLER V1-FILE V2-FILE
cgroup() {
	local path base=/sys/fs/cgroup file=$5
	path=$(awk -F : -v c="$3" '$2 == c {print $3}' "/proc/$1/cgroup")
	if [[ -n $path ]]; then
		base=$base/$3 file=$4
	else
		path=$(awk -F : '$1 == 0 {print $3}' "/proc/$1/cgroup")
	fi
	# The process may be in a leaf below the cgroup that is named after the container.
	[[ $path == */$2/* ]] && path=${path%"/$2/"*}/$2
	cat "$base$path/$file"
}

# --- start -------------------------------------------------------------------------------------

printf '%scontainerd-shim-proxmox-v2: OCI containers as Proxmox VE CTs%s\n' "$bold" "$plain"
note "everything below is private to this run: $root"

if on_proxmox; then
	heading 'A Proxmox VE node: its HTTPS API, an API token with a restricted role, real LXC below'
	setsid pve-sim --root "$root/sim" --listen 127.0.0.1:0 >"$root/sim.out" 2>"$root/sim.log" &
	sim_pid=$!
	within 10 "the simulator does not listen: $(tail -n 3 "$root/sim.log")" test -s "$root/sim/ready.json"
	ready() { jq -r ".$1" "$root/sim/ready.json"; }
	endpoint=$(ready endpoint) node=$(ready node)
	(
		umask 077
		printf 'header = "Authorization: PVEAPIToken=%s"\ncacert = "%s"\n' \
			"$(<"$(ready admin_token_file)")" "$(ready ca_file)" >"$root/curl.conf"
	)
	cat >"$root/shim.toml" <<-END
		[proxmox]
		endpoint = "$endpoint"
		node = "$node"
		token_file = "$(ready token_file)"
		fingerprint = "$(ready fingerprint)"
		pmxcfs = "$(ready pmxcfs)"

		[ct]
		vmid_range = "$vmids"
		tags = ["containerd", "demo"]

		[paths]
		run_dir = "$root/run"
		state_dir = "$root/state-dir"
		init = "$bin/proxmox-shim-init"
	END
	indent <"$root/shim.toml"
	version=$(api GET /version | jq -r '.data | "pve-manager \(.version)"')
	token=$(cut -d = -f 1 "$(ready token_file)")
	good "$version answers at $endpoint; the shim's token is $token"
fi

heading 'A containerd that knows nothing of Proxmox'
cat >"$root/containerd.toml" <<-END
	version = 2
	root = "$root/root"
	state = "$root/state"
	disabled_plugins = [
	  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
	  "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
	]
	[grpc]
	address = "$root/c.sock"
END
# A session of its own: Ctrl-C must not end it before the cleanup has used it.
setsid containerd --config "$root/containerd.toml" >"$root/containerd.log" 2>&1 &
containerd_pid=$!
within 20 'containerd does not answer' ctr version
ctr version | awk '/Server/ {server = 1} server && /Version/ {print "   containerd " $2}'

heading 'A small image, made from the static busybox: no daemon, no registry, no network'
mkdir -p "$root"/image/{blobs/sha256,rootfs/{bin,dev,etc,proc,sys,tmp}}
cp -- "$(command -v busybox)" "$root/image/rootfs/bin/busybox"
for applet in $(busybox --list); do
	[[ $applet == busybox ]] || ln -s busybox "$root/image/rootfs/bin/$applet"
done
echo 'root:x:0:0:root:/:/bin/sh' >"$root/image/rootfs/etc/passwd"
blob() { # stdin -> "sha256:… SIZE"
	local digest
	cat >"$root/image/blob"
	digest=$(sha256sum <"$root/image/blob" | cut -d ' ' -f 1)
	mv "$root/image/blob" "$root/image/blobs/sha256/$digest"
	echo "sha256:$digest $(stat -c %s "$root/image/blobs/sha256/$digest")"
}
read -r layer layer_size < <(tar -C "$root/image/rootfs" --owner=0 --group=0 -cf - . | blob)
machine=$(dpkg --print-architecture)
read -r config config_size < <(jq -nc --arg l "$layer" --arg a "$machine" '{
	architecture: $a, os: "linux", config: {Env: ["PATH=/bin"], Cmd: ["sh"]},
	rootfs: {type: "layers", diff_ids: [$l]}}' | blob)
type=application/vnd.oci.image
read -r manifest manifest_size < <(jq -nc --arg t "$type" --arg c "$config" --arg l "$layer" \
	--argjson cs "$config_size" --argjson ls "$layer_size" '{
	schemaVersion: 2, mediaType: "\($t).manifest.v1+json",
	config: {mediaType: "\($t).config.v1+json", digest: $c, size: $cs},
	layers: [{mediaType: "\($t).layer.v1.tar", digest: $l, size: $ls}]}' | blob)
jq -nc --arg t "$type" --arg m "$manifest" --argjson s "$manifest_size" --arg n "$image" '{
	schemaVersion: 2, manifests: [{mediaType: "\($t).manifest.v1+json", digest: $m, size: $s,
	annotations: {"io.containerd.image.name": $n}}]}' >"$root/image/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$root/image/oci-layout"
tar -C "$root/image" -cf "$root/image.tar" oci-layout index.json blobs
prompt 'ctr images import image.tar'
ctr images import "$root/image.tar" >/dev/null
ctr images ls -q | indent
equal 'the image list' "$(ctr images ls -q)" "$image"
ctr events >"$root/events" 2>/dev/null &
events_pid=$!

# --- containers --------------------------------------------------------------------------------

heading 'Hello world'
output=$(run --rm "$image" hello echo 'hello from a Proxmox CT')
indent <<<"$output"
equal 'the output' "$output" 'hello from a Proxmox CT'

heading 'A container in the background, seen from both sides'
# shellcheck disable=SC2016 # expanded inside the container
workload='trap "echo caught TERM; exit 42" TERM; n=0; while :; do n=$((n + 1)); echo "tick $n"; sleep 0.1; done'
run -d --memory-limit 67108864 --env GREETING=hi --log-uri "file://$root/web.log" \
	"$image" web sh -c "$workload"
prompt 'ctr tasks ls'
ctr tasks ls | indent
task_is web RUNNING || fail "web is not running: $(task_field web 3)"
pid=$(task_field web 2)
good "pid $pid is $(tr '\0\n' '  ' <"/proc/$pid/cmdline" | cut -c 1-44)…"
if on_proxmox; then
	prompt "curl $endpoint/api2/json/nodes/$node/lxc"
	list=$(api GET "/nodes/$node/lxc")
	jq -r '.data[] | "   CT \(.vmid)  \(.status)  name=\(.name)  tags=\(.tags)  maxmem=\(.maxmem)"' <<<"$list"
	equal 'the number of CTs' "$(jq '.data | length' <<<"$list")" 1
	vmid=$(jq -r '.data[0].vmid' <<<"$list")
	equal "the state of CT $vmid" "$(jq -r '.data[0].status' <<<"$list")" running
	contains "the name of CT $vmid" "$(jq -r '.data[0].name' <<<"$list")" web
	contains "the tags of CT $vmid" "$(jq -r '.data[0].tags' <<<"$list")" containerd
	((vmid >= ${vmids%-*} && vmid <= ${vmids#*-})) || fail "VMID $vmid is not in $vmids"
	current=$(api GET "/nodes/$node/lxc/$vmid/status/current")
	equal 'the pid that Proxmox shows' "$(jq -r '.data.pid' <<<"$current")" "$pid"
	conf=$(api GET "/nodes/$node/lxc/$vmid/config")
	prompt "curl …/lxc/$vmid/config | jq -r .data.description"
	jq -r '.data.description' <<<"$conf" | indent
	contains 'the notes' "$(jq -r '.data.description' <<<"$conf")" web
	equal 'the memory that Proxmox shows' "$(jq -r '.data.memory' <<<"$conf")" 64
	if grep -rq GREETING "$(ready pmxcfs)"; then
		fail 'the environment of the container is in /etc/pve'
	fi
	good "one CT, $vmid, with the container's pid, name, tags, notes and memory limit"
fi

heading 'exec, without and with a terminal'
status=0
# shellcheck disable=SC2016 # expanded inside the container
output=$(task_exec --exec-id one web sh -c 'echo "$GREETING from pid $$"; exit 7') || status=$?
indent <<<"$output"
contains 'the output' "$output" 'hi from pid'
equal 'the exit status of the exec' "$status" 7
export -f task_exec quoted
export bold plain root
# ctr resizes the terminal when it has started the exec: the exec must live to see it.
output=$(SHELL=/bin/bash script --quiet --return --command \
	"private=(--fifo-dir '$root/fifo'); task_exec --tty --exec-id two web sh -c 'tty; sleep 0.3'" \
	/dev/null </dev/null 2>&1 | tr -d '\r\b' | sed 's/\^[@D]//g')
indent <<<"$output"
contains 'the terminal' "$output" /dev/pts/
good 'exit status 7 came back; the second exec had a terminal'

heading 'Logs'
prompt 'head -n 3 web.log'
within 5 'the log has no third line' grep -qx 'tick 3' "$root/web.log"
head -n 3 "$root/web.log" | indent
equal 'the first line' "$(head -n 1 "$root/web.log")" 'tick 1'

heading 'Statistics and processes'
prompt 'ctr tasks metrics web'
metrics=$(ctr tasks metrics web)
grep -E '^(ID|TIMESTAMP|METRIC|memory.usage|memory.usage_in_bytes|memory.limit|cpu|pids)' <<<"$metrics" | head -n 8 | indent
usage=$(awk '$1 ~ /^memory\.usage(_in_bytes)?$/ {print $2; exit}' <<<"$metrics")
((usage > 0)) || fail 'the memory usage is zero'
prompt 'ctr tasks ps web'
ctr tasks ps web | indent
ctr tasks ps web | awk '{print $1}' | grep -qx "$pid" || fail "pid $pid is not in the list"
good "$usage bytes of memory in use"

heading 'Pause and resume'
prompt 'ctr tasks pause web; ctr tasks resume web'
ctr tasks pause web
sleep 0.1
task_is web PAUSED || fail "web is not paused: $(task_field web 3)"
before=$(wc -l <"$root/web.log")
sleep 0.5
equal 'the number of log lines after half a second' "$(wc -l <"$root/web.log")" "$before"
ctr tasks resume web
task_is web RUNNING || fail "web is not running again: $(task_field web 3)"
ticked() { (($(wc -l <"$root/web.log") > before)); }
within 5 'the log does not grow after resume' ticked
good "silent at $before lines while paused, ticking again"

heading 'Update: the memory limit becomes 96 MiB while the container runs'
note 'ctr has no command for it: this is the call nerdctl update makes, sent with curl'
# containerd.services.tasks.v1.UpdateTaskRequest: container id, resources as an Any.
field() { # NUMBER TEXT, both shorter than 128 bytes
	printf '%b%b%s' "\\x$(printf %02x $(($1 * 8 + 2)))" "\\x$(printf %02x ${#2})" "$2"
}
limit=$((96 * 1024 * 1024))
any=$(field 1 types.containerd.io/opencontainers/runtime-spec/1/LinuxResources)$(
	field 2 "{\"memory\":{\"limit\":$limit,\"swap\":$limit}}"
)
message=$(field 1 web)$(field 2 "$any")
{
	printf '\x00\x00\x00\x00%b' "\\x$(printf %02x ${#message})"
	printf %s "$message"
} >"$root/update"
curl --silent --show-error --max-time 20 --http2-prior-knowledge --noproxy '*' \
	--unix-socket "$root/c.sock" --data-binary "@$root/update" --dump-header "$root/headers" \
	-H 'content-type: application/grpc' -H 'te: trailers' -H "containerd-namespace: $namespace" \
	http://localhost/containerd.services.tasks.v1.Tasks/Update >/dev/null
grep -qi '^grpc-status: 0' "$root/headers" || fail "Update was refused: $(grep -i ^grpc- "$root/headers")"
equal 'the limit in the cgroup' "$(cgroup "$pid" web memory memory.limit_in_bytes memory.max)" "$limit"
if on_proxmox; then
	shown=$(api GET "/nodes/$node/lxc/$vmid/config" | jq -r .data.memory)
	equal 'the memory that Proxmox shows' "$shown" 96
	good 'the cgroup has 96 MiB, and Proxmox shows 96'
else
	good 'the cgroup has 96 MiB'
fi

heading 'A signal that the workload handles, and its exact exit status'
prompt 'ctr tasks kill --signal SIGTERM web'
ctr tasks kill --signal SIGTERM web
exit_of() { # ID: the status in its exit event
	sed -n 's/^.* \/tasks\/exit //p' "$root/events" |
		jq -r --arg id "$1" 'select(.container_id == $id and (.id // $id) == $id) | .exit_status // 0'
}
exited() { [[ -n $(exit_of "$1") ]]; }
within 5 'there is no exit event of web' exited web
equal 'the exit status' "$(exit_of web)" 42
equal 'the last line of the log' "$(tail -n 1 "$root/web.log")" 'caught TERM'
good 'exit status 42'

heading 'Stopped from the Proxmox side'
run -d --log-uri "file://$root/victim.log" "$image" victim sleep 1000
if on_proxmox; then
	vmid=$(api GET "/nodes/$node/lxc" |
		jq -r '.data[] | select(.status == "running" and (.name | contains("victim"))) | .vmid')
	[[ -n $vmid ]] || fail 'the CT of victim is not in the list'
	prompt "curl -X POST …/lxc/$vmid/status/stop"
	api POST "/nodes/$node/lxc/$vmid/status/stop" | jq -c . | indent
else
	note '(this runtime is not on Proxmox: a plain SIGKILL instead)'
	ctr tasks kill --signal SIGKILL victim
fi
within 10 'containerd does not see the end of victim' exited victim
within 5 'victim is not listed as stopped' task_is victim STOPPED
ctr tasks ls | indent
equal 'the exit status' "$(exit_of victim)" 137
good 'containerd saw exit status 137 at once'

heading 'Delete'
for id in web victim; do
	prompt "ctr tasks delete $id; ctr containers delete $id"
	ctr tasks delete "$id" >/dev/null 2>&1 || true
	equal "the task of $id" "$(task_field "$id" 3)" ''
	ctr containers delete "$id"
done
equal 'the list of containers' "$(ctr containers ls -q)" ''

heading 'The event stream of web, in order'
deleted() { grep -q '/tasks/delete {"container_id":"victim"' "$root/events"; }
within 5 'there is no delete event of victim' deleted
order=$(sed -n 's/^.* \/tasks\/\([a-z-]*\) \({"container_id":"web".*\)$/\1 \2/p' "$root/events")
cut -c 1-100 <<<"$order" | indent
equal 'the order' "$(cut -d ' ' -f 1 <<<"$order" | tr '\n' ' ')" \
	'create start exec-added exec-started exit exec-added exec-started exit paused resumed exit delete '

heading 'Nothing is left'
gone() { # WHAT COMMAND...: the command must print nothing
	local what=$1 left='' tries=100
	shift
	while left=$("$@" 2>/dev/null || true) && [[ -n $left ]]; do
		((tries-- > 0)) || fail "$what left: $left"
		sleep 0.05
	done
	good "no $what"
}
ct_cgroups() {
	find /sys/fs/cgroup -maxdepth 4 -type d \( -path '*/lxc/*' -o -path '*/lxc.monitor/*' \) |
		awk -F / -v a="${vmids%-*}" -v b="${vmids#*-}" '$NF >= a && $NF <= b'
}
gone 'shim processes' shims
gone 'mounts' mounts
gone 'cgroups of containers' cgroups
gone 'sockets of shims' sockets
gone 'bundles' find "$root/state/io.containerd.runtime.v2.task" -mindepth 2
if on_proxmox; then
	cts() { api GET "/nodes/$node/lxc" | jq -r '.data[].vmid'; }
	gone 'CTs in the Proxmox API' cts
	gone 'CT configuration files' find -L "$root/sim/pve/lxc" -name '*.conf'
	gone 'CT cgroups' ct_cgroups
	gone 'run directories' find "$root/run" -mindepth 2
fi

printf '\n%sAll of it worked, in %d seconds.%s\n' "$bold" "$((SECONDS - started))" "$plain"
