// Rows of scores: finished, hidden, made weights, and what their sums become.
#pragma once

#include "attention_site.h"

// Scaled scores of one row in [low, high), capped, with mask and slopes added.
static void finish_scores(const Site &s, float *row, const float *mask, float slope, int64_t offset, Range part) {
    bool capped = s.softcap != 0, spread = mask && s.mask_strides[3] == 0;
    vec scale = splat(capped ? s.scale / s.softcap : s.scale), cap = splat(s.softcap), lane;
    for (int i = 0; i < LANES; i++) lane[i] = (float)i;
    auto finished = [&](vec score, vec added, int64_t j) {
        vec x = score * scale;
        if (capped) x = tanh_of(x) * cap;
        if (mask) x += added;
        return s.slopes ? x + splat(slope) * (lane + splat((float)(offset + j))) : x;
    };
    int64_t j = part.first;
    bool simple = mask && !spread && !capped && !s.slopes;  // an additive mask alone: nothing is asked inside the loop
    for (; simple && j + LANES <= part.last; j += LANES) store(row + j, load(row + j) * scale + load(mask + j));
    for (; j + LANES <= part.last; j += LANES)
        store(row + j, finished(load(row + j), !mask ? vec{} : spread ? splat(mask[0]) : load(mask + j), j));
    int64_t rest = part.last - j;
    if (rest <= 0) return;
    vec added = !mask ? vec{} : spread ? splat(mask[0]) : load_part(mask + j, rest);
    store_part(row + j, finished(load_part(row + j, rest), added, j), rest);
}

INLINE vec mapped(vec x, int32_t weights) {
    vec one = splat(1.0f), nothing = vec{};
    switch (weights) {
        case EXP: {
            vec power = x * splat(LOG2_E);
            return power > splat(127.0f) ? splat(INFINITY) : exp2_of(power);
        }
        case SIGMOID: {
            vec power = x * splat(-LOG2_E);
            return one / (power > splat(127.0f) ? splat(INFINITY) : one + exp2_of(smaller(splat(127.0f), power)));  // in this order NaN stays NaN
        }
        case RELU: return x < nothing ? nothing : x;
        case ELU1: return x > nothing ? x + one : exp2_of(x * splat(LOG2_E));
        case GELU: return splat(0.5f) * x * (one + erf_of(x * splat(0.70710678118654752f)));
        default: return x;
    }
}

// Scores become weights, each by itself; returns their sum. A mask's minus infinity is a weight of nothing.
static float map_scores(float *row, int64_t columns, int32_t weights) {
    vec total = vec{};
    for (int64_t j = 0; j < columns; j += LANES) {
        vec score = load(row + j);
        vec weight = score == splat(-INFINITY) ? vec{} : mapped(score, weights);
        store(row + j, weight);
        total += weight;
    }
    return sum(total);
}

static vec highest(const float *row, int64_t columns) {
    vec top = splat(-INFINITY);
    for (int64_t j = 0; j < columns; j += LANES) top = larger(load(row + j), top);
    return top;
}

// Scores become weights relative to the row's maximum so far, `top` being that of these; returns their sum. What was
// summed before under a lower maximum is scaled down by `rescale`.
static float weigh(float *row, int64_t columns, vec top, float &maximum, float factor, float &rescale) {
    vec total = vec{};
    float before = maximum;
    float found = largest(top) * factor;
    maximum = found > before ? found : before;
    rescale = 1;
    if (maximum == -INFINITY) {
        // No key so far; NaN must not be lost with the others.
        for (int64_t j = 0; j < columns; j++) row[j] = row[j] != row[j] ? row[j] : 0;
        for (int64_t j = 0; j < columns; j += LANES) total += load(row + j);
        return sum(total);
    }
    // The maximum is taken away before anything is multiplied: a mask of the lowest number would overflow.
    vec slope = splat(factor), shift = splat(-maximum);
    for (int64_t j = 0; j < columns; j += LANES) {
        vec weight = exp2_of((load(row + j) * slope + shift) * splat(LOG2_E));
        store(row + j, weight);
        total += weight;
    }
    if (before != maximum) rescale = before == -INFINITY ? 0 : __builtin_exp2f((before - maximum) * LOG2_E);
    return sum(total);
}

// What a row without a key gives; the mean is that of the values of its batch and head.
static void fill_empty(const Site &s, int64_t b, int64_t h, float *out) {
    bool mean = s.empty_rows == MEAN;
    for (int64_t d = 0; d < s.value_dim; d++) out[d] = mean || s.empty_rows == ZERO ? 0 : NAN;
    for (int64_t first = 0; mean && first < s.keys;) {
        Rows part = values_from(s, b, h, first, s.keys);
        for (int64_t j = 0; j < part.count; j++)
            for (int64_t d = 0; d < s.value_dim; d++) out[d] += part.from[j * part.stride + d];
        first += part.count;
    }
    for (int64_t d = 0; mean && d < s.value_dim; d++) out[d] /= (float)s.keys;
}

// The scores of one query over keys [c, c + columns), finished where it sees the key and minus infinity elsewhere.
static void finish_row(const Site &s, float *row, const Query &q, int64_t c, int64_t count, int64_t columns, bool plain) {
    int64_t done = 0, parts = q.starts ? s.spans : 1;
    for (int64_t i = 0; i < parts; i++) {
        Range part = {0, count};
        if (q.starts) {
            part.first = smaller(larger(q.starts[i] - c, done), count);
            part.last = larger(part.first, smaller(q.ends[i] - c, count));
        }
        if (part.first == part.last) continue;
        for (int64_t j = done; j < part.first; j++) row[j] = -INFINITY;
        if (!plain) finish_scores(s, row, q.mask ? q.mask + c * s.mask_strides[3] : nullptr, q.slope, c - q.place, part);
        done = part.last;
    }
    for (int64_t j = done; j < columns; j++) row[j] = -INFINITY;
}

// Minus infinity where a key's bit is not set; the row's first key is `first`, a multiple of LANES. Returns the highest.
static vec hide(float *row, int64_t columns, const int32_t *bits, int64_t first) {
    vec top = splat(-INFINITY);
    for (int64_t j = 0; j < columns;) {
        int64_t place = (first + j) / LANES;
        int_vec word = word_of(bits, place), bit = (int_vec){} + (int32_t)(1u << place % WORD);
        int64_t last = smaller(columns, j + (WORD - place % WORD) * LANES);
        for (; j < last; j += LANES, bit += bit) {
            vec score = (word & bit) != 0 ? load(row + j) : splat(-INFINITY);
            store(row + j, score);
            top = larger(score, top);
        }
    }
    return top;
}

// One row's sum of weighted values becomes its output.
static void finish_output(const Site &s, int64_t b, int64_t h, const float *sums, float total, float maximum,
                          float *out) {
    if (s.weights == SOFTMAX && maximum == -INFINITY && total == 0) return fill_empty(s, b, h, out);
    float divisor = total, size = total < 0 ? -total : total;
    if (s.weights != SOFTMAX && s.normaliser == NONE) divisor = 1;
    if (s.weights != SOFTMAX && s.normaliser == SUM_EPS) divisor = total + s.constant;
    if (s.weights != SOFTMAX && s.normaliser == SUM_ABS) divisor = size < 1 ? 1 : size;
    if (s.weights != SOFTMAX && s.normaliser == CONSTANT) divisor = s.constant;
    for (int64_t d = 0; d < s.value_dim; d++) out[d] = sums[d] / divisor;
}
