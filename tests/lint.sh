#!/bin/bash
# All checks that need no container. Called by `make lint`.
set -euo pipefail

cd "$(dirname "$0")/.."

step() {
	echo "== $*"
	"$@"
}

step cargo fmt --all --check
step cargo fmt --manifest-path fuzz/Cargo.toml --check
step cargo clippy --locked --workspace --all-targets -- -D warnings
RUSTDOCFLAGS='-D warnings' step cargo doc --locked --workspace --no-deps --quiet

if ! cargo deny --version >/dev/null 2>&1; then
	echo "== cargo-deny is not installed: trying to build it (this takes minutes)"
	cargo install --quiet --locked cargo-deny || true
fi
if cargo deny --version >/dev/null 2>&1; then
	# Advisories need a database from the network; the rest does not.
	step cargo deny --offline --locked check bans licenses sources
else
	echo "!! SKIPPED: cargo-deny is not available, licences and banned packages are not checked" >&2
fi

tests/deps.sh shellcheck mandoc 2>/dev/null || true
if command -v shellcheck >/dev/null; then
	step shellcheck tests/*.sh .ci/run
else
	echo "!! SKIPPED: shellcheck is not available, scripts are not checked" >&2
fi
if command -v mandoc >/dev/null; then
	step mandoc -T lint -W warning packaging/man/*.[578]
else
	echo "!! SKIPPED: mandoc is not available, manual pages are not checked" >&2
fi
