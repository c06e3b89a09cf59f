// plt MILLISECONDS calls|binding
// calls:   _start … main → call_all → entry_NN, or the PLT entry before it.
// binding: _start … main → call_all → PLT entry → _dl_runtime_resolve_… → _dl_fixup …: the GOT is reset to its state
//          before the first call again and again, so that every call is bound anew.
//          Needs -Wl,-z,lazy -Wl,-z,norelro.
#include "burn.h"

#define ENTRY(name) long entry_##name(long);
#define ROW(x) \
    ENTRY(x##0) ENTRY(x##1) ENTRY(x##2) ENTRY(x##3) ENTRY(x##4) ENTRY(x##5) ENTRY(x##6) ENTRY(x##7) \
    ENTRY(x##8) ENTRY(x##9) ENTRY(x##a) ENTRY(x##b) ENTRY(x##c) ENTRY(x##d) ENTRY(x##e) ENTRY(x##f)
ROW(1) ROW(2) ROW(3) ROW(4)
#undef ENTRY

#define ENTRY(name) value = entry_##name(value);
FRAME long call_all(long value) {
    ROW(1) ROW(2) ROW(3) ROW(4)
    return value;
}

// Slots of the GOT that are reset: the three reserved ones, and 64 of the slots for functions. (There are
// more, because the program calls functions of libc too.)
enum { SLOTS = 3 + 64 };
extern void *_GLOBAL_OFFSET_TABLE_[];

int main(int argc, char **argv) {
    void *unbound[SLOTS];
    memcpy(unbound, (void *)_GLOBAL_OFFSET_TABLE_, sizeof unbound);
    int binding = argc > 2 && strcmp(argv[2], "binding") == 0;
    int64_t end = thread_cpu() + number(argc, argv, 1) * 1000000;
    long sum = 0;
    while (thread_cpu() < end) {
        for (int i = 0; i < (binding ? 20 : 2000); i++) {
            if (binding) {
                __asm__ volatile("" : : : "memory");
                // Word by word, because memcpy itself may be called through the table.
                for (int slot = 3; slot < SLOTS; slot++)
                    ((void *volatile *)_GLOBAL_OFFSET_TABLE_)[slot] = unbound[slot];
            }
            sum = call_all(sum);
        }
    }
    return sum == 0;
}
