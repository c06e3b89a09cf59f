// chain MILLISECONDS [EXIT_STATUS]
// True stack: _start … main → first → second → third → burn.
// Built dynamic, static, static-pie, stripped and without PIE.
#include "burn.h"

FRAME int third(int64_t ms) { burn(ms); return 3; }
FRAME int second(int64_t ms) { return third(ms) + 2; }
FRAME int first(int64_t ms) { return second(ms) + 1; }

int main(int argc, char **argv) {
    int sum = first(number(argc, argv, 1));
    return argc > 2 ? atoi(argv[2]) : sum != 6;
}
