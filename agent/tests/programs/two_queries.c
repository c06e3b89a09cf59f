// two_queries WHERE MODE HEAVY LIGHT SECONDS [APPLICATION]
// One connection, two functions: `ask_heavy` and `ask_light` take turns, each with a query of its own (HEAVY
// and LIGHT rows are counted). APPLICATION is the connection's name, MODE by default. MODE: simple, extended, prepared, pipelined, transaction, cursor, nested,
// ping (between asking and the answer another function sends a Sync, as a pool does that tests its
// connection), error, fork (a child asks on the connection that
// its parent made), workers (a table is counted, by parallel workers too). Prints the truth: the CPU time of the backend for each, microseconds.
// True stacks: _start … main → alternate → ask_heavy → send_text → flush, and the same with ask_light.
#include "postgres.h"
#include <sys/wait.h>

static const char *mode;
static char heavy[512], light[512];
static int64_t cpu_heavy, cpu_light;

static int is(const char *name) { return strcmp(mode, name) == 0; }

static FRAME void send_text(struct connection *c, const char *name, const char *text) {
    if (is("extended") || is("pipelined")) {
        parse(c, "", text);
        bind_execute(c, "");
        if (is("extended")) sync_(c);
    } else if (is("prepared")) {
        bind_execute(c, name);
        sync_(c);
    } else {
        message(c, 'Q', text);
    }
    flush(c);
}
static FRAME void ping(struct connection *c) {
    usleep(300);
    sync_(c);
    flush(c);
}
static FRAME void ask_heavy(struct connection *c) { send_text(c, "heavy", heavy); __asm__ volatile(""); }
static FRAME void ask_light(struct connection *c) { send_text(c, "light", light); __asm__ volatile(""); }
static FRAME void finish(struct connection *c) {
    if (is("pipelined")) {
        sync_(c);
        flush(c);
    }
    if (is("ping")) ping(c);
    until_ready(c);
    if (is("ping")) until_ready(c);
}
static FRAME void statement(struct connection *c, const char *text) {
    message(c, 'Q', text);
    flush(c);
    until_ready(c);
}

static FRAME void alternate(struct connection *c, int64_t seconds) {
    int64_t end = clock_nanoseconds(CLOCK_MONOTONIC) + seconds * 1000000000;
    while (clock_nanoseconds(CLOCK_MONOTONIC) < end) {
        if (is("pipelined")) {
            // Both are in the server before either is answered.
            int64_t before = cpu_of(c->pid);
            ask_heavy(c);
            ask_light(c);
            finish(c);
            cpu_heavy += cpu_of(c->pid) - before;
            continue;
        }
        if (is("transaction")) statement(c, "BEGIN");
        int64_t start = cpu_of(c->pid);
        ask_heavy(c);
        finish(c);
        int64_t middle = cpu_of(c->pid);
        if (is("transaction")) usleep(2000);
        ask_light(c);
        finish(c);
        cpu_heavy += middle - start;
        cpu_light += cpu_of(c->pid) - middle;
        if (is("transaction")) statement(c, "COMMIT");
    }
}

int main(int argc, char **argv) {
    static struct connection c;
    int64_t seconds = number(argc, argv, 5);
    mode = argv[2];
    const char *form = "SELECT count(*) AS %s FROM generate_series(1, %lld) AS n WHERE n %% 7 = 3";
    if (is("nested")) form = "SELECT counted(%2$lld) AS %1$s";
    if (is("cursor"))
        form = "BEGIN; DECLARE c_%1$s CURSOR FOR SELECT n FROM generate_series(1, %2$lld) AS n WHERE n %% 7 = 3; "
               "MOVE ALL IN c_%1$s; COMMIT";
    if (is("workers")) form = "SELECT count(*) AS %s FROM large WHERE n %% %lld = 3";
    if (is("error")) form = "SELECT count(*) AS %s, 1 / (count(*) - count(*)) FROM generate_series(1, %lld)";
    snprintf(heavy, sizeof heavy, form, "heavy", number(argc, argv, 3));
    snprintf(light, sizeof light, form, "light", number(argc, argv, 4));
    connect_to(&c, argv[1], argc > 6 ? argv[6] : mode);
    if (is("prepared")) {
        parse(&c, "heavy", heavy);
        parse(&c, "light", light);
        sync_(&c);
        flush(&c);
        until_ready(&c);
    }
    if (is("fork")) {
        pid_t child = fork();
        if (child < 0) fail("fork");
        int status;
        if (child > 0) return waitpid(child, &status, 0) != child || status != 0;
        printf("child %d\n", getpid());
    }
    alternate(&c, seconds);
    if (c.errors && !is("error")) {
        fprintf(stderr, "the server reported %d errors\n", c.errors);
        return 1;
    }
    printf("heavy_us %ld\nlight_us %ld\n", (long)(cpu_heavy / 1000), (long)(cpu_light / 1000));
    return 0;
}
