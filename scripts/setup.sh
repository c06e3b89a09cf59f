#!/usr/bin/env bash
# Installs what a Debian 12 machine lacks to build, test or measure flamestorm, and says what it
# does. Run again, it does nothing.
#
#   scripts/setup.sh [build|test|bench]...      (default: build)
#
# Packages are installed by root or through sudo; Rust's own things as the user who calls.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly LINKER_VERSION=0.10.2
readonly DRIVER=psycopg2-binary==2.9.10
# A directory of the project's own, so that nothing of the user's is replaced.
readonly TOOLS="$PWD/target/tools"

# What each group needs, and why.
readonly -A PACKAGES=(
    # A stable compiler with a precompiled `core` for BPF, beside rustup's; a linker and a C
    # compiler for the crates that have C in them.
    [build]="rustc-web libstd-rust-web-dev-bpf gcc libc6-dev"
    # A stripped PostgreSQL, a browser for the pages and what drives it, other kernels in an emulator; clients of
    # PostgreSQL in namespaces of their own, in Python, and (its libraries) through a pooler.
    [test]="postgresql-15 chromium chromium-driver qemu-system-x86 busybox-static binutils iproute2 util-linux python3-venv libc-ares2 libevent-2.1-7"
    # A reference profiler and a load generator.
    [bench]="linux-perf postgresql-15 procps"
)

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "installing packages needs root, and there is no sudo: run as root: $*"
    fi
}

missing_packages() {
    local package
    for package in "$@"; do
        # shellcheck disable=SC2016  # dpkg-query's own syntax
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            printf '%s ' "$package"
    done
}

# Debian's PostgreSQL starts a server when it is installed. The tests start their own.
no_system_cluster() {
    local configuration=/etc/postgresql-common/createcluster.conf
    if [ -e "$configuration" ] && grep -Eq '^ *create_main_cluster *= *false' "$configuration"; then
        return
    fi
    say "no system cluster: create_main_cluster = false in $configuration"
    as_root sh -c "mkdir -p /etc/postgresql-common &&
        echo 'create_main_cluster = false' >>$configuration"
}

install_packages() {
    local packages log
    packages=$(missing_packages "$@")
    [ -n "$packages" ] || return 0
    command -v apt-get >/dev/null ||
        die "this script knows Debian only; install the equivalents of: $packages"
    case " $packages" in *" postgresql-15 "*) no_system_cluster ;; esac
    say "installing packages: $packages"
    as_root apt-get update -qq
    log=$(mktemp)
    # shellcheck disable=SC2086  # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold $packages </dev/null >"$log" 2>&1 || {
        cat "$log" >&2
        rm "$log"
        die "apt-get could not install: $packages"
    }
    rm "$log"
}

# The linker for BPF opens the compiler's LLVM, so that it needs none of its own.
install_linker() {
    # Finds cargo also where sudo hides it, and says so where there is none.
    scripts/cargo.sh --version >/dev/null || exit 1
    if command -v bpf-linker >/dev/null; then
        return
    fi
    say "installing bpf-linker $LINKER_VERSION into $TOOLS (about 80 s on two cores)"
    scripts/cargo.sh install bpf-linker --version "$LINKER_VERSION" --locked --quiet --root "$TOOLS"
}

# A connection pooler, unpacked only: installed, Debian's would run as a service.
unpack_pooler() {
    local target=$TOOLS/pgbouncer unpacking
    [ ! -x "$target/usr/sbin/pgbouncer" ] || return 0
    say "unpacking pgbouncer into $target"
    mkdir -p "$TOOLS"
    unpacking=$(mktemp -d "$TOOLS/unpacking.XXXXXX")
    (
        cd "$unpacking"
        apt-get download -qq pgbouncer 2>/dev/null || {
            as_root apt-get update -qq
            apt-get download -qq pgbouncer
        }
        dpkg -x ./*.deb tree
        rm -rf "$target"
        mv tree "$target"
    ) || die "pgbouncer could not be fetched"
    rm -rf "$unpacking"
}

# Python's driver as its users have it: from PyPI, with a libpq of its own.
install_driver() {
    local target=$TOOLS/python
    [ ! -e "$target/ready" ] || return 0
    say "installing $DRIVER from PyPI into $target"
    rm -rf "$target"
    /usr/bin/python3 -m venv "$target"
    "$target/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "$DRIVER" ||
        die "$DRIVER could not be installed"
    touch "$target/ready"
}

# What `make lint` calls. A Rust of rustup's minimal profile has neither.
install_components() {
    local component command missing=()
    for component in rustfmt:fmt clippy:clippy; do
        command=${component#*:}
        scripts/cargo.sh "$command" --version >/dev/null 2>&1 || missing+=("${component%:*}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    TOOL=rustup scripts/cargo.sh --version >/dev/null 2>&1 ||
        die "Rust lacks ${missing[*]}, and there is no rustup to add them: install rustup, or the packages rustfmt and rust-clippy of the distribution whose cargo this is"
    say "adding to Rust: ${missing[*]}"
    TOOL=rustup scripts/cargo.sh component add "${missing[@]}"
}

main() {
    local group packages=()
    [ $# -gt 0 ] || set -- build
    for group in "$@"; do
        [ -n "${PACKAGES[$group]:-}" ] || die "there is no group $group; there are: ${!PACKAGES[*]}"
        read -ra words <<<"${PACKAGES[$group]}"
        packages+=("${words[@]}")
    done
    install_packages "${packages[@]}"
    # scripts/cargo.sh puts this directory on PATH, and so does this script to look for it.
    PATH="$TOOLS/bin:$PATH"
    case " $* " in *" build "*) install_linker ;; esac
    case " $* " in *" test "*)
        install_components
        unpack_pooler
        install_driver
        ;;
    esac
}

main "$@"
