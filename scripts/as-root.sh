#!/usr/bin/env bash
# Runs a command as root: at once where we are, else by sudo, with the variables that matter.
set -euo pipefail

[ "$(id -u)" != 0 ] || exec "$@"
command -v sudo >/dev/null || {
    echo "as-root.sh: recording needs root, and there is no sudo; run as root: $*" >&2
    exit 1
}
keep=()
for name in DATABASE_URL PEERS RUST_LOG RUST_BACKTRACE CARGO_MANIFEST_DIR \
    $(compgen -e FLAMESTORM_ || true) $(compgen -e OTEL_ || true); do
    [ -z "${!name+set}" ] || keep+=("$name=${!name}")
done
exec sudo -- env "${keep[@]}" "PATH=$PATH" "$@"
