// Work on single rows: RMSNorm with or without the residual sum before it, rotary embedding, gated units.
#include "vector.h"

constexpr int64_t WORTH_THREADS = 1 << 15;  // elements

// out = x / sqrt(mean(x^2) + eps) * (weight + offset); with a residual, x + residual is normalised, and kept in total.
static void norm_row(const float *x, const float *residual, const float *weight, float *total, float *out,
                     int64_t size, float eps, float offset) {
    int64_t whole = size / LANES * LANES, rest = size - whole;
    vec squares = vec{};
    for (int64_t i = 0; i < size; i += LANES) {
        vec value = i < whole ? load(x + i) : load_part(x + i, rest);
        if (residual) {
            value += i < whole ? load(residual + i) : load_part(residual + i, rest);
            i < whole ? store(total + i, value) : store_part(total + i, value, rest);
        }
        squares += value * value;
    }
    const float *from = residual ? total : x;
    float inverse = 1 / sqrtf(sum(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        vec value = (i < whole ? load(from + i) : load_part(from + i, rest)) * splat(inverse);
        if (weight) value *= (i < whole ? load(weight + i) : load_part(weight + i, rest)) + splat(offset);
        i < whole ? store(out + i, value) : store_part(out + i, value, rest);
    }
}

extern "C" void regraft_rms_norm(const float *x, const float *residual, const float *weight, float *total, float *out,
                                 int64_t rows, int64_t size, int64_t x_stride, int64_t residual_stride, float eps,
                                 float offset) {
#pragma omp parallel for schedule(static) if (rows * size > WORTH_THREADS)
    for (int64_t r = 0; r < rows; r++)
        norm_row(x + r * x_stride, residual ? residual + r * residual_stride : nullptr, weight, total + r * size,
                 out + r * size, size, eps, offset);
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

// x and out are [batch, heads, length, size]; strides are those of batch, head and row.
extern "C" void regraft_rope(const float *x, const float *cos, const float *sin, float *out, int64_t batch,
                             int64_t heads, int64_t length, int64_t size, int64_t pairs, int64_t second,
                             const int64_t *x_strides, const int64_t *cos_strides, const int64_t *sin_strides,
                             const int64_t *out_strides) {
#pragma omp parallel for collapse(2) schedule(static) if (batch * heads * length * size > WORTH_THREADS)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t l = 0; l < length; l++)
            for (int64_t h = 0; h < heads; h++) {
                const float *c = cos + b * cos_strides[0] + h * cos_strides[1] + l * cos_strides[2];
                const float *s = sin + b * sin_strides[0] + h * sin_strides[1] + l * sin_strides[2];
                rope_row(x + b * x_strides[0] + h * x_strides[1] + l * x_strides[2], c, s, c + second, s + second,
                         out + b * out_strides[0] + h * out_strides[1] + l * out_strides[2], pairs, size);
            }
}

// out = silu(gate) * up
extern "C" void regraft_silu_glu(const float *gate, const float *up, float *out, int64_t rows, int64_t size,
                                 int64_t gate_stride, int64_t up_stride) {
    int64_t whole = size / LANES * LANES, rest = size - whole;
#pragma omp parallel for schedule(static) if (rows * size > WORTH_THREADS)
    for (int64_t r = 0; r < rows; r++) {
        const float *g = gate + r * gate_stride, *u = up + r * up_stride;
        float *to = out + r * size;
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, silu(load(g + i)) * load(u + i));
        if (rest) store_part(to + whole, silu(load_part(g + whole, rest)) * load_part(u + whole, rest), rest);
    }
}
