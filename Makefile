# flamestorm: what there is to do. `make` alone lists it.
#
# Programs are built as the user who owns this directory; only recordings and the tests that
# record run as root, by sudo where you are not root already.

PREFIX  ?= /usr/local
# Rounds of 43 queries in each storm of the demo.
ROUNDS  ?= 4
OUTPUT  ?= flamegraphs
# Seconds for each fuzzed reader.
FUZZ    ?= 300
# Minutes that each soak records.
SOAK    ?= 30
# More arguments for the demo, for example ARGS="--products 200000 --json".
ARGS    ?=

CARGO   := scripts/cargo.sh
AS_ROOT := scripts/as-root.sh
AGENT   := target/release/flamestorm
SHOP    := target/release/workload

.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-bench build demo shop test lint bench soak fuzz install uninstall clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 20

setup: ## Install what building needs (packages by root or sudo; says what it does)
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh build test

setup-bench:
	@scripts/setup.sh build bench

build: setup ## Build the agent and the workload (release)
	@$(CARGO) build --release --package agent --package workload
	@echo "built: $(AGENT) $(SHOP)"

demo: build ## The whole story on a PostgreSQL on fire, measured; pictures in flamegraphs/  [ROUNDS=4 OUTPUT= ARGS=]
	@$(AS_ROOT) $(SHOP) scene all --open --yes --agent $(AGENT) --rounds $(ROUNDS) --output-dir $(OUTPUT) $(ARGS)

shop: build ## Open the shop at http://127.0.0.1:8010, until Ctrl-C; `workload scene` tells the story on it  [OUTPUT= ARGS=]
	@$(SHOP) all --demo --flamegraphs $(OUTPUT) $(ARGS)

lint:
	@scripts/test.sh lint

# The tests are release builds: an unoptimised agent is too slow to be tested. (In the dev profile they take four
# times as long, and recordings lose samples because the agent cannot follow.) Not built by `build` before: the tests
# have features of their own, with which most libraries would be built a second time.
test: export FLAMESTORM_REQUIRE_BPF = 1
test: export FLAMESTORM_REQUIRE_BROWSER = 1
test: setup-test ## Format, clippy, docs, and all tests (kernel and end-to-end as well); says which parts failed
	@scripts/test.sh

bench: setup-bench build ## Measure the agent beside perf  [PEERS=1: beside others too, slow]
	@PEERS=$(PEERS) $(AS_ROOT) scripts/bench.sh

soak: export FLAMESTORM_REQUIRE_BPF = 1
soak: setup-test ## Record for long among processes that live for short  [SOAK=30 minutes each of two tests]
	FLAMESTORM_SOAK_MINUTES=$(SOAK) $(CARGO) test --release --workspace --test alone -- --nocapture soak::

fuzz: setup ## Feed damaged files to the readers for longer  [FUZZ=300 seconds each]
	FLAMESTORM_FUZZ_SECONDS=$(FUZZ) $(CARGO) test --release --package agent --test unwinding --test naming --test outputs -- hostile:: symbolize:: pprof:: query_texts::

install: build ## Install the agent  [PREFIX=/usr/local DESTDIR=]
	@$(AS_ROOT) install -D -m 0755 $(AGENT) $(DESTDIR)$(PREFIX)/bin/flamestorm
	@echo "installed: $(DESTDIR)$(PREFIX)/bin/flamestorm"

uninstall: ## Remove the agent  [PREFIX=/usr/local DESTDIR=]
	@$(AS_ROOT) rm -f $(DESTDIR)$(PREFIX)/bin/flamestorm

clean: ## Remove everything that was built or recorded here
	@$(CARGO) clean --quiet
	@rm -f flamegraphs/*.svg flamegraphs/*.folded flamegraphs/*.pb.gz flamegraphs/README.md
