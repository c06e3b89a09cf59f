// set_clock STEP
// Sets the wall clock forth by STEP seconds, and back again, once a second until it is killed.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    long step = argc > 1 ? atol(argv[1]) : 0;
    for (;; step = -step) {
        struct timespec time;
        sleep(1);
        clock_gettime(CLOCK_REALTIME, &time);
        time.tv_sec += step;
        if (clock_settime(CLOCK_REALTIME, &time)) {
            perror("clock_settime");
            return 1;
        }
    }
}
