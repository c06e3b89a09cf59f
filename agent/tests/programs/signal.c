// signal MILLISECONDS normal|alternate
// True stack: _start … main → interrupted (→ outer → inner) → on_alarm → burn. A timer interrupts a loop of small calls
// at any of their instructions, and the handler burns CPU time, on the normal stack or on an alternate one. Between the
// signals, and in the first WARM_UP milliseconds: … main → interrupted (→ outer → inner).
#include "burn.h"
#include <signal.h>
#include <sys/time.h>

// Until a recorder knows the process, which takes longer on a busy machine.
#define WARM_UP 300

static volatile sig_atomic_t signals;

FRAME void on_alarm(int signal) {
    (void)signal;
    burn(8);
    signals++;
}

FRAME int64_t inner(int64_t value) {
    int64_t words[4] = {value, value + 1, value * 3, value ^ 5};
    __asm__ volatile("" : : "r"(words) : "memory");
    return words[value & 3];
}
FRAME int64_t outer(int64_t value) { return inner(value) + inner(value + 1); }
FRAME void interrupted(int64_t ms) {
    int64_t end = thread_cpu() + ms * 1000000, sum = 0;
    while (thread_cpu() < end)
        for (int i = 0; i < 2000000; i++) sum += outer(sum);
}

int main(int argc, char **argv) {
    int64_t ms = number(argc, argv, 1);
    int alternate = argc > 2 && strcmp(argv[2], "alternate") == 0;
    if (alternate) {
        stack_t stack = {.ss_sp = malloc(64 * 1024), .ss_size = 64 * 1024};
        if (sigaltstack(&stack, NULL)) fail("sigaltstack");
    }
    struct sigaction action = {.sa_handler = on_alarm,
                               .sa_flags = SA_RESTART | (alternate ? SA_ONSTACK : 0)};
    sigaction(SIGALRM, &action, NULL);
    interrupted(WARM_UP);
    struct itimerval timer = {{0, 12000}, {0, 12000}};
    setitimer(ITIMER_REAL, &timer, NULL);
    interrupted(ms);
    struct itimerval none = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &none, NULL);
    return signals == 0;
}
