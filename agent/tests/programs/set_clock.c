// set_clock STEP
// Sets the wall clock forth by STEP seconds, and back again, once a second until it is killed. Each time it loses
// another 20 ms, so that it never returns to what it was: what was true before the last step is then nearly true,
// which is worse than plainly wrong.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define LOST 20000000L

int main(int argc, char **argv) {
    long step = argc > 1 ? atol(argv[1]) : 0;
    for (;; step = -step) {
        struct timespec time;
        sleep(1);
        clock_gettime(CLOCK_REALTIME, &time);
        time.tv_sec += step;
        time.tv_nsec -= LOST;
        if (time.tv_nsec < 0) {
            time.tv_nsec += 1000000000L;
            time.tv_sec--;
        }
        if (clock_settime(CLOCK_REALTIME, &time)) {
            perror("clock_settime");
            return 1;
        }
    }
}
