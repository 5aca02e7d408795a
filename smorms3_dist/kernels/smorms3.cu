// The kernels of a sharded step on a GPU: the update, the packing of gradients, and their norm.
//
// Every kernel works through *chunks*: parts of runs (or of gradients to be packed) of bounded
// size, one block at a time each. Tables in device memory say where runs lie, so that one launch
// serves any number of parameters; offsets are 64-bit and count elements. What is decided on the
// device (a clip factor, a step to be skipped) is read from device memory: nothing here needs the
// host to wait.
//
// Arithmetic: each operation is rounded once, in the order that is written here, which is that of
// the package's CPU kernels. Compiled without contraction and without flush-to-zero, the results
// are theirs bit for bit. float16 arithmetic is done as NumPy does it: each operation in float32,
// rounded to float16.
//
// What an update rule does to an element does not stand here: it is made of the formulas in
// chainer_rules.py (by cuda_rules.py), and comes after this text.
//
// Nothing here needs a header. Whoever compiles this as plain C++ supplies the names that CUDA
// would: `threadIdx`, `__global__` and so on, and the four conversions of float16.

#ifdef __CUDACC__
__device__ inline unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline unsigned short half_bits(double value) {
    unsigned short bits;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(bits) : "d"(value));
    return bits;
}

__device__ inline float half_value(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

typedef long long Index;

// Threads of a block, in every launch.
constexpr int THREADS = 256;

// ---- numbers ------------------------------------------------------------------------------------

struct Half {
    unsigned short bits;

    Half() = default;
    __device__ explicit Half(float value) : bits(half_bits(value)) {}
    __device__ explicit Half(double value) : bits(half_bits(value)) {}
    __device__ explicit operator float() const { return half_value(bits); }
    __device__ explicit operator double() const { return half_value(bits); }
};

__device__ inline Half operator+(Half a, Half b) { return Half(float(a) + float(b)); }
__device__ inline Half operator-(Half a, Half b) { return Half(float(a) - float(b)); }
__device__ inline Half operator*(Half a, Half b) { return Half(float(a) * float(b)); }
__device__ inline Half operator/(Half a, Half b) { return Half(float(a) / float(b)); }
__device__ inline bool operator<(Half a, Half b) { return float(a) < float(b); }
__device__ inline bool operator!=(Half a, Half b) { return float(a) != float(b); }

// numpy.minimum and numpy.maximum: the first operand if it is that or nan, else the second.
template <class T> __device__ inline T smaller(T a, T b) { return a < b || a != a ? a : b; }
template <class T> __device__ inline T larger(T a, T b) { return b < a || a != a ? a : b; }
template <class T> __device__ inline T unless_nan(T a, T b) { return a != a ? b : a; }

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline Half root(Half x) { return Half(sqrtf(float(x))); }

// A float without the lower half of its bits, to send gradients as; nothing is computed in it.
struct Bfloat {
    unsigned short bits;

    Bfloat() = default;
    // To the nearest, ties to even.
    __device__ explicit Bfloat(float value) {
        const union { float value; unsigned bits; } whole = {value};
        const unsigned rounded = whole.bits + 0x7fff + (whole.bits >> 16 & 1);
        bits = value != value ? 0x7fc0 : (unsigned short)(rounded >> 16);
    }
    __device__ explicit Bfloat(double value) : Bfloat(float(value)) {}
    __device__ explicit operator float() const {
        union { unsigned bits; float value; } whole = {unsigned(bits) << 16};
        return whole.value;
    }
    __device__ explicit operator double() const { return float(*this); }
};

// What products with the mean's factor are formed in, before they are rounded to T.
template <class T> struct WideOf { typedef float Type; };
template <> struct WideOf<double> { typedef double Type; };

template <class A, class B> struct WiderOf { typedef float Type; };
template <class A> struct WiderOf<A, double> { typedef double Type; };
template <class B> struct WiderOf<double, B> { typedef double Type; };
template <> struct WiderOf<double, double> { typedef double Type; };

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// ---- memory -------------------------------------------------------------------------------------

constexpr int VECTOR_BYTES = 16;

__device__ constexpr int vector_alignment(int bytes) {
    return bytes < VECTOR_BYTES ? bytes : VECTOR_BYTES;
}

template <class T, int N> struct alignas(vector_alignment(N * sizeof(T))) Vector { T at[N]; };

// N elements, STRIDE apart: neighbours are one vector, others are accessed one by one.
template <int N, int STRIDE, class T> __device__ inline Vector<T, N> load(const T* from) {
    if constexpr (STRIDE == 1) {
        return *reinterpret_cast<const Vector<T, N>*>(from);
    } else {
        Vector<T, N> values;
#pragma unroll
        for (int j = 0; j < N; ++j) values.at[j] = from[j * STRIDE];
        return values;
    }
}

template <int N, int STRIDE, class T>
__device__ inline void store(T* to, const Vector<T, N>& values) {
    if constexpr (STRIDE == 1) {
        *reinterpret_cast<Vector<T, N>*>(to) = values;
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j * STRIDE] = values.at[j];
    }
}

template <int N, class T> __device__ inline bool is_aligned(const T* pointer) {
    return reinterpret_cast<unsigned long long>(pointer) % alignof(Vector<T, N>) == 0;
}

// Elements before the first that starts a vector of N.
template <int N, class T> __device__ inline int elements_before(const T* pointer) {
    const int past = int(reinterpret_cast<unsigned long long>(pointer) / sizeof(T) % N);
    return past == 0 ? 0 : N - past;
}

// Calls work for all elements of a range, once each: work.at<N, STRIDE>(i) is for N elements from i
// on. Where all arrays are aligned after the same few elements (the head), that is for vectors,
// else for elements that lie as many apart as there are threads, so that neighbouring threads
// access neighbouring elements. Either way a thread has the loads of N elements on their way at
// once. What is left over comes one by one: first, because compilers then need fewer registers.
template <int N, class Work>
__device__ inline void for_each_element(int size, int head, bool aligned, const Work& work) {
    const bool in_vectors = aligned && head < size;
    const int first = in_vectors ? head : 0;
    const int step = in_vectors ? N : N * THREADS;
    const int grouped = (size - first) / step * step;
#pragma unroll 1
    for (int i = threadIdx.x; i < size - grouped; i += THREADS)
        work.template at<1, 1>(i < first ? i : i + grouped);
    if (in_vectors) {
#pragma unroll 1
        for (int i = threadIdx.x * N; i < grouped; i += THREADS * N)
            work.template at<N, 1>(first + i);
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < grouped; i += THREADS * N)
            work.template at<N, THREADS>(i);
    }
}

struct Chunk {
    Index run, start, size;
};

// ---- the update ---------------------------------------------------------------------------------

// Where a run lies, in elements.
struct Location {
    Index param, grad, state;
};

// Rule: what a step does to an element: one of the structs that are made of the formulas of rules.
// P: dtype of the parameters. G: of the gradients. S: of the states, and of masters if it is not P.
template <class Rule, class P, class G, class S> struct Update {
    static constexpr bool MASTERS = !Same<P, S>::value;
    static constexpr int STATES = Rule::STATES;
    static constexpr int N = VECTOR_BYTES / (sizeof(G) < sizeof(S) ? sizeof(S) : sizeof(G));
    typedef typename WideOf<P>::Type Wide;

    P* param;
    const G* grad;
    // The last are the masters.
    S* states[STATES + 1];
    Wide mean;
    bool clips, decays, unscales, decays_late;
    P clip, decay;
    S loss_scale, late_decay;
    S constants[Rule::CONSTANTS];

    // The gradient that the rule sees. As in Chainer, what the optimizer's hooks do happens in the
    // dtype of the parameter and before the loss scale is divided out, what the rule's hooks do
    // afterwards and in the dtype of the update.
    __device__ S prepared(G raw, P rounded, S value) const {
        P d = P(Wide(raw) * mean);
        if (clips) d = d * clip;
        if (decays) d = d + decay * rounded;
        S e = S(d);
        if (unscales) e = e / loss_scale;
        if (decays_late) e = e + late_decay * value;
        return e;
    }

    template <int M, int STRIDE> __device__ void at(int i) const {
        const Vector<G, M> ds = load<M, STRIDE>(grad + i);
        Vector<S, M> own[STATES + 1];
#pragma unroll
        for (int k = 0; k < STATES; ++k) own[k] = load<M, STRIDE>(states[k] + i);
        Vector<P, M> ps;
        Vector<S, M>& values = own[STATES];
        if constexpr (MASTERS) {
            values = load<M, STRIDE>(states[STATES] + i);
            if (decays) ps = load<M, STRIDE>(param + i);
        } else {
            values = load<M, STRIDE>(param + i);
            ps = values;
        }
#pragma unroll
        for (int j = 0; j < M; ++j) {
            const S d = prepared(ds.at[j], ps.at[j], values.at[j]);
            S element[STATES + 1];
#pragma unroll
            for (int k = 0; k < STATES; ++k) element[k] = own[k].at[j];
            Rule::template apply<S>(d, values.at[j], element, constants);
#pragma unroll
            for (int k = 0; k < STATES; ++k) own[k].at[j] = element[k];
        }
#pragma unroll
        for (int k = 0; k < STATES; ++k) store<M, STRIDE>(states[k] + i, own[k]);
        if constexpr (MASTERS) {
#pragma unroll
            for (int j = 0; j < M; ++j) ps.at[j] = P(values.at[j]);
            store<M, STRIDE>(states[STATES] + i, values);
            store<M, STRIDE>(param + i, ps);
        } else {
            store<M, STRIDE>(param + i, values);
        }
    }

    __device__ void run(int size) const {
        int head;
        if constexpr (STATES + MASTERS == 0)
            head = elements_before<N>(param);
        else
            head = elements_before<N>(states[STATES > 0 ? 0 : STATES]);
        bool aligned = is_aligned<N>(param + head) && is_aligned<N>(grad + head);
#pragma unroll
        for (int k = 0; k < STATES + MASTERS; ++k)
            aligned = aligned && is_aligned<N>(states[k] + head);
        for_each_element<N>(size, head, aligned, *this);
    }
};

// A run's row of rates: the constants of the rule, and the rate of its own weight decay. A decay that
// is nan is none; one by 0 carries what is not finite among parameters into gradients.
template <class Rule, class P, class G, class S>
__global__ void __launch_bounds__(THREADS)
    update(const Chunk* chunks, Index count, const Location* locations, const double* rates,
           P* param, const G* grad, S* state0, S* state1, S* state2, S* master, double mean,
           const double* clip, double decay, double loss_scale, const double* skip) {
    if (skip != nullptr && *skip != 0) return;
    typedef Update<Rule, P, G, S> Work;
    S* const all[] = {state0, state1, state2};
    Work work;
    const double factor = clip == nullptr ? 1 : *clip;
    // A factor that is nan clips: it tells that the gradients were.
    work.clips = !(factor >= 1);
    work.clip = P(factor);
    work.mean = typename WideOf<P>::Type(mean);
    work.decays = decay == decay;
    work.decay = P(decay);
    work.unscales = loss_scale != 1;
    work.loss_scale = S(loss_scale);
    for (Index c = blockIdx.x; c < count; c += gridDim.x) {
        const Chunk chunk = chunks[c];
        const Location location = locations[chunk.run];
        const double* rate = rates + chunk.run * (Rule::CONSTANTS + 1);
        const Index state = location.state + chunk.start;
        work.param = param + location.param + chunk.start;
        work.grad = grad + location.grad + chunk.start;
#pragma unroll
        for (int k = 0; k < Work::STATES; ++k) work.states[k] = all[k] + state;
        work.states[Work::STATES] = master + state;
#pragma unroll
        for (int k = 0; k < Rule::CONSTANTS; ++k) work.constants[k] = S(rate[k]);
        work.decays_late = rate[Rule::CONSTANTS] == rate[Rule::CONSTANTS];
        work.late_decay = S(rate[Rule::CONSTANTS]);
        work.run(int(chunk.size));
    }
}

// ---- packing ------------------------------------------------------------------------------------

// A gradient to be packed, and the type of its elements.
struct Source {
    unsigned long long pointer;
    Index type;
};

constexpr Index HALF = 0, FLOAT = 1, DOUBLE = 2;

// target = source * scale, formed in the wider dtype of float32, the source's and the target's.
template <class T, class F> struct Cast {
    typedef typename WiderOf<T, F>::Type Wide;
    static constexpr int N = VECTOR_BYTES / (sizeof(T) < sizeof(F) ? sizeof(T) : sizeof(F));

    T* target;
    const F* source;
    Wide scale;

    template <int M, int STRIDE> __device__ void at(int i) const {
        const Vector<F, M> from = load<M, STRIDE>(source + i);
        Vector<T, M> to;
#pragma unroll
        for (int j = 0; j < M; ++j) to.at[j] = T(Wide(from.at[j]) * scale);
        store<M, STRIDE>(target + i, to);
    }
};

template <class T> struct Zero {
    static constexpr int N = VECTOR_BYTES / sizeof(T);

    T* target;

    template <int M, int STRIDE> __device__ void at(int i) const {
        Vector<T, M> to;
#pragma unroll
        for (int j = 0; j < M; ++j) to.at[j] = T(0.0);
        store<M, STRIDE>(target + i, to);
    }
};

template <class T, class F>
__device__ inline void cast_chunk(T* target, unsigned long long pointer, Index start, int size,
                                  double scale) {
    typedef Cast<T, F> Work;
    const F* source = reinterpret_cast<const F*>(pointer) + start;
    const Work work = {target, source, typename Work::Wide(scale)};
    const int head = elements_before<Work::N>(target);
    const bool aligned = is_aligned<Work::N>(target + head) && is_aligned<Work::N>(source + head);
    for_each_element<Work::N>(size, head, aligned, work);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    pack(const Chunk* chunks, Index count, const Index* offsets, const Source* sources, T* bucket,
         double scale) {
    for (Index c = blockIdx.x; c < count; c += gridDim.x) {
        const Chunk chunk = chunks[c];
        const Source source = sources[chunk.run];
        const int size = int(chunk.size);
        T* target = bucket + offsets[chunk.run] + chunk.start;
        if (source.pointer == 0) {
            const Zero<T> work = {target};
            const int head = elements_before<Zero<T>::N>(target);
            for_each_element<Zero<T>::N>(size, head, true, work);
        } else if (source.type == HALF) {
            cast_chunk<T, Half>(target, source.pointer, chunk.start, size, scale);
        } else if (source.type == FLOAT) {
            cast_chunk<T, float>(target, source.pointer, chunk.start, size, scale);
        } else if (source.type == DOUBLE) {
            cast_chunk<T, double>(target, source.pointer, chunk.start, size, scale);
        } else {
            cast_chunk<T, Bfloat>(target, source.pointer, chunk.start, size, scale);
        }
    }
}

// ---- norm and check -----------------------------------------------------------------------------

// What a thread, a block or the grid has found: double, so that no square of a float16 or float32
// overflows, and that two numbers can be summed over ranks at once.
struct SquaresAndNonfinite {
    double squares, nonfinite;

    __device__ void add(const SquaresAndNonfinite& other) {
        squares = squares + other.squares;
        nonfinite = nonfinite + other.nonfinite;
    }
};

// Sums what the threads of a block have found, in their order, and hands it to the last thread
// (which is also the one that comes last where threads of a block run one after the other).
__device__ inline void sum_block(const SquaresAndNonfinite& mine, SquaresAndNonfinite* result) {
    __shared__ SquaresAndNonfinite all[THREADS];
    all[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x == THREADS - 1) {
        SquaresAndNonfinite sum = {0, 0};
        for (int t = 0; t < THREADS; ++t) sum.add(all[t]);
        *result = sum;
    }
}

// Each thread of the grid sums every so-manyth vector; the order depends on the size alone.
template <class P, class G>
__global__ void __launch_bounds__(THREADS)
    check(const G* grad, Index size, double mean, SquaresAndNonfinite* partials) {
    typedef typename WideOf<P>::Type Wide;
    constexpr int N = VECTOR_BYTES / sizeof(G);
    const Wide factor = Wide(mean);
    const Index threads = Index(gridDim.x) * THREADS;
    const bool aligned = is_aligned<N>(grad);
    SquaresAndNonfinite found = {0, 0};
#pragma unroll 4
    for (Index v = Index(blockIdx.x) * THREADS + threadIdx.x; v * N < size; v += threads) {
        Vector<G, N> values;
        const bool whole = (v + 1) * N <= size;
        if (whole && aligned) {
            values = load<N, 1>(grad + v * N);
        } else {
            for (int j = 0; j < N; ++j)
                values.at[j] = v * N + j < size ? grad[v * N + j] : G(0.0f);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const double d = double(P(Wide(values.at[j]) * factor));
            found.squares = found.squares + d * d;
            // inf - inf and nan - nan are nan.
            if (d - d != 0) found.nonfinite = found.nonfinite + 1;
        }
    }
    sum_block(found, partials + blockIdx.x);
}

// One block: sums the partial results in their order.
template <class F>
__global__ void __launch_bounds__(THREADS)
    finish_check(const F* partials, Index count, F* result) {
    F found = {0, 0};
    for (Index i = threadIdx.x; i < count; i += THREADS) found.add(partials[i]);
    sum_block(found, result);
}
