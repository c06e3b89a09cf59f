// A program in two versions, which are written to the same file one after the other: each burns CPU time in a function
// whose name is given by -DFUNCTION.
#include "burn.h"

FRAME void FUNCTION(int64_t milliseconds) {
    burn(milliseconds);
    __asm__ volatile("");
}

int main(int argc, char **argv) {
    FUNCTION(argc > 1 ? atoll(argv[1]) : 0);
    __asm__ volatile("");
    return 0;
}
