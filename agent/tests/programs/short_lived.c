// short_lived COUNT PROGRAM [ARGS]…
// Starts PROGRAM and waits for it, COUNT times one after the other. Prints the truth: how many succeeded, and the CPU
// milliseconds that all of them used.
#include "burn.h"
#include <sys/resource.h>
#include <sys/wait.h>

int main(int argc, char **argv) {
    int64_t count = number(argc, argv, 1), succeeded = 0;
    for (int64_t i = 0; i < count; i++) {
        pid_t child = vfork();
        if (child < 0) fail("vfork");
        if (child == 0) {
            execv(argv[2], argv + 2);
            _exit(127);
        }
        int status = 0;
        waitpid(child, &status, 0);
        succeeded += WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    struct rusage usage;
    getrusage(RUSAGE_CHILDREN, &usage);
    printf("succeeded %ld\ncpu_ms %ld\n", (long)succeeded,
           (long)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000 +
               (long)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1000);
    return succeeded != count;
}
