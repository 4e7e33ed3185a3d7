#!/bin/bash
# Prints the address of the mirror that this machine's apt uses for Debian itself.
set -euo pipefail

{
	sed -n 's/^URIs:[[:space:]]*//p' /etc/apt/sources.list.d/*.sources 2>/dev/null || true
	sed -n 's/^deb[[:space:]]\+\(\[[^]]*\][[:space:]]\+\)\?\([^[:space:]]\+\).*/\2/p' \
		/etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true
} | tr ' ' '\n' | grep -m 1 -E '/debian/?$' || {
	echo "no Debian mirror found in this machine's apt sources" >&2
	exit 1
}
