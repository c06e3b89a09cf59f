#!/usr/bin/env bash
# Runs every part of the tests, whatever fails before it, and says at the end which parts failed.
#
#   scripts/test.sh         format, clippy, docs and the tests of every package
#   scripts/test.sh lint    only format, clippy and docs
#
# Exits with 1 if any part failed. Cargo lists the failed test programs at the end of the part `tests`. All packages
# are tested by one call of cargo: tested one by one they would have other features, and be built again.
set -uo pipefail
cd "$(dirname "$0")/.."

only=${1:-}
case $only in
'' | lint) ;;
*)
    echo "test.sh: no such part: $only" >&2
    exit 2
    ;;
esac

# FLAMESTORM_TEST_CARGO: another program in cargo's place, to try this script.
cargo=${FLAMESTORM_TEST_CARGO:-scripts/cargo.sh}
failed=()

part() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name: $*"
    if "$@"; then
        echo "== $name: passed ($((SECONDS - started)) s)"
    else
        echo "== $name: FAILED ($((SECONDS - started)) s)"
        failed+=("$name")
    fi
}

part format "$cargo" fmt --all --check
part clippy "$cargo" clippy --release --workspace --all-targets -- -D warnings
part docs env RUSTDOCFLAGS="-D warnings" "$cargo" doc --release --workspace --no-deps
# Cargo itself is not quiet: it names what it builds and each test program, so that a long part is not silent.
[ "$only" = lint ] || part tests "$cargo" test --release --workspace --no-fail-fast -- --quiet

if [ ${#failed[@]} -gt 0 ]; then
    echo "== FAILED: ${failed[*]}"
    exit 1
fi
echo "== all parts passed"
