// hostile MODE [ARGUMENT…]
// Processes that a profiler of the whole machine meets and must not trust. Each prints `ready`, uses little CPU time,
// and ends by itself after two minutes.
// True stack of most: … main → for_ever → work → burn.
#include "burn.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#ifdef FAKE_SERVER
// Symbols that a PostgreSQL server exports.
void *MyBEEntry, *MyProcPort;
#endif

enum { PAGE = 4096, LIFE = 120 };

// Hides from the compiler that the loops never end: otherwise it would omit the code behind a call.
static volatile int always = 1;

static FRAME void work(int64_t ms) { burn(ms); }
static FRAME void for_ever(int64_t ms, int64_t pause_ms) {
    while (always) {
        work(ms);
        usleep((useconds_t)pause_ms * 1000);
    }
}
static void gently(void) { for_ever(4, 56); }
static void ready(void) {
    puts("ready");
    fflush(stdout);
}
static void *need(void *memory, const char *what) {
    if (memory == MAP_FAILED || !memory) fail(what);
    return memory;
}
static void *anonymous(size_t size, int protection) {
    return need(mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), "mmap");
}

// A mapping of a file, of which no page has been read yet.
static void *file_memory(const char *path) {
    int fd = open(path, O_RDONLY);
    struct stat status;
    if (fd < 0 || fstat(fd, &status)) fail(path);
    return need(mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0), "mmap");
}

// Makes `count` executable mappings, which the kernel cannot merge because all of them show the same page
// of the file.
static void mappings(int64_t count) {
    int fd = open("/proc/self/exe", O_RDONLY);
    char *memory = anonymous((size_t)count * PAGE, PROT_NONE);
    for (int64_t i = 0; i < count; i++)
        need(mmap(memory + i * PAGE, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd, 0), "mapping");
    ready();
    gently();
}

static void again_and_again(char **argv) {
    if (!argv[2]) ready();
    char *words[] = {argv[0], argv[1], "again", NULL};
    work(1);
    execv(argv[0], words);
    fail("execv");
}

static void forks(void) {
    ready();
    for (;;) {
        pid_t pid = fork();
        if (pid == 0) _exit(0);
        if (pid < 0) fail("fork");
        waitpid(pid, NULL, 0);
        usleep(200);
    }
}

// Starts `rate` new processes a second for `seconds`; every other one executes a program. Prints how many
// there were.
static void storm(int64_t rate, int64_t seconds, char *program) {
    char *words[] = {program, "0", NULL};
    int64_t start = clock_nanoseconds(CLOCK_MONOTONIC), began = 0;
    for (int64_t passed = 0; passed < seconds * 1000000000; passed = clock_nanoseconds(CLOCK_MONOTONIC) - start) {
        for (; began < passed / 1000000 * rate / 1000; began++) {
            pid_t pid = fork();
            if (pid < 0) fail("fork");
            if (pid == 0) {
                if (began % 2) execv(program, words);
                _exit(0);
            }
            while (waitpid(-1, NULL, WNOHANG) > 0) continue;
        }
        usleep(1000);
    }
    while (wait(NULL) > 0) continue;
    printf("began %ld\n", (long)began);
}

static void *renaming(void *number) {
    char name[16];
    for (unsigned i = 0; always; i++) {
        snprintf(name, sizeof name, "\033[%dm;%u\n\r", (int)(intptr_t)number, i);
        prctl(PR_SET_NAME, name);
        if (i % 64 == 0) work(1);
        usleep(500);
    }
    return NULL;
}
static void thread(void *(*run)(void *), void *argument, size_t stack) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    if (stack) pthread_attr_setstacksize(&attributes, stack);
    if (pthread_create(&thread, &attributes, run, argument)) fail("pthread_create");
}
static void rename_threads(void) {
    for (intptr_t i = 0; i < 8; i++) thread(renaming, (void *)i, 0);
    ready();
    pause();
}

static void *gentle_thread(void *unused) {
    gently();
    return unused;
}
static void leader_ends(void) {
    thread(gentle_thread, NULL, 0);
    ready();
    pthread_exit(NULL);
}

static FRAME int64_t deeper(int64_t levels) {
    if (levels == 0) {
        ready();
        gently();
    }
    return always ? deeper(levels - 1) + 1 : 0;
}
static void *deep_thread(void *levels) { return (void *)deeper((intptr_t)levels); }
static void deep(void) {
    thread(deep_thread, (void *)1000000, (size_t)1 << 30);
    pause();
}

// Code in anonymous memory. push rbp; mov rbp,rsp; mov ecx,2000000; loop: dec ecx; jnz loop; pop rbp; ret.
// The liar also does mov [rbp],rbp, so that the frame claims to be its own caller.
static void *code_in_memory(int lies) {
    static const unsigned char HONEST[] = {0x55, 0x48, 0x89, 0xe5, 0xb9, 0x80, 0x84, 0x1e, 0, 0xff, 0xc9, 0x75, 0xfc, 0x5d, 0xc3};
    static const unsigned char LIAR[] = {0x55, 0x48, 0x89, 0xe5, 0x48, 0x8b, 0x45, 0,    0x48, 0x89, 0x6d, 0, 0xb9, 0x80, 0x84,
                                         0x1e, 0,    0xff, 0xc9, 0x75, 0xfc, 0x48, 0x89, 0x45, 0,    0x5d, 0xc3};
    unsigned char *memory = anonymous(PAGE, PROT_READ | PROT_WRITE);
    if (lies) memcpy(memory, LIAR, sizeof LIAR);
    else memcpy(memory, HONEST, sizeof HONEST);
    if (mprotect(memory, PAGE, PROT_READ | PROT_EXEC)) fail("mprotect");
    return memory;
}
static void run_code(int lies) {
    void (*code)(void) = (void (*)(void))code_in_memory(lies);
    printf("code %lx\n", (long)code);
    ready();
    for (;;) {
        for (int i = 0; i < 4; i++) code();
        usleep(50000);
    }
}

// A perf map that grows while the agent reads it: to tens of megabytes, then truncated and written again.
static void *grow_map(void *unused) {
    char path[64], line[4096];
    snprintf(path, sizeof path, "/tmp/perf-%d.map", getpid());
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND, 0644);
    if (fd < 0) fail(path);
    for (uint64_t at = 0x10000; always; at += 16) {
        int used = 0;
        for (int i = 0; i < 80; i++) used += snprintf(line + used, sizeof line - (size_t)used, "%lx 10 grown_%d\n", (long)at + i * 16, i);
        if (at % (16 * 25000) == 0 && ftruncate(fd, 0)) fail("ftruncate");
        if (write(fd, line, (size_t)used) != used) fail("write");
        usleep(50);
    }
    return unused;
}

// The process context of OTEP 4719: signature, version, size, time and address.
struct context {
    char signature[8];
    uint32_t version, size;
    uint64_t time, payload;
};
static void *context_memory(void) {
    int fd = memfd_create("OTEL_CTX", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, 32 * PAGE)) fail("memfd_create");
    return need(mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "mmap");
}
static void context_hangs(const char *path) {
    file_memory(path);
    ready();
    gently();
}
static void context_lies(void) {
    struct context *context = context_memory();
    char *payload = (char *)context + PAGE;
    memset(payload, 0x0a, 16 * PAGE); // nested messages without end
    const struct context lies[] = {
        {"OTEL_CTX", 2, UINT32_MAX, 1, (uint64_t)payload}, {"OTEL_CTX", 2, 1 << 16, 1, (uint64_t)payload},
        {"OTEL_CTX", 2, 1 << 16, 1, 0xffffffff81000000},   {"OTEL_CTX", 2, 1 << 16, 1, 0},
        {"OTEL_CTX", 2, 1 << 16, 1, UINT64_MAX - 8},       {"OTEL_CTX", 2, 64, 1, (uint64_t)context},
    };
    ready();
    for (unsigned i = 0;; i++) {
        *context = lies[i % 6];
        context->time = i + 1; // never the same value twice
        if (i % 100000 == 0) work(4);
        if (i % 1000 == 0) usleep(1000);
    }
}

// A numeric field of /proc/self/stat. Field 3 is the first behind the name.
static uint64_t field_of_stat(int wanted) {
    char text[4096] = "";
    FILE *file = fopen("/proc/self/stat", "r");
    if (!file || !fgets(text, sizeof text, file)) fail("/proc/self/stat");
    fclose(file);
    char *field = strtok(strrchr(text, ')') + 1, " ");
    for (int at = 3; field && at < wanted; at++) field = strtok(NULL, " ");
    return field ? strtoull(field, NULL, 10) : 0;
}
// Makes this memory the environment that /proc/PID/environ shows. Needs no privileges.
static void move_environment(void *memory, size_t size) {
    struct prctl_mm_map map = {
        .start_code = field_of_stat(26), .end_code = field_of_stat(27), .start_stack = field_of_stat(28),
        .start_data = field_of_stat(45), .end_data = field_of_stat(46), .start_brk = field_of_stat(47),
        .arg_start = field_of_stat(48),  .arg_end = field_of_stat(49),  .brk = (uint64_t)sbrk(0),
        .env_start = (uint64_t)memory,   .env_end = (uint64_t)memory + size, .exe_fd = UINT32_MAX,
    };
    if (prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0)) fail("PR_SET_MM_MAP");
}
static void environment(const char *path) {
    size_t size = *path ? PAGE : (size_t)4 << 30;
    move_environment(*path ? file_memory(path) : anonymous(size, PROT_READ | PROT_WRITE), size);
    ready();
    gently();
}

// Runs a library whose file may be truncated while it is mapped; the handler continues without it.
static void library_goes(int signal) {
    (void)signal;
    gently();
}
static void library(const char *path) {
    void *handle = dlopen(path, RTLD_NOW);
    if (!handle) fail(dlerror());
    int (*run)(int64_t) = (int (*)(int64_t))dlsym(handle, "plugin_run");
    signal(SIGBUS, library_goes);
    signal(SIGSEGV, library_goes);
    signal(SIGILL, library_goes);
    ready();
    for (;;) {
        run(4);
        usleep(50000);
    }
}

// Starts `count` processes that look like postmasters of servers on that port.
static void servers(const char *directory, int64_t count, int64_t port) {
    for (int64_t i = 0; i < count; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%d", directory, (int)i);
        if (mkdir(path, 0755) || chdir(path)) fail(path);
        pid_t pid = fork();
        if (pid < 0) fail("fork");
        if (pid > 0) waitpid(pid, NULL, 0);
        if (pid == 0) {
            // Forked again to become an orphan: its parent must not be a process of the same program.
            if (fork()) _exit(0);
            FILE *lock = fopen("postmaster.pid", "w"), *version = fopen("PG_VERSION", "w");
            if (!lock || !version) fail("postmaster.pid");
            fprintf(lock, "%d\n%s\n1700000000\n%d\n/tmp\n127.0.0.1\n 1 1\nready   \n", getpid(), path, (int)port);
            fprintf(version, "15\n");
            fclose(lock);
            fclose(version);
            alarm(LIFE);
            for_ever(1, 1000);
        }
    }
    usleep(500000);
    ready();
    for_ever(1, 1000);
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "", *second = argc > 2 ? argv[2] : "";
    if (strcmp(mode, "again") || argc < 3) alarm(LIFE);
    if (!strcmp(mode, "gently")) ready(), gently();
    if (!strcmp(mode, "mappings")) mappings(number(argc, argv, 2));
    if (!strcmp(mode, "again")) again_and_again(argv);
    if (!strcmp(mode, "forks")) forks();
    if (!strcmp(mode, "storm") && argc > 4) {
        alarm(0);
        storm(number(argc, argv, 2), number(argc, argv, 3), argv[4]);
        return 0;
    }
    if (!strcmp(mode, "rename")) rename_threads();
    if (!strcmp(mode, "leader")) leader_ends();
    if (!strcmp(mode, "deep")) deep();
    if (!strcmp(mode, "code")) run_code(0);
    if (!strcmp(mode, "liar")) run_code(1);
    if (!strcmp(mode, "grow")) thread(grow_map, NULL, 0), run_code(0);
    if (!strcmp(mode, "context") && *second) context_hangs(second);
    if (!strcmp(mode, "context")) context_lies();
    if (!strcmp(mode, "environment")) environment(second);
    if (!strcmp(mode, "library")) library(second);
    if (!strcmp(mode, "servers")) servers(second, number(argc, argv, 3), number(argc, argv, 4));
    if (!strcmp(mode, "named")) prctl(PR_SET_NAME, second), ready(), gently();
    if (!strcmp(mode, "deleted")) unlink(argv[0]), ready(), gently();
    fprintf(stderr, "%s: no mode %s\n", argv[0], mode);
    return 2;
}
