// Puts machine code into an anonymous mapping, as a just-in-time compiler does.
#ifndef MACHINE_CODE_H
#define MACHINE_CODE_H

#include "burn.h"
#include <sys/mman.h>

static inline void *machine_code(const unsigned char *bytes, size_t size) {
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    memcpy(memory, bytes, size);
    if (mprotect(memory, 4096, PROT_READ | PROT_EXEC)) fail("mprotect");
    return memory;
}

#endif
