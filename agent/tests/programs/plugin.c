// The library that dlopen.c loads. True stack: … plugin_run → plugin_inner → burn.
#include "burn.h"

FRAME int plugin_inner(int64_t ms) { burn(ms); return 1; }
int plugin_run(int64_t ms) { return plugin_inner(ms) + 1; }
