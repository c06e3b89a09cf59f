// A program of which two versions take turns in one file: each burns in the function that FUNCTION names.
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
