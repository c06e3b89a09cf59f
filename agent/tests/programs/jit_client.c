// jit_client WHERE MODE TIMES QUERY APPLICATION
// A client of PostgreSQL that sends from code in an anonymous mapping, as programs of just-in-time compiled languages
// do. MODE says what that code uses rbp for:
//   kept  as a frame pointer
//   lost  as an ordinary register, which is zero while it sends
// True stack: _start … main → ask → the code → flush.
#include "machine_code.h"
#include "postgres.h"

// push rbp; mov rbp,rsp; call rsi; pop rbp; ret
static const unsigned char KEPT[] = {0x55, 0x48, 0x89, 0xe5, 0xff, 0xd6, 0x5d, 0xc3};
// push rbp; xor ebp,ebp; call rsi; pop rbp; ret
static const unsigned char LOST[] = {0x55, 0x31, 0xed, 0xff, 0xd6, 0x5d, 0xc3};

typedef void (*code)(struct connection *, void (*)(struct connection *));

FRAME void ask(struct connection *c, code send, const char *query) {
    message(c, 'Q', query);
    send(c, flush);
    until_ready(c);
}

int main(int argc, char **argv) {
    static struct connection c;
    if (argc < 6) fail("arguments");
    // Statements that are sent before the recording knows this process may be without a caller, which is
    // not what the test is about.
    usleep(300000);
    int is_kept = strcmp(argv[2], "kept") == 0;
    void *send = is_kept ? machine_code(KEPT, sizeof KEPT) : machine_code(LOST, sizeof LOST);
    connect_to(&c, argv[1], argv[5]);
    for (int64_t times = number(argc, argv, 3); times > 0; times--) ask(&c, (code)send, argv[4]);
    return c.errors != 0;
}
