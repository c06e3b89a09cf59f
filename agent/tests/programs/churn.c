// churn COUNT MILLISECONDS WAIT
// Starts COUNT processes one after the other, each of which burns MILLISECONDS and ends: half of them are forked
// children, the others execute this program again. Then waits WAIT milliseconds.
// True stack: main → forked → burn, or main → executed → burn.
#include "burn.h"
#include <sys/wait.h>

FRAME int forked(int64_t ms) { burn(ms); return 0; }
FRAME int executed(int64_t ms) { burn(ms); return 0; }

int main(int argc, char **argv) {
    int64_t count = number(argc, argv, 1), ms = number(argc, argv, 2);
    if (count == 0) return executed(ms);
    for (int64_t i = 0; i < count; i++) {
        pid_t child = fork();
        if (child < 0) fail("fork");
        if (child == 0) {
            if (i % 2) _exit(forked(ms));
            execl("/proc/self/exe", argv[0], "0", argv[2], NULL);
            _exit(127);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (status) return 1;
    }
    usleep(number(argc, argv, 3) * 1000);
    return 0;
}
