// two_queries WHERE MODE HEAVY LIGHT UNTIL [APPLICATION]
// One connection, two functions: `ask_heavy` and `ask_light` take turns, each with its own query (which count HEAVY and
// LIGHT rows). UNTIL is a number of seconds, or "cpu:400": until the backend has used that many milliseconds of CPU time.
// APPLICATION is the application name, MODE by default. Prints the truth: the CPU time of the backend for each query,
// microseconds.
// True stacks: _start … main → alternate → ask_heavy → send_text → flush, and the same with ask_light.
// MODE says how statements are sent:
//   simple, extended, prepared
//   pipelined    both, before either is answered
//   transaction  both queries of a turn in one transaction, with a pause between them
//   cursor       declares a cursor and moves over all rows
//   nested       the query runs in a PL/pgSQL function of the server
//   ping         between the query and its answer another function sends a Sync, as a pool does to test a
//                connection
//   error        a query that fails
//   fork         a child process sends, on the connection that its parent opened
//   workers      counts rows of a table, with parallel workers
//   jit          the server compiles the expression
//   copy_in      another function sends rows, which the server drops
//   copy_out     the server sends rows
//   cancel       a query that does not end by itself is cancelled after HEAVY or LIGHT microseconds
//   reconnect    each query on a new connection
//   reuse        the same, with backends of the same pid, where the test's pid namespace permits choosing it (prints
//                how often that succeeded)
#include "postgres.h"
#include <poll.h>
#include <sys/wait.h>

static const char *mode, *where, *application;
static char heavy[512], light[512];
static int64_t heavy_rows, light_rows;
static int reused;
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
static FRAME void send_rows(struct connection *c, int64_t rows) {
    char batch[8192];
    while (rows > 0) {
        int size = 0;
        for (; rows > 0 && size < 8000; rows--) size += sprintf(batch + size, "%lld\n", (long long)rows);
        put(c, "d", 1);
        put32(c, size + 4);
        put(c, batch, (size_t)size);
        flush(c);
    }
    put(c, "c", 1);
    put32(c, 4);
    flush(c);
}
static FRAME void finish(struct connection *c, int64_t rows) {
    if (is("pipelined")) {
        sync_(c);
        flush(c);
    }
    if (is("copy_in")) {
        until_ready(c); // The server is ready for the rows.
        send_rows(c, rows);
    }
    if (is("cancel")) {
        // A cancel request that arrives before the statement has begun has no effect.
        struct pollfd answer = {.fd = c->fd, .events = POLLIN};
        do {
            usleep((useconds_t)rows);
            cancel(c, where);
        } while (poll(&answer, 1, 20) == 0);
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

static FRAME void again(struct connection *c) {
    if (!is("reconnect") && !is("reuse")) return;
    int before = c->pid;
    disconnect(c);
    if (is("reuse")) {
        // The postmaster forks the next backend, with the next pid.
        FILE *last = fopen("/proc/sys/kernel/ns_last_pid", "w");
        if (!last || fprintf(last, "%d", before - 1) < 0 || fclose(last)) fail("ns_last_pid");
    }
    connect_to(c, where, application);
    reused += c->pid == before;
}

static int64_t end, enough;
static void set_end(const char *until) {
    if (sscanf(until, "cpu:%ld", &enough) == 1)
        enough *= 1000000;
    else
        end = clock_nanoseconds(CLOCK_MONOTONIC) + atoll(until) * 1000000000;
}
static int is_over(void) {
    return enough ? cpu_heavy + cpu_light >= enough : clock_nanoseconds(CLOCK_MONOTONIC) >= end;
}

static FRAME void alternate(struct connection *c) {
    while (!is_over()) {
        if (is("pipelined")) {
            // The server has both before it answers either.
            int64_t before = cpu_of(c->pid);
            ask_heavy(c);
            ask_light(c);
            finish(c, 0);
            cpu_heavy += cpu_of(c->pid) - before;
            continue;
        }
        if (is("transaction")) statement(c, "BEGIN");
        int64_t start = cpu_of(c->pid);
        ask_heavy(c);
        finish(c, heavy_rows);
        int64_t middle = cpu_of(c->pid);
        int64_t before_light = middle;
        if (is("transaction")) usleep(2000);
        again(c);
        if (is("reconnect") || is("reuse")) before_light = cpu_of(c->pid);
        ask_light(c);
        finish(c, light_rows);
        cpu_heavy += middle - start;
        cpu_light += cpu_of(c->pid) - before_light;
        again(c);
        if (is("transaction")) statement(c, "COMMIT");
    }
}

int main(int argc, char **argv) {
    static struct connection c;
    if (argc < 6) fail("arguments");
    // Statements that are sent before the recording knows this process may be without a caller, which is
    // not what the test is about.
    usleep(300000);
    where = argv[1];
    mode = argv[2];
    application = argc > 6 ? argv[6] : mode;
    heavy_rows = number(argc, argv, 3);
    light_rows = number(argc, argv, 4);
    const char *form = "SELECT count(*) AS %s FROM generate_series(1, %lld) AS n WHERE n %% 7 = 3";
    if (is("nested")) form = "SELECT counted(%2$lld) AS %1$s";
    if (is("cursor"))
        form = "BEGIN; DECLARE c_%1$s CURSOR FOR SELECT n FROM generate_series(1, %2$lld) AS n WHERE n %% 7 = 3; "
               "MOVE ALL IN c_%1$s; COMMIT";
    if (is("workers")) form = "SELECT count(*) AS %s FROM large WHERE n %% %lld = 3";
    if (is("error")) form = "SELECT count(*) AS %s, 1 / (count(*) - count(*)) FROM generate_series(1, %lld)";
    if (is("copy_in")) form = "COPY c_%s FROM STDIN WHERE n < 0";
    if (is("copy_out")) form = "COPY (SELECT n AS %s FROM generate_series(1, %lld) AS n) TO STDOUT";
    if (is("cancel")) form = "SELECT count(*) AS %s FROM generate_series(1, 1000000000) AS n WHERE n %% 7 = 3";
    snprintf(heavy, sizeof heavy, form, "heavy", (long long)heavy_rows);
    snprintf(light, sizeof light, form, "light", (long long)light_rows);
    connect_to(&c, where, application);
    if (is("jit")) statement(&c, "SET jit = on; SET jit_above_cost = 0");
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
    set_end(argv[5]);
    alternate(&c);
    if (c.errors && !is("error") && !is("cancel")) {
        fprintf(stderr, "the server reported %d errors\n", c.errors);
        return 1;
    }
    printf("heavy_us %ld\nlight_us %ld\n", (long)(cpu_heavy / 1000), (long)(cpu_light / 1000));
    printf("reused %d\n", reused);
    return 0;
}
