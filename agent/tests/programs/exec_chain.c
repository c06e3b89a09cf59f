// exec_chain MILLISECONDS [NEXT_PROGRAM]…
// True stack: _start … main → STAGE → burn. Then the process executes the next program. Built several times with
// -DSTAGE=name.
#include "burn.h"

FRAME int STAGE(int64_t ms) { burn(ms); return 1; }

int main(int argc, char **argv) {
    if (!STAGE(number(argc, argv, 1))) return 1;
    if (argc < 3) return 0;
    // The arguments of the next program: its name, the milliseconds, and the programs after it.
    char *program = argv[2];
    argv[2] = argv[1];
    argv[1] = program;
    execv(program, argv + 1);
    fail(program);
}
