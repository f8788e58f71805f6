// A strided tensor of 4-byte elements written out dense: what a reshape of permuted dims copies. Rows by their number.
#include "vector.h"

constexpr int64_t WORTH_THREADS = 1 << 15;  // elements
constexpr int64_t TILE = 16;                // elements along each side of a block that is turned: a cache line
constexpr int MOST_DIMS = 8;

struct Copy {
    const float *x;
    float *out;
    int64_t dims, sizes[MOST_DIMS];
    int64_t strides[MOST_DIMS], out_strides[MOST_DIMS];  // the last two dims are the block that is turned or copied
};

// out[i, j] = x[i, j], for a dim along which `out` is dense (j) and one along which `x` may be (i).
static void copy_block(const Copy &s, const float *x, float *out) {
    int64_t i_size = s.sizes[s.dims - 2], j_size = s.sizes[s.dims - 1];
    int64_t i_step = s.strides[s.dims - 2], j_step = s.strides[s.dims - 1], out_step = s.out_strides[s.dims - 2];
    if (j_step == 1) {
        for (int64_t i = 0; i < i_size; i++) memcpy(out + i * out_step, x + i * i_step, j_size * sizeof(float));
        return;
    }
    for (int64_t j0 = 0; j0 < j_size; j0 += TILE) {
        int64_t wide = smaller(TILE, j_size - j0);
        for (int64_t i0 = 0; i0 < i_size; i0 += TILE) {
            int64_t tall = smaller(TILE, i_size - i0);
            const float *from = x + i0 * i_step + j0 * j_step;
            float *to = out + i0 * out_step + j0;
            if (wide == TILE)
                for (int64_t i = 0; i < tall; i++)
                    for (int64_t j = 0; j < TILE; j++) to[i * out_step + j] = from[i * i_step + j * j_step];
            else
                for (int64_t i = 0; i < tall; i++)
                    for (int64_t j = 0; j < wide; j++) to[i * out_step + j] = from[i * i_step + j * j_step];
        }
    }
}

extern "C" void regraft_copy(const Copy *given) {
    const Copy &s = *given;
    int64_t tasks = 1;
    for (int64_t dim = 0; dim < s.dims - 2; dim++) tasks *= s.sizes[dim];
    auto work = [&](int64_t task) {
        const float *x = s.x;
        float *out = s.out;
        for (int64_t dim = s.dims - 3; dim >= 0; dim--) {
            x += task % s.sizes[dim] * s.strides[dim];
            out += task % s.sizes[dim] * s.out_strides[dim];
            task /= s.sizes[dim];
        }
        copy_block(s, x, out);
    };
    if (tasks * s.sizes[s.dims - 2] * s.sizes[s.dims - 1] <= WORTH_THREADS) {
        for (int64_t i = 0; i < tasks; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tasks; i++) work(i);
}

struct Gather {
    const float *x;        // [batch, tokens, width]
    const int64_t *index;  // [batch, count]
    float *out;            // [batch, count, width]
    int64_t *wrong;        // one more than the place of an index that is out of range, if any
    int64_t batch, tokens, count, width, x_strides[2], index_strides[2];
};

extern "C" void regraft_gather_rows(const Gather *given) {
    const Gather &s = *given;
    auto work = [&](int64_t i) {
        int64_t b = i / s.count, row = s.index[b * s.index_strides[0] + i % s.count * s.index_strides[1]];
        if (row < 0 || row >= s.tokens) {
            __atomic_store_n(s.wrong, i + 1, __ATOMIC_RELAXED);
            return;
        }
        memcpy(s.out + i * s.width, s.x + b * s.x_strides[0] + row * s.x_strides[1], s.width * sizeof(float));
    };
    if (s.batch * s.count * s.width <= WORTH_THREADS) {
        for (int64_t i = 0; i < s.batch * s.count; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < s.batch * s.count; i++) work(i);
}
