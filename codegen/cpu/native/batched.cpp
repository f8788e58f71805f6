// Many small matrix products at once. Rows, depth and columns may each be two dims of a tensor (the pixels of a window):
// what the product cannot read or write in place is packed, one matrix at a time, into memory that stays in the caches.
#include "product.h"

// Two dims as one.
struct Pair {
    int64_t outer, inner;  // sizes
    int64_t size() const { return outer * inner; }
};

struct Steps {
    int64_t outer, inner;
    // Whether the pair is one dim of this stride.
    bool even(Pair of) const { return of.outer == 1 || of.inner == 1 || outer == inner * of.inner; }
    int64_t stride(Pair of) const { return of.inner == 1 ? outer : inner; }
    int64_t place(Pair of, int64_t i) const { return i / of.inner * outer + i % of.inner * inner; }
};

struct Batched {
    const float *a, *b;  // [batch, rows, depth], [batch, depth, columns]
    float *out;          // [batch, rows, columns]
    int64_t batch[3];
    Pair rows, depth, columns;
    int64_t a_batch[3];
    Steps a_rows, a_depth;
    int64_t b_batch[3];
    Steps b_depth, b_columns;
    int64_t out_batch[3];
    Steps out_rows, out_columns;
};

typedef float eight __attribute__((vector_size(32), aligned(4)));

// Runs are short (the pixels of a window): a call for each would cost more than its numbers.
INLINE void copy_run(float *to, const float *from, int64_t count) {
    for (; count >= 8; count -= 8, to += 8, from += 8) *(eight *)to = *(const eight *)from;
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
}

// Copies a matrix between a place with pairs of dims and dense rows of `step` numbers.
template <bool into>
static void pack(float *dense, int64_t step, float *apart, Pair rows, Pair columns, Steps down, Steps across) {
    for (int64_t r = 0; r < rows.size(); r++) {
        float *there = apart + down.place(rows, r), *here = dense + r * step;
        for (int64_t c = 0; c < columns.outer; c++, there += across.outer, here += columns.inner) {
            if (across.inner == 1) {
                copy_run(into ? here : there, into ? there : here, columns.inner);
                continue;
            }
            for (int64_t i = 0; i < columns.inner; i++)
                if constexpr (into)
                    here[i] = there[i * across.inner];
                else
                    there[i * across.inner] = here[i];
        }
        if constexpr (into)
            for (float *zero = here; zero < dense + (r + 1) * step; zero++) *zero = 0;
    }
}

extern "C" void regraft_batched(const Batched *given) {
    const Batched &s = *given;
    int64_t rows = s.rows.size(), depth = s.depth.size(), columns = s.columns.size(), wide = round_up(columns, LANES);
    auto dense = [](Pair of, Steps steps) { return steps.even(of) && (steps.stride(of) == 1 || of.size() == 1); };
    bool pack_a = !s.a_rows.even(s.rows) || !dense(s.depth, s.a_depth);
    bool pack_b = !s.b_depth.even(s.depth) || !dense(s.columns, s.b_columns) || wide != columns;
    bool pack_out = !s.out_rows.even(s.rows) || !dense(s.columns, s.out_columns) || wide != columns;
#pragma omp parallel
    {
        int64_t floats = (pack_a ? rows * depth : 0) + (pack_b ? depth * wide : 0) + (pack_out ? rows * wide : 0);
        float *memory = (float *)memalign(64, (floats + LANES) * sizeof(float));
        float *packed_b = memory, *scratch = packed_b + (pack_b ? depth * wide : 0);
        float *packed_a = scratch + (pack_out ? rows * wide : 0);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch[0] * s.batch[1] * s.batch[2]; i++) {
            int64_t at[3] = {i / (s.batch[1] * s.batch[2]), i / s.batch[2] % s.batch[1], i % s.batch[2]};
            auto place = [&](const int64_t *steps) { return at[0] * steps[0] + at[1] * steps[1] + at[2] * steps[2]; };
            float *a = (float *)s.a + place(s.a_batch), *b = (float *)s.b + place(s.b_batch);
            float *out = s.out + place(s.out_batch), *to = pack_out ? scratch : out;
            int64_t a_stride = s.a_rows.stride(s.rows), b_stride = s.b_depth.stride(s.depth);
            int64_t out_stride = pack_out ? wide : s.out_rows.stride(s.rows);
            if (pack_a) pack<true>(packed_a, depth, a, s.rows, s.depth, s.a_rows, s.a_depth), a = packed_a, a_stride = depth;
            if (pack_b) pack<true>(packed_b, wide, b, s.depth, s.columns, s.b_depth, s.b_columns), b = packed_b, b_stride = wide;
            for (int64_t c = 0; c < wide; c += PANEL)
                product(rows, smaller((int64_t)PANEL, wide - c), a, a_stride, b + c, b_stride, depth, to + c, out_stride, false);
            if (pack_out) pack<false>(to, wide, out, s.rows, s.columns, s.out_rows, s.out_columns);
        }
        free(memory);
    }
}
