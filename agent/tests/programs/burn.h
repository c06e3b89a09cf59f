// Shared by all programs whose true stacks are known: functions that keep their own stack frame, and a leaf
// that burns an exact amount of CPU time.
//
// Time is CPU time of the thread. A busy machine then changes how long a program takes, but not how many
// samples it gets.
#ifndef BURN_H
#define BURN_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// Neither inlined nor cloned nor specialized: the function is a frame under its own name.
#define FRAME __attribute__((noipa))

static inline int64_t clock_nanoseconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t thread_cpu(void) { return clock_nanoseconds(CLOCK_THREAD_CPUTIME_ID); }

// About 0.1 ms of arithmetic, without a call.
static inline void some_arithmetic(void) {
    static volatile uint64_t sink;
    uint64_t value = sink;
    for (int i = 0; i < 100000; i++) {
        value = value * 6364136223846793005u + 1442695040888963407u;
        __asm__ volatile("" : "+r"(value));
    }
    sink = value;
}

// The leaf of the true stacks.
static FRAME __attribute__((unused)) void burn(int64_t milliseconds) {
    int64_t end = thread_cpu() + milliseconds * 1000000;
    while (thread_cpu() < end) some_arithmetic();
}

// The numeric argument `index`. If it is missing, prints a message and exits.
static inline int64_t number(int argc, char **argv, int index) {
    if (index >= argc) {
        fprintf(stderr, "%s: argument %d is missing\n", argv[0], index);
        exit(2);
    }
    return atoll(argv[index]);
}

static inline void fail(const char *what) {
    perror(what);
    exit(1);
}

#endif
