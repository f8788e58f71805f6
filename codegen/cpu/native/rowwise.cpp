// Work on single rows: norms with or without the residual sum before them, rotary embedding, gated units.
#include "activation.h"

constexpr int64_t WORTH_THREADS = 1 << 15;  // elements

// work(i) for i in [0, count), by all threads where there are enough elements. OpenMP's own `if` clause would do it with
// a team of one, for which its runtime lets the other threads go, and the next region waits for new ones.
template <typename Work>
static void for_each(int64_t count, int64_t elements, Work work) {
    if (elements <= WORTH_THREADS) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) work(i);
}

// Where the rows of an operand lie: up to three dims, of which `middle` and `inner` are the sizes of the last two.
struct Rows {
    int64_t middle, inner, strides[3];

    int64_t place(int64_t row) const {
        if (middle == 1 && inner == 1) return row * strides[0];
        return row / (middle * inner) * strides[0] + row / inner % middle * strides[1] + row % inner * strides[2];
    }
};

struct Norm {
    const float *x, *residual, *weight, *bias;  // [rows, size] twice, [size] twice; null for none but x
    float *total, *out;                         // x + residual, where there is one; the result
    int64_t rows, size;
    Rows x_rows, residual_rows;
    float eps, offset;
    int32_t centred, activation;
};

// The sum of f(i) over whole vectors, i their first element: in several sums, as each waits for what it was before.
template <typename Function>
INLINE vec sum_of(int64_t whole, Function f) {
    constexpr int SUMS = 4;
    vec totals[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= whole; i += SUMS * LANES)
        _Pragma("GCC unroll 4") for (int k = 0; k < SUMS; k++) totals[k] += f(i + k * LANES);
    for (; i < whole; i += LANES) totals[0] += f(i);
    return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

// RMSNorm: x / sqrt(mean(x^2) + eps) * (weight + offset) + bias; LayerNorm takes the mean from x first. With a residual
// it is x + residual that is normalised. An activation comes last.
static void norm_row(const Norm &s, int64_t row) {
    const float *from = s.x + s.x_rows.place(row), *weight = s.weight, *bias = s.bias;
    float *out = s.out + row * s.size, size = (float)s.size;
    int64_t whole = s.size / LANES * LANES, rest = s.size - whole;
    if (s.residual) {
        const float *residual = s.residual + s.residual_rows.place(row);
        float *total = s.total + row * s.size;
        for (int64_t i = 0; i < whole; i += LANES) store(total + i, load(from + i) + load(residual + i));
        for (int64_t i = whole; i < s.size; i++) total[i] = from[i] + residual[i];
        from = total;
    }
    float mean = 0, square = 0;
    if (s.centred) {
        mean = sum(sum_of(whole, [&](int64_t i) { return load(from + i); }) + load_part(from + whole, rest)) / size;
        for (int64_t i = whole; i < s.size; i++) square += (from[i] - mean) * (from[i] - mean);
    } else {
        for (int64_t i = whole; i < s.size; i++) square += from[i] * from[i];
    }
    // With the mean this is a second pass over the row: the difference of two large sums would lose digits.
    square += sum(sum_of(whole, [&](int64_t i) {
        vec away = load(from + i) - splat(mean);
        return away * away;
    }));
    vec middle = splat(mean), inverse = splat(1 / __builtin_sqrtf(square / size + s.eps)), offset = splat(s.offset);
    auto scaled = [&](vec x, vec factor, vec added) { return (x - middle) * inverse * (factor + offset) + added; };
    if (!weight) offset = splat(1.0f);
    for (int64_t i = 0; i < whole; i += LANES)
        store(out + i, scaled(load(from + i), weight ? load(weight + i) : vec{}, bias ? load(bias + i) : vec{}));
    if (rest)
        store_part(out + whole, scaled(load_part(from + whole, rest), weight ? load_part(weight + whole, rest) : vec{},
                                       bias ? load_part(bias + whole, rest) : vec{}), rest);
    activate(out, s.size, s.activation);
}

extern "C" void regraft_norm(const Norm *given) {
    const Norm &s = *given;
    for_each(s.rows, s.rows * s.size, [&](int64_t row) { norm_row(s, row); });
}

// Rotates the first 2 * pairs entries of each row: entry i with entry i + pairs; the others pass through. The tables
// hold one value a pair (sin_second = sin), or one an entry (sin_second = sin + pairs).
static void rope_row(const float *x, const float *cos, const float *sin, const float *cos_second,
                     const float *sin_second, float *out, int64_t pairs, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= pairs; i += LANES) {
        vec first = load(x + i), second = load(x + pairs + i);
        store(out + i, first * load(cos + i) - second * load(sin + i));
        store(out + pairs + i, second * load(cos_second + i) + first * load(sin_second + i));
    }
    for (; i < pairs; i++) {
        float first = x[i], second = x[pairs + i];
        out[i] = first * cos[i] - second * sin[i];
        out[pairs + i] = second * cos_second[i] + first * sin_second[i];
    }
    for (i = 2 * pairs; i < size; i++) out[i] = x[i];
}

struct Rope {
    const float *x, *cos, *sin;  // [batch, heads, length, size], tables that broadcast to it
    float *out;
    int64_t batch, heads, length, size, pairs, second;
    int64_t x_strides[3], cos_strides[3], sin_strides[3], out_strides[3];  // batch, head, row
};

extern "C" void regraft_rope(const Rope *given) {
    const Rope &s = *given;
    auto place = [](const int64_t *strides, int64_t b, int64_t h, int64_t l) {
        return b * strides[0] + h * strides[1] + l * strides[2];
    };
    for_each(s.batch * s.length, s.batch * s.heads * s.length * s.size, [&](int64_t i) {
        int64_t b = i / s.length, l = i % s.length;
        for (int64_t h = 0; h < s.heads; h++) {
            const float *cos = s.cos + place(s.cos_strides, b, h, l), *sin = s.sin + place(s.sin_strides, b, h, l);
            rope_row(s.x + place(s.x_strides, b, h, l), cos, sin, cos + s.second, sin + s.second,
                     s.out + place(s.out_strides, b, h, l), s.pairs, s.size);
        }
    });
}

struct Glu {
    const float *gate, *up;  // [rows, size]
    float *out;              // silu(gate) * up
    int64_t rows, size;
    Rows gate_rows, up_rows;
};

extern "C" void regraft_silu_glu(const Glu *given) {
    const Glu &s = *given;
    int64_t whole = s.size / LANES * LANES, rest = s.size - whole;
    for_each(s.rows, s.rows * s.size, [&](int64_t r) {
        const float *gate = s.gate + s.gate_rows.place(r), *up = s.up + s.up_rows.place(r);
        float *to = s.out + r * s.size;
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, silu(load(gate + i)) * load(up + i));
        if (rest) store_part(to + whole, silu(load_part(gate + whole, rest)) * load_part(up + whole, rest), rest);
    });
}
