#!/usr/bin/env bash
# Builds an OpenTelemetry Collector that writes what it receives to files, into
# target/tools/bin/otelcol, where workload/tests/collector.rs looks for it. Needs Go 1.25 or newer
# and takes minutes the first time; run again, it does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VERSION=0.162.0
# The providers of configuration have a numbering of their own.
readonly PROVIDERS=1.68.0
readonly BINARY="$PWD/target/tools/bin/otelcol"

command -v go >/dev/null || {
    echo "collector.sh: there is no Go on PATH; see https://go.dev/doc/install" >&2
    exit 1
}
if [ -x "$BINARY" ] && "$BINARY" --version 2>/dev/null | grep -qF "$VERSION"; then
    echo "built: $BINARY"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/manifest.yaml" <<YAML
dist:
  name: otelcol
  version: $VERSION
  output_path: $work/source
receivers:
  - gomod: go.opentelemetry.io/collector/receiver/otlpreceiver v$VERSION
exporters:
  - gomod: github.com/open-telemetry/opentelemetry-collector-contrib/exporter/fileexporter v$VERSION
providers:
  - gomod: go.opentelemetry.io/collector/confmap/provider/fileprovider v$PROVIDERS
  - gomod: go.opentelemetry.io/collector/confmap/provider/envprovider v$PROVIDERS
  - gomod: go.opentelemetry.io/collector/confmap/provider/yamlprovider v$PROVIDERS
YAML
GOBIN="$work/bin" go install "go.opentelemetry.io/collector/cmd/builder@v$VERSION"
# It writes the module and then stumbles over a dependency of the exporter's own tests.
"$work/bin/builder" --config "$work/manifest.yaml" --skip-compilation >"$work/builder.log" 2>&1 || true
cd "$work/source"
go mod tidy -e -compat=1.25 2>>"$work/builder.log"
mkdir -p "$(dirname "$BINARY")"
CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$BINARY" . || {
    cat "$work/builder.log" >&2
    exit 1
}
echo "built: $BINARY"
