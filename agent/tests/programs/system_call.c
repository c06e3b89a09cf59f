// system_call MILLISECONDS
// True stack for nearly all of the time: _start … main → drink → sip → read → frames of the kernel.
#include "burn.h"
#include <fcntl.h>

static char buffer[1 << 20];

FRAME ssize_t sip(int file) {
    ssize_t got = read(file, buffer, sizeof buffer);
    if (got <= 0) fail("read");
    return got;
}
FRAME ssize_t drink(int64_t ms, int file) {
    int64_t end = thread_cpu() + ms * 1000000;
    ssize_t sum = 0;
    while (thread_cpu() < end) sum += sip(file);
    return sum;
}

int main(int argc, char **argv) {
    int file = open("/dev/urandom", O_RDONLY);
    if (file < 0) fail("/dev/urandom");
    return drink(number(argc, argv, 1), file) == 0;
}
