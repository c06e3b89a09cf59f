// realigned MILLISECONDS
// True stack: _start … main → variable (alloca: the CFA is relative to rbp) → realigned (aligned locals: the stack
// pointer is rounded down) → both (aligned locals and alloca: the CFA is read from memory) → burn.
#include "burn.h"
#include <alloca.h>

static FRAME void touch(void *memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

FRAME int both(int64_t ms, int64_t size) {
    float lanes[16] __attribute__((aligned(64))) = {(float)size};
    char *bytes = alloca(size);
    memset(bytes, 3, size);
    touch(lanes);
    touch(bytes);
    burn(ms);
    touch(lanes);
    return bytes[size - 1] + (int)((uintptr_t)lanes % 64);
}
FRAME int realigned(int64_t ms, int64_t size) {
    float lanes[16] __attribute__((aligned(64))) = {(float)size};
    touch(lanes);
    int result = both(ms, size + 5) + (int)((uintptr_t)lanes % 64);
    touch(lanes);
    return result;
}
FRAME int variable(int64_t ms, int64_t size) {
    char *bytes = alloca(size);
    touch(bytes);
    return realigned(ms, size + 3) + (bytes == NULL);
}

int main(int argc, char **argv) {
    int64_t end = thread_cpu() + number(argc, argv, 1) * 1000000;
    int wrong = 0;
    for (int64_t size = 64; thread_cpu() < end; size = size % 4096 + 16)
        wrong |= variable(5, size) != 3;
    return wrong;
}
