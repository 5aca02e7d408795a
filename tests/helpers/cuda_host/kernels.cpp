// The kernels for GPUs, compiled for the CPU and found by the names that they are launched by.

#include "cuda_on_host.h"

#include SOURCE

#include <cstring>

#define TRY(...)                                              \
    if (std::strcmp(name, #__VA_ARGS__) == 0) {               \
        run_grid(__VA_ARGS__, blocks, threads, arguments);    \
        return 1;                                             \
    }

// Returns whether there is such a kernel.
extern "C" int launch(const char* name, unsigned blocks, unsigned threads, void** arguments) {
    TRY(update<double, double, double>)
    TRY(update<float, float, float>)
    TRY(update<Half, Half, Half>)
    TRY(update<Half, float, Half>)
    TRY(update<Half, Half, float>)
    TRY(update<Half, float, float>)
    TRY(pack<double>)
    TRY(pack<float>)
    TRY(pack<Half>)
    TRY(pack<Bfloat>)
    TRY(check<double, double>)
    TRY(check<float, float>)
    TRY(check<Half, Half>)
    TRY(check<Half, float>)
    TRY(finish_check<SquaresAndNonfinite>)
    return 0;
}
