#!/bin/bash
# Looks for inputs that break a parser. Called by `make fuzz`.
#
# Environment: FUZZ_SECONDS, for each target (60); FUZZ_TARGETS (all).
#
# What is found is written to target/fuzz/found. Once it is mended, it belongs into
# fuzz/seeds/TARGET, where `cargo test` sees it ever after.
set -euo pipefail

cd "$(dirname "$0")/.."
# The stable toolchain will do: of the sanitizers, which need a nightly one, none is used.
version=0.13.1
tools=$PWD/target/tools
if [[ $("$tools/bin/cargo-fuzz" --version 2>/dev/null) != "cargo-fuzz $version" ]]; then
	cargo install --quiet --locked --root "$tools" --version "$version" cargo-fuzz
fi

for target in ${FUZZ_TARGETS:-ct_description ct_configuration upid}; do
	echo "== $target, for ${FUZZ_SECONDS:-60} s"
	corpus=(target/fuzz/corpus/"$target" fuzz/seeds/"$target")
	[[ $target != ct_configuration ]] || corpus+=(tests/pve-sim/fixtures/lxc-config)
	mkdir -p target/fuzz/found "${corpus[0]}"
	"$tools/bin/cargo-fuzz" run --sanitizer none --target-dir target/fuzz "$target" "${corpus[@]}" -- \
		-max_total_time="${FUZZ_SECONDS:-60}" -max_len=4096 -timeout=10 -print_final_stats=1 \
		-artifact_prefix="$PWD/target/fuzz/found/$target-"
done
