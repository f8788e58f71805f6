// The small matrix product that all kernels here are built on. Compiled once, in product.cpp: it is most of the build.
#pragma once

#include "vector.h"

// out[rows, columns] = (add ? out : bias or 0) + a[rows, depth] @ b[depth, columns]; rows of each are a stride apart;
// any number of rows, and up to PANEL columns, a multiple of LANES. `floats` numbers at `after` are needed next.
void product(int64_t rows, int64_t columns, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
             int64_t depth, float *out, int64_t out_stride, bool add, const float *bias = nullptr,
             const float *after = nullptr, int64_t floats = 0);
