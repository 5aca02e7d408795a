// What CUDA C++ has and C++ has not, as far as the kernels need it: enough to run them on a CPU, one
// thread of the grid after the other. Threads of a block come in the order of their numbers, so a
// kernel whose last thread alone reads what the others shared needs no barrier.

#include <cmath>
#include <cstddef>
#include <tuple>
#include <utility>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static

struct Position {
    unsigned x;
};

static Position blockIdx, threadIdx, gridDim;

static void __syncthreads() {}

// float16 as the hardware rounds it, to nearest and to even, subnormal numbers included.
static unsigned short half_bits(double value) {
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    if (size != size) return sign | 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    int exponent = size == 0 ? -14 : std::ilogb(size);
    if (exponent < -14) exponent = -14;
    // The leading one of a normal number adds one to the field of the exponent.
    return sign | (((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(size, 10 - exponent))));
}

static unsigned short half_bits(float value) { return half_bits(double(value)); }

static float half_value(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size;
    if (exponent == 31)
        size = fraction == 0 ? INFINITY : NAN;
    else if (exponent == 0)
        size = std::ldexp(float(fraction), -24);
    else
        size = std::ldexp(float(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

// Calls a kernel for every thread; arguments come as CUDA takes them: a pointer to each.
template <class... A, std::size_t... I>
static void run_grid(void (*kernel)(A...), unsigned blocks, unsigned threads, void** arguments,
                     std::index_sequence<I...>) {
    const std::tuple<A...> values(*static_cast<A*>(arguments[I])...);
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) std::apply(kernel, values);
}

template <class... A>
static void run_grid(void (*kernel)(A...), unsigned blocks, unsigned threads, void** arguments) {
    run_grid(kernel, blocks, threads, arguments, std::index_sequence_for<A...>());
}
