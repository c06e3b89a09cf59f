// threads MILLISECONDS COUNT
// True stack, COUNT times at once, each thread burning MILLISECONDS: (libc's thread start) → worker
// → burn. The main thread waits.
#include "burn.h"
#include <pthread.h>

FRAME void *worker(void *ms) {
    burn((int64_t)(intptr_t)ms);
    return NULL;
}

int main(int argc, char **argv) {
    int64_t ms = number(argc, argv, 1), count = number(argc, argv, 2);
    pthread_t *threads = calloc(count, sizeof *threads);
    for (int64_t i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, worker, (void *)(intptr_t)ms)) fail("pthread_create");
    for (int64_t i = 0; i < count; i++) pthread_join(threads[i], NULL);
    return 0;
}
