# containerd-shim-proxmox-v2: build, try, test. `make help` lists the targets.
#
# Works on Debian 12 and 13. What is missing is installed from Debian's packages; no service is
# started or stopped, nothing outside the source tree and temporary directories is changed
# (except by `make install`).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/sbin:/sbin

CARGO ?= cargo
PREFIX ?= /usr
DESTDIR ?=
OUT := target/release

BUILD_PACKAGES := rust gcc libc6-dev libseccomp-dev pkg-config binutils
RUN_PACKAGES := containerd runc lxc busybox-static e2fsprogs iproute2 curl jq
# The tests speak gRPC; the simulator unpacks templates, a real client in Python drives it; pods get their network by CNI.
TEST_PACKAGES := protobuf-compiler zstd xz-utils python3-venv containernetworking-plugins iptables erofs-utils
FUZZ_PACKAGES := g++
VM_PACKAGES := qemu-system-x86 mmdebstrap e2fsprogs
LINT_PACKAGES := shellcheck mandoc

.PHONY: help build demo test test-vm bench fuzz lint install clean deps-build deps-run deps-test deps-fuzz deps-vm \
	deps-lint root

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

build: deps-build ## Build the shim, init (static) and the Proxmox VE simulator
	$(CARGO) build --release --locked -p containerd-shim-proxmox-v2 -p pve-sim
	@# crt-static must not reach build scripts and proc macros: hence the explicit target.
	target=$$(rustc -vV | sed -n 's/^host: //p')
	RUSTFLAGS='-C target-feature=+crt-static' \
		$(CARGO) build --release --locked -p proxmox-shim-init --target "$$target"
	install -m 0755 "target/$$target/release/proxmox-shim-init" $(OUT)/proxmox-shim-init
	@if readelf --program-headers $(OUT)/proxmox-shim-init | grep -q INTERP; then
		echo 'proxmox-shim-init is not static: it could not run inside a container' >&2
		exit 1
	fi

demo: root deps-run build ## See containers run as Proxmox CTs, from hello world to a clean end
	@tests/demo.sh

test: root deps-run deps-test build ## Unit tests, then the end-to-end suites on three containerd releases
	@tests/run.sh

test-vm: root deps-vm build ## The suites on Debian 13's kernel, in QEMU; E2E='words' or E2E=--quick for some
	@tests/vm.sh $(E2E)

bench: root deps-run deps-test build ## Measure the shim beside containerd-shim-runc-v2, and the API client
	@E2E_BIN=$(CURDIR)/$(OUT) $(CARGO) bench --locked --bench shims
	@$(CARGO) bench --locked --bench client

fuzz: deps-build deps-fuzz ## Look for inputs that break a parser, FUZZ_SECONDS (60) for each of three
	@tests/fuzz.sh

lint: deps-build deps-test ## Formatting, lints, documentation, licences, scripts, manual pages
	@tests/lint.sh

install: ## Install to $(DESTDIR)$(PREFIX); run `make build` before
	install -D -m 0755 $(OUT)/containerd-shim-proxmox-v2 \
		$(DESTDIR)$(PREFIX)/bin/containerd-shim-proxmox-v2
	install -D -m 0755 $(OUT)/proxmox-shim-init \
		$(DESTDIR)$(PREFIX)/libexec/containerd-shim-proxmox/proxmox-shim-init
	@# A configuration that an administrator has changed is never overwritten.
	if [[ -e $(DESTDIR)/etc/containerd-shim-proxmox/config.toml ]]; then
		install -m 0644 shim-config/config.toml \
			$(DESTDIR)/etc/containerd-shim-proxmox/config.toml.new
	else
		install -D -m 0644 shim-config/config.toml \
			$(DESTDIR)/etc/containerd-shim-proxmox/config.toml
	fi
	for page in packaging/man/*.[578]; do
		install -D -m 0644 "$$page" "$(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}"
	done
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/containerd-shim-proxmox \
		LICENSE README.md
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/doc/containerd-shim-proxmox/examples \
		$(filter-out shim-config/config.toml,$(wildcard shim-config/*))

clean: ## Remove everything that was built
	$(CARGO) clean

deps-build:
	@tests/deps.sh $(BUILD_PACKAGES)

deps-run:
	@tests/deps.sh $(RUN_PACKAGES)

deps-test:
	@tests/deps.sh $(TEST_PACKAGES)

deps-fuzz:
	@tests/deps.sh $(FUZZ_PACKAGES)

deps-vm:
	@tests/deps.sh $(VM_PACKAGES)

deps-lint:
	@tests/deps.sh $(LINT_PACKAGES)

root:
	@if [[ $$(id -u) != 0 ]]; then
		echo 'containers need root: run this with sudo' >&2
		exit 1
	fi

# Recipes are scripts, not lines.
.ONESHELL:
