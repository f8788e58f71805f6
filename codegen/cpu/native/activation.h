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
