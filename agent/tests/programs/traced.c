// traced WHERE SECONDS [APPLICATION]
// A service that publishes its name (OTEP 4719, `service.name` = "ground-truth") and, in each thread, the trace that the
// thread works for (OTEP 4947). Two threads, each with its own connection and trace (bytes 0x11 and 0x22). Their
// application names are eleven and twentytwo, or APPLICATION. Each repeatedly burns a millisecond itself and then runs
// a statement on the server.
// True stacks: … worker → burn and … worker → ask → flush.
#include "postgres.h"
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>

struct __attribute__((packed)) record {
    uint8_t trace[16], span[8], valid, flags;
    uint16_t attributes;
};
__attribute__((visibility("default"))) __thread struct record *otel_thread_ctx_v1;

static const char *where, *application;
static int64_t seconds;

static void publish_service(void) {
    // Resource { attributes: [ KeyValue { key: "service.name", value: { string_value: "ground-truth" } } ] }
    static const char payload[] = "\x0a\x1e\x0a\x0cservice.name\x12\x0e\x0a\x0cground-truth";
    int fd = (int)syscall(SYS_memfd_create, "OTEL_CTX", 0);
    if (fd < 0 || ftruncate(fd, 4096)) fail("memfd_create");
    char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) fail("mmap");
    uint32_t version = 2, size = sizeof payload - 1;
    uint64_t time = 1, address = (uint64_t)payload;
    memcpy(map + 8, &version, 4);
    memcpy(map + 12, &size, 4);
    memcpy(map + 16, &time, 8);
    memcpy(map + 24, &address, 8);
    memcpy(map, "OTEL_CTX", 8);
}

static FRAME void ask(struct connection *c) {
    message(c, 'Q', "SELECT count(*) FROM generate_series(1, 10000) n WHERE n % 7 = 3");
    flush(c);
    until_ready(c);
}

static FRAME void *worker(void *argument) {
    static __thread struct connection c;
    struct record record = {.valid = 1, .flags = 1};
    memset(record.trace, (int)(intptr_t)argument, sizeof record.trace);
    memset(record.span, (int)(intptr_t)argument + 1, sizeof record.span);
    const char *name = (intptr_t)argument == 0x11 ? "eleven" : "twentytwo";
    connect_to(&c, where, application ? application : name);
    otel_thread_ctx_v1 = &record;
    int64_t end = clock_nanoseconds(CLOCK_MONOTONIC) + seconds * 1000000000;
    while (clock_nanoseconds(CLOCK_MONOTONIC) < end) {
        burn(1);
        ask(&c);
    }
    otel_thread_ctx_v1 = NULL;
    return NULL;
}

int main(int argc, char **argv) {
    seconds = number(argc, argv, 2);
    where = argv[1];
    if (argc > 3) application = argv[3];
    publish_service();
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, worker, (void *)(intptr_t)(0x11 * (i + 1)))) fail("pthread_create");
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    return 0;
}
