// Products with fewer rows than a vector has lanes, on keys and values where they lie: each is read once, whole, and
// met by all rows. A tile of a matrix product would leave most of its lanes empty.
#pragma once

#include "vector.h"

constexpr int FEW_VECTORS = TILE_VECTORS == 2 ? 8 : 4;  // sums that are kept in registers
constexpr int64_t NEAR_KEYS = 64;  // rows of values that stay in the first cache while all rows of weights meet them

// Lanes with bit M of their number clear hold sums of two halves of a, the others of b: log2(LANES) such steps add up
// the lanes of LANES vectors.
template <int M>
INLINE vec fold(vec a, vec b) {
#ifdef __clang__
    vec kept, moved;
    for (int i = 0; i < LANES; i++) kept[i] = i & M ? b[i] : a[i], moved[i] = i & M ? b[i ^ M] : a[i ^ M];
    return kept + moved;
#else
    int_vec same, other;
    for (int i = 0; i < LANES; i++) same[i] = i & M ? LANES + i : i, other[i] = i & M ? LANES + (i ^ M) : i ^ M;
    return __builtin_shuffle(a, b, same) + __builtin_shuffle(a, b, other);
#endif
}

// Vectors 0, STEP, ... of LANES: lane i of the result is the sum of the lanes of vector i.
template <int M>
INLINE vec fold_all(vec *held) {
    for (int i = 0; i < M; i++) held[i] = fold<M>(held[i], held[i + M]);
    if constexpr (M > 1) return fold_all<M / 2>(held);
    return held[0];
}

// Scores of `rows` queries, whole vectors of `depth` numbers with noughts behind the last, and `count` keys.
static void few_scores(int64_t rows, const float *queries, int64_t queries_stride, const float *keys, int64_t keys_stride,
                       int64_t count, int64_t depth, float *out, int64_t out_stride) {
    int64_t whole = depth / LANES * LANES;
    for (int64_t j = 0; j < count; j += LANES) {
        int64_t most = smaller((int64_t)LANES, count - j);
        const float *from[LANES];
        for (int64_t i = 0; i < LANES; i++) from[i] = keys + (j + smaller(i, most - 1)) * keys_stride;
        for (int64_t r = 0; r < rows; r++) {
            const float *query = queries + r * queries_stride;
            vec total[LANES] = {};
            for (int64_t d = 0; d < whole; d += LANES) {
                vec x = load(query + d);
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) total[i] += x * load(from[i] + d);
            }
            if (whole < depth)
                for (int i = 0; i < LANES; i++) total[i] += load(query + whole) * load_part(from[i] + whole, depth - whole);
            vec scores = fold_all<LANES / 2>(total);
            if (most == LANES) store(out + r * out_stride + j, scores);
            else store_part(out + r * out_stride + j, scores, most);
        }
    }
}

template <int V>
INLINE void add_weighted(const float *weights, const float *values, int64_t stride, int64_t count, float *sums, bool begun) {
    vec total[V];
    _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) total[v] = begun ? load(sums + v * LANES) : vec{};
    for (int64_t j = 0; j < count; j++) {
        vec x = splat(weights[j]);
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) total[v] += x * load(values + j * stride + v * LANES);
    }
    _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) store(sums + v * LANES, total[v]);
}

// sums[rows, width] = (begun ? sums : 0) + weights[rows, count] @ values[count, width]; `width` is a multiple of LANES.
static void few_sums(int64_t rows, const float *weights, int64_t weights_stride, const float *values, int64_t stride,
                     int64_t count, int64_t width, float *sums, bool begun) {
    for (int64_t j = 0; j < count; j += NEAR_KEYS, begun = true)
        for (int64_t d = 0; d < width;) {
            int64_t vectors = (width - d) / LANES, near = smaller(NEAR_KEYS, count - j);
            for (int64_t r = 0; r < rows; r++) {
                const float *weight = weights + r * weights_stride + j, *value = values + j * stride + d;
                float *to = sums + r * width + d;
                if (vectors >= FEW_VECTORS) add_weighted<FEW_VECTORS>(weight, value, stride, near, to, begun);
                else if (vectors >= 4) add_weighted<4>(weight, value, stride, near, to, begun);
                else if (vectors >= 2) add_weighted<2>(weight, value, stride, near, to, begun);
                else add_weighted<1>(weight, value, stride, near, to, begun);
            }
            d += (vectors >= FEW_VECTORS ? FEW_VECTORS : vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1) * LANES;
        }
}
