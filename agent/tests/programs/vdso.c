// vdso MILLISECONDS
// True stack for most of the time: _start … main → ask_time → clock_gettime → __vdso_clock_gettime.
#include "burn.h"

FRAME int64_t ask_time(void) {
    int64_t sum = 0;
    for (int i = 0; i < 2000; i++) sum ^= clock_nanoseconds(CLOCK_MONOTONIC);
    return sum;
}

int main(int argc, char **argv) {
    int64_t end = thread_cpu() + number(argc, argv, 1) * 1000000, sum = 0;
    while (thread_cpu() < end) sum += ask_time();
    return sum == 0;
}
