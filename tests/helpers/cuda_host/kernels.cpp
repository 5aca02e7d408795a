// The kernels for GPUs, compiled for the CPU and found by the names that they are launched by. Those
// of other rules than SMORMS3 are in rule.cpp.

#include "try.h"

// Returns whether there is such a kernel.
extern "C" int launch(const char* name, unsigned blocks, unsigned threads, void** arguments) {
    TRY(update<Smorms3, double, double, double>)
    TRY(update<Smorms3, float, float, float>)
    TRY(update<Smorms3, Half, Half, Half>)
    TRY(update<Smorms3, Half, float, Half>)
    TRY(update<Smorms3, Half, Half, float>)
    TRY(update<Smorms3, Half, float, float>)
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
