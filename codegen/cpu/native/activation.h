// Activations, as the launchers number them.
#pragma once

#include "vector.h"

enum Activation { NONE, RELU, SIGMOID, TANH, SILU, GELU, GELU_TANH, QUICK_GELU, RELU_SQUARED };

INLINE vec activated(vec x, int32_t activation) {
    switch (activation) {
    case RELU: return x < splat(0.0f) ? splat(0.0f) : x;
    case SIGMOID: return splat(1.0f) / (splat(1.0f) + exp2_of(smaller(splat(127.0f), x * splat(-LOG2_E))));  // NaN stays
    case TANH: return tanh_of(x);
    case SILU: return silu(x);
    case GELU: return x * splat(0.5f) * (splat(1.0f) + erf_of(x * splat(0.7071067811865476f)));
    case GELU_TANH: {
        vec inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
        return x * splat(0.5f) * (splat(1.0f) + tanh_of(inner));
    }
    case QUICK_GELU: return silu(x * splat(1.702f)) * splat(1 / 1.702f);
    case RELU_SQUARED: return x < splat(0.0f) ? splat(0.0f) : x * x;
    default: return x;
    }
}

template <class Function>
INLINE void each_vector(float *values, int64_t count, Function function) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(values + i, function(load(values + i)));
    if (i < count) store_part(values + i, function(load_part(values + i, count - i)), count - i);
}

// The activation in place; a loop of its own for each, as asking for every vector which it is costs as much again.
static void activate(float *values, int64_t count, int32_t activation) {
    switch (activation) {
    case RELU: return each_vector(values, count, [](vec x) { return activated(x, RELU); });
    case SIGMOID: return each_vector(values, count, [](vec x) { return activated(x, SIGMOID); });
    case TANH: return each_vector(values, count, [](vec x) { return activated(x, TANH); });
    case SILU: return each_vector(values, count, [](vec x) { return activated(x, SILU); });
    case GELU: return each_vector(values, count, [](vec x) { return activated(x, GELU); });
    case GELU_TANH: return each_vector(values, count, [](vec x) { return activated(x, GELU_TANH); });
    case QUICK_GELU: return each_vector(values, count, [](vec x) { return activated(x, QUICK_GELU); });
    case RELU_SQUARED: return each_vector(values, count, [](vec x) { return activated(x, RELU_SQUARED); });
    }
}
