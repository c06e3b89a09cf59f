#!/usr/bin/env bash
# Measures the agent on PostgreSQL under unindexed search, and `perf` beside it in the same run.
#
#   make bench            or  sudo scripts/bench.sh
#   make bench PEERS=1    also installs profile-bee from crates.io (slow to build) and measures it
#
# The database is Debian's stripped PostgreSQL, in a private cluster under the user `postgres` (or
# `nobody`), on a Unix socket: no port, and nothing of the system's own. Load: two clients, a prepared
# ILIKE over an unindexed text column, two parallel workers each.
#
#   SECONDS_EACH=60   length of the recording for CPU and memory
#   RUNS=3            recordings for the medians, SECONDS_SHORT=10 each
#   SWITCHES=14       how often the agent is switched on while pgbench runs, SECONDS_PHASE=4 each, and as
#                     long off before, between and after: the throughput with it and without
#   ONLY=throughput   that alone; ONLY=attribution: which query, which caller, and what that costs, alone
#   ROWS=400000       rows searched
#   FREQUENCY=99      samples a second and CPU
#   PG_BIN=…          directory of initdb, postgres and pgbench
#   KEEP=DIRECTORY    keep the summaries and folded stacks there
#   AGENT=…           the agent to measure, target/release/flamestorm (built when it is not given)
#   OTHER=…           only compares AGENT with this agent: PAIRS=6 recordings by each in turn, under the search
#
# Needs root; postgresql-15 and linux-perf. Everything it starts ends with it, and what it wrote is
# removed; the last lines are the table.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
SECONDS_EACH=${SECONDS_EACH:-60}
SECONDS_SHORT=${SECONDS_SHORT:-10}
RUNS=${RUNS:-3}
SWITCHES=${SWITCHES:-14}
SECONDS_PHASE=${SECONDS_PHASE:-4}
ONLY=${ONLY:-}
ROWS=${ROWS:-400000}
FREQUENCY=${FREQUENCY:-99}
PEERS=${PEERS:-0}
OTHER=${OTHER:-}
PAIRS=${PAIRS:-6}
PROFILE_BEE=0.3.13
PG_BIN=${PG_BIN:-$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1)}

say() { echo "bench: $*" >&2; }
die() {
    say "$*"
    exit 1
}
[ "$(id -u)" = 0 ] || die "needs root: sudo $0"
[ -x "$PG_BIN/initdb" ] || die "no PostgreSQL: apt-get install --no-install-recommends postgresql-15"
[ -z "$OTHER" ] || [ -x "$OTHER" ] || die "no such program: $OTHER"
[ -n "$ONLY$OTHER" ] || command -v perf >/dev/null || die "no perf: apt-get install --no-install-recommends linux-perf"
if [ -z "${AGENT-}" ]; then
    say "building the agent"
    (cd "$here" && cargo build --quiet --release -p agent)
    AGENT=$here/target/release/flamestorm
fi
user=postgres
id "$user" >/dev/null 2>&1 || user=nobody

# --- everything in one directory, gone at the end ---------------------------------------------------
work=$(mktemp -d "${TMPDIR:-/tmp}/flamestorm-bench.XXXXXX")
chmod 755 "$work"
as_user() { setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups -- "$@"; }
cleanup() {
    trap - EXIT INT TERM
    for pid in $(jobs -pr); do { kill "$pid" && wait "$pid"; } 2>/dev/null || true; done
    [ ! -f "$work/data/postmaster.pid" ] || as_user "$PG_BIN/pg_ctl" -D "$work/data" -m immediate -w stop >/dev/null 2>&1
    if [ -n "${KEEP-}" ]; then mkdir -p "$KEEP" && cp -r "$work/out/." "$KEEP/"; fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# --- the database -----------------------------------------------------------------------------------
say "PostgreSQL: $("$PG_BIN/postgres" --version), $ROWS rows"
mkdir "$work/data" "$work/out"
chown "$user" "$work/data" "$work"
as_user "$PG_BIN/initdb" -D "$work/data" -U bench -A trust --no-sync --encoding=UTF8 --locale=C >"$work/initdb.log" 2>&1 ||
    die "initdb failed: $(tail -n 3 "$work/initdb.log")"
cat >>"$work/data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
shared_buffers = 512MB
max_worker_processes = 8
max_parallel_workers = 8
max_parallel_workers_per_gather = 2
autovacuum = off
fsync = off
jit = off
CONF
as_user "$PG_BIN/pg_ctl" -D "$work/data" -l "$work/data/log" -w start >/dev/null
export PGHOST=$work PGUSER=bench PGDATABASE=postgres
psql() { "$PG_BIN/psql" -qAtX -v ON_ERROR_STOP=1 "$@"; }
psql <<SQL
SELECT setseed(0.5) \gset
CREATE TABLE products AS
SELECT id, 'product ' || id AS name,
       (SELECT string_agg(word, ' ')
          FROM (SELECT (ARRAY['steel','walnut','compact','wireless','garden','ceramic','portable','Übergröße',
                              'classic','leather','silent','outdoor','kitchen','café','bamboo','digital'])
                       [1 + (hashint8(id * 31 + n) & 15)] AS word FROM generate_series(1, 24) n) words)
       || ' number ' || id AS description
  FROM generate_series(1, $ROWS) id;
VACUUM ANALYZE products;
SQL
cat >"$work/search.sql" <<'SQL'
\set n random(1, 100000)
SELECT id, name FROM products WHERE description ILIKE '%number ' || :n::text || '%' ORDER BY id LIMIT 20;
SQL
workers=$(psql -c "EXPLAIN SELECT id, name FROM products WHERE description ILIKE '%number 12345%' ORDER BY id LIMIT 20" | sed -n 's/.*Workers Planned: //p')
say "parallel workers a query: ${workers:-none}"
"$PG_BIN/pgbench" -i -q -s 10 >/dev/null 2>&1

# Starts the load for at most so long; stop_load ends it.
start_load() {
    "$PG_BIN/pgbench" -n -M prepared -c 2 -j 1 -T 3600 -f "$work/search.sql" >"$work/load.log" 2>&1 &
    load=$!
    sleep 2
    kill -0 "$load" 2>/dev/null || die "the load ended: $(tail -n 3 "$work/load.log")"
}
stop_load() {
    kill "$load" 2>/dev/null || true
    wait "$load" 2>/dev/null || true
}

# --- reading results ----------------------------------------------------------------------------------
# Median of the numbers on standard input.
median() {
    sort -g | awk '{ v[NR] = $1 } END { if (NR == 0) print "-"; else if (NR % 2) print v[(NR + 1) / 2]; else print (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}
# json FILE KEY: the first number of this name (the summary is one line of JSON).
json() { grep -o "\"$2\":[0-9.eE+-]*" "$1" | head -n 1 | cut -d: -f2; }
# Sum of the numbers in an object of the summary.
json_sum() { grep -o "\"$2\":{[^}]*}" "$1" | head -n 1 | grep -o ':[0-9]\+' | tr -d : | awk '{ s += $1 } END { print s + 0 }'; }
percent() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f", 100 * a / b; else print "-" }'; }
# Of postgres' samples that have a user stack (one that is ending has none left), the share with main or
# _start in it; of all their frames, the share without a name; from folded stacks: "rooted unnamed
# module_only samples".
folded_figures() {
    awk '{
        count = $NF; sub(/ [0-9]+$/, ""); n = split($0, f, ";")
        if (f[1] !~ /^postgres/) next
        root = 0
        if (f[2] ~ /_\[k\]$/) next
        samples += count
        for (i = 2; i <= n; i++) {
            if (f[i] ~ /^(main|_start)$/) root = 1
            frames += count
            if (f[i] == "" || f[i] ~ /unknown/ || f[i] ~ /^0x/ || f[i] ~ /^\[[a-z ]+\]\+0x/) unnamed += count
            else if (f[i] ~ /\+0x[0-9a-f]+(_\[k\])?$/) module += count
        }
        if (root) rooted += count
    } END { if (samples) printf "%.2f %.2f %.2f %d\n", 100 * rooted / samples, 100 * unnamed / frames, 100 * module / frames, samples; else print "- - - 0" }' "$1"
}
# The same from `perf script -F comm,ip,sym`: a line with the name, a line a frame, an empty line.
perf_figures() {
    awk '
        function sample_ends() {
            if (in_sample && user) { samples++; rooted += root; frames += seen; unnamed += unknown }
            in_sample = 0
        }
        /^[^ \t]/ { sample_ends(); in_sample = /^postgres/; root = user = seen = unknown = 0; next }
        /^$/ { sample_ends(); next }
        in_sample {
            seen++
            if ($1 !~ /^ffff/) user = 1
            if (/\[unknown\]/) unknown++; else if ($2 == "main" || $2 == "_start") root = 1
        }
        END { sample_ends(); if (samples) printf "%.2f %.2f 0 %d\n", 100 * rooted / samples, 100 * unnamed / frames, samples; else print "- - - 0" }'
}
field() { cut -d' ' -f"$1"; }
row() { printf '| %-44s | %-16s | %-10s | %-10s | %s |\n' "$@"; }

# --- two agents in turn -----------------------------------------------------------------------------------
# One line for each figure: the medians of both agents, and the mean of the pairs' ratios with its standard error.
compare() {
    local pair agent figure key name
    local -A agents=([other]=$OTHER [this]=$AGENT)
    start_load
    for pair in $(seq "$PAIRS"); do
        say "pair $pair of $PAIRS ($SECONDS_SHORT s each)"
        for name in other this; do
            agent=${agents[$name]}
            "$agent" record --frequency "$FREQUENCY" --duration "${SECONDS_SHORT}s" --summary json \
                --output "$work/out/$name.folded" >"$work/out/$name-$pair.json" 2>"$work/out/$name.log" ||
                die "$agent failed: $(tail -n 5 "$work/out/$name.log")"
        done
    done
    stop_load
    echo
    echo "$AGENT and $OTHER in turn, $PAIRS recordings of $SECONDS_SHORT s each at $FREQUENCY Hz, under the search"
    echo
    row figure this other "this/other" "± standard error"
    row ---- ---- ---- ---- ----
    # The names in the summary. "recording" and "startup" are seconds of CPU time.
    for figure in "kernel time a sample, ns:run_ns_per_sample" "a backend's state, ns:backend_ns" \
        "CPU time recording, s:recording" "CPU time starting, s:startup" "start to first unwindable sample, ms:startup_ms" \
        "memory peak, bytes:peak" "maps, bytes:map_bytes" "samples:samples"; do
        key=${figure##*:}
        for pair in $(seq "$PAIRS"); do
            echo "$(json "$work/out/this-$pair.json" "$key") $(json "$work/out/other-$pair.json" "$key")"
        done | awk 'NF == 2' >"$work/out/pairs"
        read -r ratio error < <(awk '$2 > 0 { r = $1 / $2; n++; sum += r; squares += r * r }
            END {
                if (n < 2) { print "- -"; exit }
                variance = (squares - sum * sum / n) / (n - 1)
                printf "%.3f %.3f\n", sum / n, sqrt((variance > 0 ? variance : 0) / n)
            }' "$work/out/pairs")
        row "${figure%:*}" "$(field 1 <"$work/out/pairs" | median)" "$(field 2 <"$work/out/pairs" | median)" "$ratio" "$error"
    done
}
if [ -n "$OTHER" ]; then
    compare
    exit
fi

# --- stacks and cost, medians of runs -------------------------------------------------------------------
record() { "$AGENT" record --view database --frames raw --frequency "$FREQUENCY" --duration "$1s" --summary json --output "$work/out/$2.folded" >"$work/out/$2.json" 2>"$work/out/$2.log" || die "the agent failed: $(tail -n 5 "$work/out/$2.log")"; }
perf_run() {
    local name=$1
    shift
    perf record -q -a -e cpu-clock -F "$FREQUENCY" "$@" -o "$work/out/$name.data" -- sleep "$SECONDS_SHORT" >/dev/null 2>&1
    perf script -i "$work/out/$name.data" --comms postgres --no-inline -F comm,ip,sym 2>/dev/null | perf_figures >>"$work/out/$name.figures"
    rm -f "$work/out/$name.data"
}
if [ -z "$ONLY" ]; then
    start_load
    for run in $(seq "$RUNS"); do
        say "stacks, run $run of $RUNS: flamestorm, perf -g, perf dwarf ($SECONDS_SHORT s each)"
        record "$SECONDS_SHORT" "short-$run"
        folded_figures "$work/out/short-$run.folded" >>"$work/out/ours.figures"
        perf_run perf-g -g
        perf_run perf-dwarf --call-graph dwarf,16384
    done
    if [ "$PEERS" = 1 ]; then
        bee=$here/target/peers/bin/probee
        if [ ! -x "$bee" ]; then
            say "installing profile-bee $PROFILE_BEE"
            (cd "$here" && cargo install --quiet --locked profile-bee --version "$PROFILE_BEE" --root target/peers)
        fi
        for mode in "" --dwarf; do
            name=bee$mode
            for run in $(seq "$RUNS"); do
                say "stacks, run $run of $RUNS: profile-bee $mode"
                "$bee" $mode --skip-idle --frequency "$FREQUENCY" --time $((SECONDS_SHORT * 1000)) --output "$work/out/$name.folded" >"$work/out/$name.log" 2>&1 ||
                    say "profile-bee failed: $(tail -n 1 "$work/out/$name.log")"
                if [ -f "$work/out/$name.folded" ]; then folded_figures "$work/out/$name.folded" >>"$work/out/$name.figures"; fi
            done
        done
    fi
    say "CPU and memory over $SECONDS_EACH s"
    record "$SECONDS_EACH" long
    stop_load
fi

# --- throughput: one run of pgbench, the agent on and off in it ---------------------------------------------
# Transactions a second of short indexed look-ups: what a profiler would disturb first. Two runs of pgbench
# differ by more than the agent costs, and so do two minutes of one; neighbouring seconds differ least. Three
# seconds pass after switching on before anything counts: the agent starts, and compiles the tables of what
# runs, which is told apart. After switching off it is one second.
readonly SECONDS_ON=3 SECONDS_OFF=1
# CPU time of these processes so far, user and system, in clock ticks.
cpu_of() { for pid in $1; do sed 's/.*) //' "/proc/$pid/stat"; done | awk '{ ticks += $12 + $13 } END { print ticks }'; }
throughput() { # ARGUMENTS of the recording
    rm -f "$work/out/phases" "$work"/out/transactions.*
    local from to cpu phase postmaster loaded
    # Before other programs, like the agent itself: their noise is not what is asked for.
    read -r postmaster <"$work/data/postmaster.pid"
    renice -n -10 -p "$postmaster" >/dev/null
    nice -n -10 "$PG_BIN/pgbench" -n -M prepared -S -c 2 -j 1 -T 3600 --log --log-prefix="$work/out/transactions" --sampling-rate=0.005 >"$work/load.log" 2>&1 &
    load=$!
    sleep 3
    loaded="$load $(psql -c "SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE application_name = 'pgbench'")"
    for phase in $(seq 0 $((2 * SWITCHES))); do
        if [ $((phase % 2)) = 1 ]; then
            "$AGENT" record "$@" --frequency "$FREQUENCY" --output "$work/out/switched.folded" >/dev/null 2>&1 &
            agent=$!
            sleep "$SECONDS_ON"
        else
            sleep "$SECONDS_OFF"
        fi
        from=$(date +%s.%N)
        cpu=$(cpu_of "$loaded")
        sleep "$SECONDS_PHASE"
        to=$(date +%s.%N)
        cpu=$(($(cpu_of "$loaded") - cpu))
        kill -0 "$load" 2>/dev/null || die "pgbench ended: $(tail -n 3 "$work/load.log")"
        echo "$phase $from $to $cpu" >>"$work/out/phases"
        if [ $((phase % 2)) = 1 ]; then
            kill -INT "$agent" || die "the agent ended"
            wait "$agent" || die "the agent failed"
        fi
    done
    stop_load
}
# From the phases (number, start, end, CPU time of PostgreSQL and pgbench) and pgbench's log of some
# transactions (client, its number, duration, script, and when: seconds, microseconds): two medians of ratios,
# each with its standard error, and how many ratios there are. A phase's throughput is that between the first
# and the last transaction in it, summed over the clients; the second figure is throughput for a second of
# their own CPU time, which hardly depends on what else wants the CPUs. (What a sample costs is in it: an
# interrupt's time counts as that of the task which it interrupts. The agent's own time is not.) A ratio is a
# phase with the agent to the mean of its two neighbours without. The standard error of a median is
# 1.2533 σ / √n, and σ is taken from the median deviation, 1.4826 times, so that a few disturbed phases do
# not make it useless.
throughput_figures() {
    awk '
        function sort(values, n,   i, j, t) {
            for (i = 2; i <= n; i++) for (j = i; j > 1 && values[j] < values[j - 1]; j--) { t = values[j]; values[j] = values[j - 1]; values[j - 1] = t }
        }
        function median(values, n) { sort(values, n); return n % 2 ? values[(n + 1) / 2] : (values[n / 2] + values[n / 2 + 1]) / 2 }
        function figures(rate,   p, n, i, middle, ratio, deviation) {
            for (p = 1; p < last; p += 2) if (rate[p - 1] && rate[p] && rate[p + 1]) ratio[++n] = rate[p] / ((rate[p - 1] + rate[p + 1]) / 2)
            if (n < 2) return "- -"
            middle = median(ratio, n)
            for (i = 1; i <= n; i++) deviation[i] = ratio[i] < middle ? middle - ratio[i] : ratio[i] - middle
            ratios = n
            return sprintf("%.4f %.4f", middle, 1.2533 * 1.4826 * median(deviation, n) / sqrt(n))
        }
        BEGIN { at = 0 }
        NR == FNR { from[$1] = $2; to[$1] = $3; cpu[$1] = $4; last = $1; next }
        NF >= 6 {
            time = $5 + $6 / 1e6
            while (at < last && time > to[at]) at++
            if (time < from[at] || time > to[at]) next
            if (!((at, $1) in first)) { first[at, $1] = $2; since[at, $1] = time; clients[$1] }
            latest[at, $1] = $2
            until[at, $1] = time
        }
        END {
            for (p = 0; p <= last; p++) {
                for (c in clients) if (until[p, c] > since[p, c]) tps[p] += (latest[p, c] - first[p, c]) / (until[p, c] - since[p, c])
                if (cpu[p]) by_cpu[p] = tps[p] * (to[p] - from[p]) / cpu[p]
            }
            print figures(tps), figures(by_cpu), ratios + 0
        }' "$work/out/phases" "$work"/out/transactions.*
}
if [ "$ONLY" != attribution ]; then
    say "throughput: $SWITCHES times on, $((SWITCHES * (2 * SECONDS_PHASE + SECONDS_ON + SECONDS_OFF) + SECONDS_PHASE + 4)) s in all"
    throughput --caller-stacks 0
    read -r ratio ratio_error by_cpu by_cpu_error ratios < <(throughput_figures)
fi
if [ "$ONLY" = throughput ]; then
    echo "pgbench throughput with/without: $ratio ± $ratio_error (standard error of the median of $ratios ratios)"
    echo "the same for a second of its own CPU time: $by_cpu ± $by_cpu_error"
    exit
fi

# --- attribution: which query, which caller, what that costs -------------------------------------------------
# Records while a command runs, from just before it begins or soon after it has begun. (Of a statement that was running
# before nobody saw who asked: statements of a second must not be.)
attributed() { # NAME before|after COMMAND…
    local name=$1 when=$2 load agent
    shift 2
    if [ "$when" = after ]; then
        "$@" >"$work/load.log" 2>&1 &
        load=$!
        sleep 1.5
    fi
    "$AGENT" record --frequency "$FREQUENCY" --duration "${SECONDS_SHORT}s" --summary json --frames raw \
        --output "$work/out/$name.folded" >"$work/out/$name.json" 2>"$work/out/$name.log" &
    agent=$!
    if [ "$when" = before ]; then
        until grep -qs recording "$work/out/$name.log"; do
            kill -0 "$agent" 2>/dev/null || die "the agent failed: $(tail -n 5 "$work/out/$name.log")"
            sleep 0.1
        done
        "$@" >"$work/load.log" 2>&1 &
        load=$!
    fi
    wait "$agent" || die "the agent failed: $(tail -n 5 "$work/out/$name.log")"
    wait "$load" || die "$1 failed: $(tail -n 3 "$work/load.log")"
}
bench_pgbench() { "$PG_BIN/pgbench" -n -S -c 4 -j 2 -T $((SECONDS_SHORT + 5)) "$@"; }
for mode in prepared simple extended; do
    say "attribution: pgbench -S -M $mode at 2,000 queries a second, at 997 Hz"
    FREQUENCY=997 attributed "attributed-$mode" after bench_pgbench -M "$mode" -R 2000
done
say "attribution: unindexed search with parallel workers"
attributed attributed-search before "$PG_BIN/pgbench" -n -M prepared -c 2 -j 1 -T "$SECONDS_SHORT" -f "$work/search.sql"
say "attribution: pgbench -S as fast as it goes"
attributed attributed-saturated after bench_pgbench -M prepared
shop=$here/target/release/workload
if [ -x "$shop" ]; then
    say "attribution: the shop in its storm (workload scene 9.5)"
    "$shop" scene 9.5 --open --yes --rounds 4 --json --agent "$AGENT" --output-dir "$work/scene" \
        >"$work/out/scene.json" 2>"$work/scene.log" || die "the scene failed: $(tail -n 3 "$work/scene.log")"
    "$AGENT" report "$work/scene/storm.pb.gz" --summary json >"$work/out/attributed-shop.json"
fi
# Two functions of one client take turns with a query each, a third of a millisecond and less long.
say "attribution: two queries that switch, at 997 Hz"
psql -c "CREATE ROLE test SUPERUSER LOGIN" >/dev/null
cc -O2 -fomit-frame-pointer -fno-optimize-sibling-calls "$here/agent/tests/programs/two_queries.c" -o "$work/two_queries"
two_queries() {
    "$work/two_queries" "$work/.s.PGSQL.5432" prepared 3000 1000 $((SECONDS_SHORT + 5)) one &
    "$work/two_queries" "$work/.s.PGSQL.5432" simple 3000 1000 $((SECONDS_SHORT + 5)) other
    wait $!
}
FREQUENCY=997 attributed switching after two_queries
switching() {
    awk '{
        count = $NF
        query = /AS heavy/ ? "heavy" : /AS light/ ? "light" : ""
        if (query == "") next
        caller = /;ask_heavy;/ ? "heavy" : /;ask_light;/ ? "light" : ""
        all += count
        if (caller != "" && caller != query) wrong += count
    } END { if (all) printf "%.3f %d\n", 100 * wrong / all, all; else print "- 0" }' "$work/out/switching.folded"
}
# Throughput at a rate that the machine can serve, with and without, and at saturation.
say "attribution: throughput at 5,000 queries a second"
tps() { "$PG_BIN/pgbench" -n -S -M prepared -c 4 -j 2 -T "$SECONDS_SHORT" -R 5000 2>/dev/null | sed -n 's/^tps = \([0-9.]*\).*/\1/p'; }
for run in $(seq "$RUNS"); do
    without=$(tps)
    "$AGENT" record --frequency "$FREQUENCY" --output "$work/out/paired.folded" >/dev/null 2>&1 &
    agent=$!
    sleep 2
    with=$(tps)
    kill -INT "$agent" && wait "$agent" || die "the agent failed"
    awk -v a="$with" -v b="$without" 'BEGIN { print a / b }' >>"$work/out/fixed"
done
say "attribution: throughput at saturation, $SWITCHES times on"
throughput
read -r full full_error full_by_cpu full_by_cpu_error full_ratios < <(throughput_figures)
attribution_table() {
    share() { awk -v a="$(json "$1" "$2")" -v b="$(json "$1" "$3")" -v c="$(json "$1" "${4:-nothing}")" 'BEGIN { if (b - c > 0) printf "%.2f", 100 * a / (b - c); else print "-" }'; }
    micro() { json "$work/out/$1.json" "$2" | awk '$1 != "" { printf "%.2f", $1 / 1000; found = 1 } END { if (!found) printf "-" }'; }
    echo
    row "attribution" "with query, %" "caller, %" "between, %" "to reach"
    row ---- ---- ---- ---- ----
    for name in prepared simple extended search shop saturated; do
        file=$work/out/attributed-$name.json
        [ -f "$file" ] || continue
        to_reach="≥ 99, ≥ 99"
        [ "$name" != saturated ] || to_reach="printed"
        row "$name" "$(share "$file" with_query backend_samples starting_workers)" "$(share "$file" with_caller with_query)" "$(share "$file" between_statements with_query)" "$to_reach"
    done
    echo
    row "cost of attribution" "" "" "" "to reach"
    row ---- ---- ---- ---- ----
    read -r wrong of < <(switching)
    row "wrong attributions, % of $of samples" "$wrong" "" "" "≤ 0.5"
    row "a send without a stack (saturated), µs" "$(micro attributed-saturated send_ns)" "" "" "≤ 1"
    row "a send with one, median: pgbench, shop, µs" "$(micro attributed-saturated caller_stack_ns), $(micro attributed-shop caller_stack_ns)" "" "" "≤ 12"
    row "a backend's state: search, shop, µs" "$(micro attributed-search backend_ns), $(micro attributed-shop backend_ns)" "" "" "≤ 4"
    row "throughput at 5,000/s, with/without" "$(median <"$work/out/fixed")" "" "" "≥ 0.97"
    row "throughput at saturation, $full_ratios ratios" "$full ± $full_error" "" "" "≥ 0.93"
    row "  for a second of its own CPU time" "$full_by_cpu ± $full_by_cpu_error" "" "" "printed apart"
    [ -f "$work/out/scene.json" ] || return 0
    told() { json "$work/out/scene.json" "$1" | awk '$1 != "" { printf "%.1f", $1; found = 1 } END { if (!found) printf "-" }'; }
    echo
    row "the storm (what this machine was calibrated to)" "" "" "" "to reach"
    row ---- ---- ---- ---- ----
    row "P95 of completed queries, ms" "$(told p95_ms)" "" "" "2240 to 3360"
    row "P99 of executed queries, ms" "$(told p99_ms)" "" "" "printed"
    row "failed, %" "$(told failed_percent)" "" "" "4 to 13"
    row "connection pools at the fullest, %" "$(told pool_utilization_percent)" "" "" "≥ 95"
    row "P95 before, ms" "$(told baseline_p95_ms)" "" "" "≤ 45"
    row "P95 with the index, ms" "$(told p95_after_fix_ms)" "" "" "printed"
}

# --- hostile files and processes: how much longer a recording takes -------------------------------------------
hostile=-
if [ -z "$ONLY" ]; then
    say "hostile files and processes"
    FLAMESTORM_REQUIRE_BPF=1 "$here/scripts/cargo.sh" test --quiet --release --workspace --test hostile -- \
        --ignored --exact --nocapture a_recording_takes_no_longer >"$work/out/hostile.log" 2>&1 ||
        say "hostile files and processes: $(tail -n 3 "$work/out/hostile.log")"
    hostile=$(sed -n 's/^seconds_more //p' "$work/out/hostile.log")
fi

# --- the table -----------------------------------------------------------------------------------------------
figure() { field "$2" <"$work/out/$1.figures" | median; }
all_short() { for run in $(seq "$RUNS"); do json "$work/out/short-$run.json" "$1"; done | median; }
long=$work/out/long.json
rounded() { awk -v format="$1" '$1 == "-" || $1 == "" { print "-"; next } { printf format "\n", $1 }'; }
if [ "$ONLY" = attribution ]; then
    attribution_table
    exit
fi
lost=0
for file in "$work"/out/short-*.json "$long"; do lost=$((lost + $(json_sum "$file" lost))); done
samples=$(json "$long" samples)
expected=$(json "$long" expected_samples)
idle=$(json "$long" idle_ticks)
absent=$(awk -v e="$expected" -v s="$samples" -v i="$idle" 'BEGIN { print e - s - i }')
seconds=$(json "$long" duration_seconds)
# "recording" is also the name of a figure of memory: the first is of CPU time.
cpu=$(json "$long" recording)
rss=$(grep -o '"max_rss_bytes":{[^}]*}' "$long" | grep -o '"recording":[0-9]*' | cut -d: -f2)
peak=$(json "$long" peak)
echo
echo "Linux $(uname -r), $(nproc) CPUs, $("$PG_BIN/postgres" --version), $ROWS rows, ${workers:-0} workers, $FREQUENCY Hz; medians of $RUNS runs of $SECONDS_SHORT s"
echo
row what flamestorm "perf -g" "perf dwarf" "to reach"
row ---- ---- ---- ---- ----
row "postgres samples rooted in main/_start, %" "$(figure ours 1)" "$(figure perf-g 1)" "$(figure perf-dwarf 1)" "≥ 99.9"
row "postgres frames without a name, %" "$(figure ours 2)" "$(figure perf-g 2)" "$(figure perf-dwarf 2)" 0
row "postgres frames named by module only, %" "$(figure ours 3)" - - "printed apart"
row "postgres samples a run" "$(figure ours 4)" "$(figure perf-g 4)" "$(figure perf-dwarf 4)" -
row "kernel time a sample, ns" "$(all_short run_ns_per_sample | rounded %.0f)" - - "≤ 10000"
row "agent CPU over $SECONDS_EACH s, % of one core" "$(percent "$cpu" "$seconds")" - - "≤ 0.5"
row "agent CPU: start-up, symbolising, s" "$(json "$long" startup | rounded %.2f), $(json "$long" symbolising | rounded %.2f)" - - "printed apart"
row "agent memory recording, MB" "$(awk -v b="$rss" 'BEGIN { printf "%.1f", b / 1e6 }')" - - "≤ 45"
row "agent memory peak; maps, MB" "$(awk -v b="$peak" -v m="$(json "$long" map_bytes)" 'BEGIN { printf "%.1f; %.1f", b / 1e6, m / 1e6 }')" - - "printed apart"
row "samples lost in the pipeline" "$lost" - - 0
row "expected − received (idle ticks apart), %" "$(percent "$absent" "$expected")" - - "≤ 1"
row "  missed ticks; stolen CPU, s" "$(json "$long" missed_ticks); $(json "$long" steal_seconds | rounded %.2f)" - - "printed apart"
row "start to first unwindable sample, ms" "$(all_short startup_ms | rounded %.0f)" - - "≤ 1000"
row "seconds more among hostile files, processes" "${hostile:--}" - - "≤ 5"
row "pgbench throughput with/without, $ratios ratios" "$ratio ± $ratio_error" - - "≥ 0.99"
row "  for a second of its own CPU time" "$by_cpu ± $by_cpu_error" - - "printed apart"
if [ "$PEERS" = 1 ]; then
    echo
    row "profile-bee $PROFILE_BEE" "frame pointers" "--dwarf" "" ""
    row ---- ---- ---- ---- ----
    for line in "1 rooted, %" "2 frames without a name, %" "4 postgres samples a run"; do
        for name in bee bee--dwarf; do [ -f "$work/out/$name.figures" ] || echo "- - - -" >"$work/out/$name.figures"; done
        row "${line#* }" "$(figure bee "${line%% *}")" "$(figure bee--dwarf "${line%% *}")" "" ""
    done
fi
attribution_table
