#!/bin/bash
# Installs the Debian packages named as arguments if they are missing, and nothing else. Services
# of freshly installed packages are not started. The word `rust` stands for Debian's Rust
# toolchain, wanted only where there is no cargo.
set -euo pipefail

# What containerd-shim 0.12 needs (let chains).
minimum=1.88

installed() {
	[[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

at_least() { # VERSION MINIMUM
	[[ $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]
}

missing=() rust=no
for package; do
	if [[ $package == rust ]]; then
		command -v cargo >/dev/null || rust=yes
	else
		installed "$package" || missing+=("$package")
	fi
done

if ((${#missing[@]})) || [[ $rust == yes ]]; then
	if ((EUID != 0)); then
		echo "missing packages: ${missing[*]} ($rust Rust toolchain): run this as root" >&2
		exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get -qq update
	if [[ $rust == yes ]]; then
		# Debian 12 and 13 have a newer toolchain under another name, for their browsers.
		candidate=$(LC_ALL=C apt-cache policy cargo rustc | sed -n 's/^  Candidate: //p' | tail -n 1)
		if at_least "${candidate%%+*}" "$minimum"; then
			missing+=(cargo rustc)
		else
			missing+=(cargo-web rustc-web)
		fi
	fi
	echo "installing: ${missing[*]}"
	# A package must not start its daemon: the suites use private ones.
	policy=/usr/sbin/policy-rc.d
	if [[ ! -e $policy && ! -L $policy ]]; then
		trap 'rm -f -- "$policy"' EXIT
		trap 'exit 130' INT TERM HUP
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 0755 "$policy"
	fi
	apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
fi

for package; do
	[[ $package == rust ]] || continue
	version=$(rustc --version | cut -d ' ' -f 2)
	if ! at_least "$version" "$minimum"; then
		echo "rustc $version is too old, $minimum or later is needed: Debian 12 and 13 have it as rustc-web and cargo-web" >&2
		exit 1
	fi
done
