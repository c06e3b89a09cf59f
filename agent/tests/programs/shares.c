// shares MILLISECONDS
// Two processes on one CPU for MILLISECONDS of wall time: `share_three` burns 75 % of it, `share_one`
// 25 %, each by its own CPU clock. Prints the truth: the CPU microseconds that each process really used.
// True stacks: _start … main → three → burn_share and _start … main → one → burn_share.
#include "burn.h"
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>

FRAME int64_t burn_share(int64_t ms, int percent) {
    int64_t start = clock_nanoseconds(CLOCK_MONOTONIC), wall = 0, cpu = 0;
    uint32_t random = (uint32_t)percent;
    for (; wall < ms * 1000000; wall = clock_nanoseconds(CLOCK_MONOTONIC) - start) {
        cpu = clock_nanoseconds(CLOCK_PROCESS_CPUTIME_ID);
        if (cpu * 100 < wall * percent) {
            some_arithmetic();
        } else {
            // Pauses of one length would stay in step with the sampling clock, so that the other process
            // would get all the ticks.
            random = random * 1664525u + 1013904223u;
            struct timespec pause = {0, 200000 + random % 800000};
            nanosleep(&pause, NULL);
        }
    }
    return cpu;
}
FRAME int64_t three(int64_t ms) { return burn_share(ms, 75) + 1; }
FRAME int64_t one(int64_t ms) { return burn_share(ms, 25) + 1; }

int main(int argc, char **argv) {
    int64_t ms = number(argc, argv, 1);
    cpu_set_t cpus;
    // The last CPU, because the first one has more of the machine's own work.
    int cpu = (int)sysconf(_SC_NPROCESSORS_ONLN) - 1;
    CPU_ZERO(&cpus);
    CPU_SET(cpu, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus)) fail("sched_setaffinity");
    for (int child = 0; child < 2; child++) {
        pid_t pid = fork();
        if (pid < 0) fail("fork");
        if (pid == 0) {
            const char *name = child ? "share_one" : "share_three";
            prctl(PR_SET_NAME, name);
            int64_t used = child ? one(ms) : three(ms);
            printf("%s_us %ld\n", name, (long)used / 1000);
            return 0;
        }
    }
    int status = 0, failed = 0;
    while (wait(&status) > 0) failed |= status;
    return failed != 0;
}
