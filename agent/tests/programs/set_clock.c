// set_clock STEP
// Sets the wall clock forward by STEP seconds and back again, once a second until it is killed. Each step loses another
// 20 ms, so the clock never returns to exactly its old offset: times from before the last two steps are then nearly
// right, which is harder to detect than plainly wrong.
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
