// flood COUNT MILLISECONDS LIBRARY
// Stays on one CPU. At the first SIGUSR1 maps and unmaps code of LIBRARY COUNT times, opens the library and prints
// `flooded`. At the next SIGUSR1 burns MILLISECONDS in the library.
// True stack: _start … main → use_plugin → plugin_run → plugin_inner → burn.
#include "burn.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>

FRAME int use_plugin(int (*run)(int64_t), int64_t ms) { return run(ms) + 1; }

static void some_code(int file) {
    void *code = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
    if (code == MAP_FAILED) fail("mmap");
    munmap(code, 4096);
}

int main(int argc, char **argv) {
    int64_t count = number(argc, argv, 1), ms = number(argc, argv, 2);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(sched_getcpu(), &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus)) fail("sched_setaffinity");
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int signal, file = open(argv[3], O_RDONLY);
    if (file < 0) fail(argv[3]);
    puts("ready");
    fflush(stdout);
    sigwait(&signals, &signal);
    for (int64_t i = 0; i < count; i++) some_code(file);
    void *library = dlopen(argv[3], RTLD_NOW);
    int (*run)(int64_t) = library ? (int (*)(int64_t))dlsym(library, "plugin_run") : NULL;
    if (!run) return 1;
    puts("flooded");
    fflush(stdout);
    sigwait(&signals, &signal);
    // The kernel reports lost events together with the next event of this CPU.
    some_code(file);
    return use_plugin(run, ms) != 3;
}
