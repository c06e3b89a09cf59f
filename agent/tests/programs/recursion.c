// recursion MILLISECONDS DEPTH
// True stack: _start … main → recurse, DEPTH times → burn.
#include "burn.h"

FRAME int64_t recurse(int64_t ms, int64_t depth) {
    if (depth > 1) return recurse(ms, depth - 1) + depth;
    burn(ms);
    return 1;
}

int main(int argc, char **argv) {
    int64_t depth = number(argc, argv, 2);
    return recurse(number(argc, argv, 1), depth) != depth * (depth + 1) / 2;
}
