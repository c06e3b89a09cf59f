#!/usr/bin/env bash
# cargo, as the right user and with the project's tools on PATH.
#
# Under sudo cargo is usually not on PATH, and what root builds in a user's directory the user
# cannot build again. So root builds as the user behind sudo, where the directory is that user's.
# Tests that a user builds run as root, because they record.
#
#   TOOL=rustup scripts/cargo.sh …    another of Rust's programs in the same way
set -euo pipefail
cd "$(dirname "$0")/.."

prefix=()
home=$HOME
builder=$(id -un)
if [ "$(id -u)" = 0 ] && [ "${SUDO_USER:-root}" != root ]; then
    home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    if [ "$(stat -c %U .)" = "$SUDO_USER" ]; then
        builder=$SUDO_USER
        prefix=(runuser -u "$builder" -- env HOME="$home")
    fi
fi

PATH="$PWD/target/tools/bin:$PATH:$home/.cargo/bin"
export PATH
command -v cargo >/dev/null || {
    echo "cargo.sh: there is no cargo on PATH or in $home/.cargo/bin; install Rust with rustup" >&2
    exit 1
}
if [ "$builder" != root ] && [ "${1:-}" = test ]; then
    triple=$(uname -m | tr '[:lower:]' '[:upper:]')_UNKNOWN_LINUX_GNU
    export "CARGO_TARGET_${triple}_RUNNER=$PWD/scripts/as-root.sh"
fi
exec "${prefix[@]}" "${TOOL:-cargo}" "$@"
