// Tiles of a product: as many rows and vectors of columns as the registers hold.
#include "product.h"

constexpr int64_t EARLY = 32;         // rows ahead that are prefetched
constexpr int64_t DEPTH_BLOCK = 512;  // rows of a panel that stay in the second cache

// Loops over registers: unrolled, or the registers would be an array in memory.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)

// What is needed after a product: asked for while it runs, `each` times LANES numbers for each row of b. With AVX2 that
// is half a line, and each is asked for twice: at half the pace it disturbs the product less (32 rows: 130 v 145 GFLOP/s).
struct Later {
    const float *from = nullptr;
    int64_t each = 0, lines = 0;
};

// out[R, vectors * LANES] = (add ? out : bias or 0) + a[R, depth] @ b[depth, ...]; rows of each are a stride apart. The
// rows of b that come next are asked for early: a weight comes from memory, where the processor's own guess is late.
// ASKS: whether for what is needed later, too.
template <int R, int V, bool ASKS>
INLINE void tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, float *out,
                 int64_t out_stride, bool add, const float *bias, Later later) {
    vec total[R][V];
    EACH(r, R)
        EACH(v, V)
            total[r][v] = add ? load(out + r * out_stride + v * LANES) : bias ? load(bias + v * LANES) : vec{};
    for (int64_t d = 0; d < depth; d++) {
        vec row[V];
        EACH(v, V) {
            row[v] = load(b + d * b_stride + v * LANES);
            if (v * LANES % LINE == 0) __builtin_prefetch(b + (d + EARLY) * b_stride + v * LANES);
        }
        for (int64_t l = 0; ASKS && l < later.each; l++) __builtin_prefetch(later.from + (d * later.each + l) * LANES, 0, 2);
        EACH(r, R) {
            vec x = splat(a[r * a_stride + d]);
            EACH(v, V) total[r][v] += x * row[v];
        }
    }
    EACH(r, R)
        EACH(v, V) store(out + r * out_stride + v * LANES, total[r][v]);
}

// Of many tiles on one panel the first few ask for what is needed later. The others are spared the instructions: with
// AVX2, on a machine that is shared, they cost up to a third. Lower tiles are one to a panel, and always ask.
template <int R, int V>
INLINE void high_tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, float *out,
                      int64_t out_stride, bool add, const float *bias, Later later) {
    if (later.each) tile<R, V, true>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
    else tile<R, V, false>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
}

template <int V>
static void tile_of_width(int rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                          float *out, int64_t out_stride, bool add, const float *bias, Later later) {
    switch (rows) {
    case 2 * TILE_ROWS:
        if constexpr (2 * V <= TILE_VECTORS) return high_tile<2 * TILE_ROWS, V>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
        break;
    case 1: return tile<1, V, true>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
    case 2: return tile<2, V, true>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
    case 4: return tile<4, V, true>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
    default: return high_tile<TILE_ROWS, V>(a, a_stride, b, b_stride, depth, out, out_stride, add, bias, later);
    }
}

void product(int64_t rows, int64_t columns, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
             int64_t depth, float *out, int64_t out_stride, bool add, const float *bias, const float *after,
             int64_t floats) {
    Later later{after, ceil_div(floats, LANES * larger(rows / TILE_ROWS, (int64_t)1) * depth), floats / LANES};
    if (later.each > TILE_VECTORS) later.each = TILE_VECTORS;
    for (int64_t d = 0; d < depth; d += DEPTH_BLOCK, add = true) {
        int64_t length = smaller(DEPTH_BLOCK, depth - d);
        int height;
        for (int64_t r = 0; r < rows; r += height) {
            height = (int)smaller((int64_t)TILE_ROWS, rows - r);
            if (height == 3 || height == 5) height--;  // each height takes time to compile, odd rests are rare
            if (2 * columns <= PANEL && rows - r >= 2 * TILE_ROWS) height = 2 * TILE_ROWS;
            const float *left = a + r * a_stride + d, *right = b + d * b_stride;
            float *to = out + r * out_stride;
            switch (columns / LANES) {
            case 1: tile_of_width<1>(height, left, a_stride, right, b_stride, length, to, out_stride, add, bias, later); break;
            case 2: tile_of_width<2>(height, left, a_stride, right, b_stride, length, to, out_stride, add, bias, later); break;
#if defined(__AVX512F__) || !defined(__AVX__)
            case 3:  // rare: not worth the time that tiles of its own take to compile
                tile_of_width<2>(height, left, a_stride, right, b_stride, length, to, out_stride, add, bias, later);
                tile_of_width<1>(height, left, a_stride, right + 2 * LANES, b_stride, length, to + 2 * LANES, out_stride, add,
                                 bias ? bias + 2 * LANES : bias, Later{});
                break;
            case 4: tile_of_width<4>(height, left, a_stride, right, b_stride, length, to, out_stride, add, bias, later); break;
#endif
            }
            later.from += length * later.each * LANES, later.lines -= length * later.each;
            if (later.lines <= 0) later.each = 0;
        }
    }
}
