// jit MILLISECONDS
// Code with frame pointers in an anonymous mapping, named by /tmp/perf-PID.map. The map is removed at the end only if the
// second argument is `clean`, because a profiler may read it later.
// True stack: _start … main → run_jit → jit_outer → jit_inner → callback → burn.
#include "burn.h"
#include <sys/mman.h>

FRAME void callback(int64_t ms) { burn(ms); }

// outer(function, argument): push rbp; mov rbp,rsp; call inner; pop rbp; ret
// inner:  push rbp; mov rbp,rsp; push rax; push rax; xchg rdi,rsi; call rsi; mov ecx,50000;
//         loop: dec ecx; jnz loop; leave; ret
static const unsigned char OUTER[] = {0x55, 0x48, 0x89, 0xe5, 0xe8, 0x17, 0, 0, 0, 0x5d, 0xc3};
static const unsigned char INNER[] = {0x55, 0x48, 0x89, 0xe5, 0x50, 0x50, 0x48, 0x87, 0xf7, 0xff, 0xd6,
                                      0xb9, 0x50, 0xc3, 0,    0,    0xff, 0xc9, 0x75, 0xfc, 0xc9, 0xc3};
enum { INNER_AT = 32 }; // 9 + 0x17

typedef void (*code)(void (*)(int64_t), int64_t);

FRAME int run_jit(code outer, int64_t ms) {
    int64_t end = thread_cpu() + ms * 1000000;
    int rounds = 0;
    for (; thread_cpu() < end; rounds++) outer(callback, 2);
    return rounds;
}

int main(int argc, char **argv) {
    int64_t ms = number(argc, argv, 1);
    unsigned char *memory =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    memcpy(memory, OUTER, sizeof OUTER);
    memcpy(memory + INNER_AT, INNER, sizeof INNER);
    if (mprotect(memory, 4096, PROT_READ | PROT_EXEC)) fail("mprotect");
    char name[64];
    snprintf(name, sizeof name, "/tmp/perf-%d.map", getpid());
    FILE *map = fopen(name, "w");
    if (!map) fail(name);
    fprintf(map, "%lx %zx jit_outer\n%lx %zx jit_inner\n", (long)memory, sizeof OUTER,
            (long)memory + INNER_AT, sizeof INNER);
    fclose(map);
    int rounds = run_jit((code)memory, ms);
    if (argc > 2 && strcmp(argv[2], "clean") == 0) unlink(name);
    printf("map %s\n", name);
    return rounds == 0;
}
