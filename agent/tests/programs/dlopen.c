// dlopen MILLISECONDS LIBRARY COUNT DIRECTORY
// COUNT times: copies LIBRARY to DIRECTORY/plugin-N.so, opens it, burns MILLISECONDS in it, and closes it. Each copy
// has another name, so each is a new file for the profiler. The copies stay.
// True stack: _start … main → use_plugin → plugin_run → plugin_inner → burn.
#include "burn.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>

static void copy(const char *from, const char *to) {
    int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_EXCL, 0755);
    struct stat status;
    if (in < 0 || out < 0 || fstat(in, &status)) fail(from);
    if (sendfile(out, in, NULL, status.st_size) != status.st_size) fail(to);
    close(in);
    close(out);
}

FRAME int use_plugin(int (*run)(int64_t), int64_t ms) { return run(ms) + 1; }

int main(int argc, char **argv) {
    int64_t ms = number(argc, argv, 1), count = number(argc, argv, 3);
    for (int64_t i = 0; i < count; i++) {
        char name[4096];
        snprintf(name, sizeof name, "%s/plugin-%ld.so", argv[4], (long)i);
        copy(argv[2], name);
        void *library = dlopen(name, RTLD_NOW);
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        int (*run)(int64_t) = (int (*)(int64_t))dlsym(library, "plugin_run");
        if (!run || use_plugin(run, ms) != 3) return 1;
        dlclose(library);
    }
    return 0;
}
