// false_server PORT
// Exports the symbols of a PostgreSQL server, and runs in a directory whose postmaster.pid names a port on which another
// process listens.
#include "burn.h"

struct status { int change_count; int pid; } *MyBEEntry;
struct port { int descriptor; } *MyProcPort;
unsigned *my_wait_event_info;
const char *debug_query_string;
void *MyBgworkerEntry;

int main(int argc, char **argv) {
    FILE *file = fopen("postmaster.pid", "w");
    if (!file) fail("postmaster.pid");
    fprintf(file, "%d\n/nowhere\n0\n%lld\n\n*\n", getpid(), (long long)number(argc, argv, 1));
    fclose(file);
    puts("ready");
    fflush(stdout);
    for (;;) {
        burn(20);
        usleep(20000);
    }
}
