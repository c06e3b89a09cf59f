// jit_register MILLISECONDS MODE
// A counting loop in an anonymous mapping that uses rbp as an ordinary register.
// MODE says what a walk along rbp finds:
//   register  rbp is zero
//   return    rbp points to a place on the stack where a return address would be zero
// True stack: _start … main → run → the code.
#include "machine_code.h"

// push rbp; xor ebp,ebp; mov ecx,5000000; loop: dec ecx; jnz loop; pop rbp; ret
static const unsigned char REGISTER[] = {0x55, 0x31, 0xed, 0xb9, 0x40, 0x4b, 0x4c, 0,
                                         0xff, 0xc9, 0x75, 0xfc, 0x5d, 0xc3};
// push rbp; sub rsp,32; mov qword [rsp+8],0; mov rbp,rsp; mov ecx,5000000; loop: dec ecx; jnz loop; add rsp,32;
// pop rbp; ret
static const unsigned char RETURN[] = {0x55, 0x48, 0x83, 0xec, 0x20, 0x48, 0xc7, 0x44, 0x24, 8,    0, 0,
                                       0,    0,    0x48, 0x89, 0xe5, 0xb9, 0x40, 0x4b, 0x4c, 0,    0xff, 0xc9,
                                       0x75, 0xfc, 0x48, 0x83, 0xc4, 0x20, 0x5d, 0xc3};

FRAME void run(void (*code)(void), int64_t ms) {
    int64_t end = thread_cpu() + ms * 1000000;
    while (thread_cpu() < end) code();
}

int main(int argc, char **argv) {
    int64_t ms = number(argc, argv, 1);
    int is_register = argc > 2 && strcmp(argv[2], "register") == 0;
    void *code = is_register ? machine_code(REGISTER, sizeof REGISTER) : machine_code(RETURN, sizeof RETURN);
    run((void (*)(void))code, ms);
    return 0;
}
