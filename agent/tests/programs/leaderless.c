// leaderless MILLISECONDS
// The first thread ends and another thread burns MILLISECONDS. Meanwhile /proc/PID/maps is empty and /proc/PID/exe cannot
// be read.
// True stack: (libc's thread start) → worker → burn.
#include "burn.h"
#include <pthread.h>

FRAME void *worker(void *ms) {
    burn((int64_t)(intptr_t)ms);
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)number(argc, argv, 1)))
        fail("pthread_create");
    pthread_exit(NULL);
}
