// Vectors of the machine's width, and functions of them. GCC and Clang compile vector types to whatever the machine
// has; no intrinsics are needed.
#pragma once

// The C++ headers of these take longer to read than most kernels to compile.
#include <malloc.h>
#include <stdint.h>
#include <string.h>

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_VECTORS = 2;
#else
constexpr int LANES = 4, TILE_VECTORS = 4;
#endif
// TILE_ROWS * TILE_VECTORS accumulators, TILE_VECTORS operands and one broadcast fill the vector registers.
constexpr int TILE_ROWS = 6;
constexpr int PANEL = LANES * TILE_VECTORS;  // columns of a packed panel
constexpr int64_t LINE = 16;  // floats that memory gives at a time

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t int_vec __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const unaligned_vec *)from; }
INLINE void store(float *to, vec x) { *(unaligned_vec *)to = x; }
INLINE vec splat(float x) { return x - vec{}; }
// Where one of two is NaN, the second is taken.
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

INLINE float largest(vec x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// The first `count` elements, zeros behind them.
INLINE vec load_part(const float *from, int64_t count) {
    float held[LANES] = {};
    for (int64_t i = 0; i < count; i++) held[i] = from[i];
    return load(held);
}

INLINE void store_part(float *to, vec x, int64_t count) {
    float held[LANES];
    store(held, x);
    for (int64_t i = 0; i < count; i++) to[i] = held[i];
}

// 2^x for x <= 127, to 2 ulp; 0 below the smallest normal number; NaN stays NaN. Round to n, polynomial for 2^(x-n)
// (minimax on [-1/2, 1/2]), n into the exponent.
INLINE vec exp2_of(vec x) {
    const vec low = splat(-126.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec kept = x < low ? low : x;
    vec shifted = kept + magic;
    vec r = kept - (shifted - magic);
    vec p = splat(1.535336188319500e-4f);
    p = p * r + splat(1.339887440266574e-3f);
    p = p * r + splat(9.618437357674640e-3f);
    p = p * r + splat(5.550332471162809e-2f);
    p = p * r + splat(2.402264791363012e-1f);
    p = p * r + splat(6.931472028550421e-1f);
    p = p * r + splat(1.0f);
    vec result = (vec)((int_vec)p + ((int_vec)shifted << 23));
    return x < low ? splat(0.0f) : result;
}

constexpr float LOG2_E = 1.44269504088896341f;

// x / (1 + exp(-x)); exp overflows to infinity, so that the result ends at zero, and at NaN for minus infinity.
INLINE vec silu(vec x) {
    vec power = x * splat(-LOG2_E);
    vec below = splat(1.0f) + exp2_of(smaller(power, splat(127.0f)));
    return x / (power > splat(127.0f) ? splat(INFINITY) : below);
}

// erf, to 4e-7: an odd rational function fitted on [-3.925, 3.925], beyond which erf rounds to one: to just that, so that
// a GELU of a large negative number is zero. NaN stays NaN.
INLINE vec erf_of(vec x) {
    const vec edge = splat(3.925f), one = splat(1.0f);
    vec kept = smaller(edge, larger(-edge, x)), t = kept * kept;
    vec p = splat(2.04603607769506e-6f), q = splat(3.8047822354958764e-5f);
    p = p * t + splat(2.8484268358369545e-4f), q = q * t + splat(1.1638475637611508e-3f);
    p = p * t + splat(3.772506418902846e-3f), q = q * t + splat(1.4983107926964346e-2f);
    p = p * t + splat(5.2769157464718025e-2f), q = q * t + splat(1.1418229166551408e-1f);
    p = p * t + splat(1.9059272284274675e-1f), q = q * t + splat(5.022411332089043e-1f);
    p = p * t + splat(1.128379145741511f), q = q * t + splat(1.0f);
    return smaller(one, larger(-one, kept * p / q));
}

// 1 - 2 / (exp(2x) + 1), and x itself where that is nearer: next to zero the difference would cancel.
INLINE vec tanh_of(vec x) {
    vec power = smaller(x * splat(2 * LOG2_E), splat(126.0f));
    vec far = splat(1.0f) - splat(2.0f) / (exp2_of(power) + splat(1.0f));
    vec t = x * x, size = x < splat(0.0f) ? -x : x;
    vec near = x + x * t * (splat(-1.0f / 3) + t * (splat(2.0f / 15) + t * splat(-17.0f / 315)));
    return size < splat(0.2f) ? near : (x == x ? far : x);
}
