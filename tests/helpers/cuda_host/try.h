// Finds a kernel by its name.

#include "cuda_on_host.h"

#include SOURCE

#include <cstring>

#define TRY(...)                                              \
    if (std::strcmp(name, #__VA_ARGS__) == 0) {               \
        run_grid(__VA_ARGS__, blocks, threads, arguments);    \
        return 1;                                             \
    }
