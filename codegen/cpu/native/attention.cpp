// Attention in one pass over the keys (flash attention, Dao et al. 2022; online softmax, Milakov & Gimelshein 2018).
//
// Keys are packed into panels of transposed columns, so that a block of queries meets them as a matrix product; values
// are packed into rows of whole vectors. Each task is one block of queries of one head. Keys that none of its queries
// sees, by their intervals or because a padding mask ends before them, are never touched.
#include "product.h"

constexpr int64_t QUERY_BLOCK = 48, KEY_BLOCK = 512;
constexpr int64_t SCORE_STRIDE = KEY_BLOCK + LANES;  // no power of two: rows would share their places in the cache
enum EmptyRows { ZERO = 0, NOT_A_NUMBER = 1, MEAN = 2 };

struct Site {
    const float *query, *key, *value;
    const float *mask;    // added to the scaled scores; null for none
    const float *slopes;  // [heads], times (key - query), added to the scaled scores (ALiBi); null for none
    const float *sinks;   // [heads], a logit that takes weight and gives nothing; null for none
    float *out, *workspace;
    const int64_t *starts, *ends;  // of the keys that each query sees, [batch, length]; null for all keys
    int64_t batch, heads, kv_heads, length, keys, head_dim, value_dim;
    int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3];  // batch, head, row
    int64_t mask_strides[4];                                                     // batch, head, row, key (0 or 1)
    int64_t interval_stride;                                                     // of starts and ends, batch to batch
    float scale, softcap;
    int32_t empty_rows;
};

// Floats that a caller provides as workspace: packed keys and values of every batch and head.
extern "C" int64_t regraft_attention_workspace(int64_t batch, int64_t kv_heads, int64_t keys, int64_t head_dim,
                                               int64_t value_dim) {
    return batch * kv_heads * round_up(keys, PANEL) * (head_dim + round_up(value_dim, LANES));
}

static void pack_keys(const Site &s, const float *key, int64_t first, float *panel) {
    int64_t count = smaller((int64_t)PANEL, s.keys - first), stride = s.key_strides[2];
    key += first * stride;
    for (int64_t d = 0; d < s.head_dim; d++) {
        for (int64_t j = 0; j < count; j++) panel[d * PANEL + j] = key[j * stride + d];
        for (int64_t j = count; j < PANEL; j++) panel[d * PANEL + j] = 0;
    }
}

static void pack_values(const Site &s, const float *value, int64_t first, float *packed, int64_t width) {
    int64_t last = smaller(first + PANEL, s.keys);
    for (int64_t j = first; j < last; j++) {
        memcpy(packed + j * width, value + j * s.value_strides[2], s.value_dim * sizeof(float));
        for (int64_t d = s.value_dim; d < width; d++) packed[j * width + d] = 0;
    }
}

// Scaled scores of one row, capped, with mask and slopes added; elements outside [low, high) become -inf.
static void finish_scores(const Site &s, float *row, const float *mask, float slope, int64_t offset, int64_t low,
                          int64_t high, int64_t columns) {
    for (int64_t j = 0; j < low; j++) row[j] = -INFINITY;
    for (int64_t j = high; j < columns; j++) row[j] = -INFINITY;
    float scale = s.scale;
    if (s.softcap != 0) {
        for (int64_t j = low; j < high; j++) row[j] = s.softcap * __builtin_tanhf(row[j] * scale / s.softcap);
        scale = 1;
    }
    if (mask && s.mask_strides[3] == 0)
        for (int64_t j = low; j < high; j++) row[j] = row[j] * scale + mask[0];
    else if (mask)
        for (int64_t j = low; j < high; j++) row[j] = row[j] * scale + mask[j];
    else
        for (int64_t j = low; j < high; j++) row[j] = row[j] * scale;
    if (s.slopes)
        for (int64_t j = low; j < high; j++) row[j] += slope * (float)(offset + j);
}

// Scores become weights relative to the row's maximum so far; returns their sum. What was summed before under a lower
// maximum is scaled down by `rescale`.
static float weigh(float *row, int64_t columns, float &maximum, float factor, float &rescale) {
    vec top = splat(-INFINITY), total = vec{};
    for (int64_t j = 0; j < columns; j += LANES) top = larger(load(row + j), top);
    float before = maximum;
    maximum = __builtin_fmaxf(before, largest(top) * factor);
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

static void fill_empty(const Site &s, const float *values, int64_t width, float *out) {
    for (int64_t d = 0; d < s.value_dim; d++) {
        float filling = s.empty_rows == ZERO ? 0 : NAN;
        if (s.empty_rows == MEAN) {
            filling = 0;
            for (int64_t j = 0; j < s.keys; j++) filling += values[j * width + d];
            filling /= (float)s.keys;
        }
        out[d] = filling;
    }
}

// One block of queries of one head. `keys_end` is behind the last key that the batch's mask leaves.
static void attend_block(const Site &s, int64_t b, int64_t h, int64_t start, int64_t keys_end, const float *panels,
                         const float *values, int64_t width, float *scratch) {
    int64_t rows = smaller(QUERY_BLOCK, s.length - start);
    float *scores = scratch, *sums = scores + QUERY_BLOCK * SCORE_STRIDE, *maxima = sums + QUERY_BLOCK * width,
          *totals = maxima + QUERY_BLOCK;
    const float *query = s.query + b * s.query_strides[0] + h * s.query_strides[1] + start * s.query_strides[2];
    const float *mask = s.mask ? s.mask + b * s.mask_strides[0] + h * s.mask_strides[1] : nullptr;
    float sink = s.sinks ? s.sinks[h] : -INFINITY, slope = s.slopes ? s.slopes[h] : 0;
    bool plain = !mask && !s.slopes && s.softcap == 0 && s.scale > 0;
    const int64_t *starts = s.starts ? s.starts + b * s.interval_stride + start : nullptr;
    const int64_t *ends = s.starts ? s.ends + b * s.interval_stride + start : nullptr;
    int64_t first = starts ? s.keys : 0, last = starts ? 0 : keys_end;
    for (int64_t r = 0; starts && r < rows; r++)
        if (starts[r] < ends[r]) first = smaller(first, starts[r]), last = larger(last, ends[r]);
    first = first / PANEL * PANEL, last = smaller(last, keys_end);
    for (int64_t r = 0; r < rows; r++) maxima[r] = sink, totals[r] = sink == -INFINITY ? 0 : 1;
    if (first >= last) memset(sums, 0, rows * width * sizeof(float));
    for (int64_t c = first; c < last; c += KEY_BLOCK) {
        int64_t count = smaller(KEY_BLOCK, last - c), columns = round_up(count, LANES);
        for (int64_t p = 0; p < count; p += PANEL)
            product(rows, smaller((int64_t)PANEL, columns - p), query, s.query_strides[2], panels + (c + p) * s.head_dim,
                    PANEL, s.head_dim, scores + p, SCORE_STRIDE, false);
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * SCORE_STRIDE, rescale;
            int64_t low = 0, high = count;
            if (starts) {
                low = smaller(larger(starts[r] - c, (int64_t)0), count);
                high = larger(low, smaller(ends[r] - c, count));
            }
            float factor = 1;
            if (plain) {
                factor = s.scale;
                for (int64_t j = 0; j < low; j++) row[j] = -INFINITY;
                for (int64_t j = high; j < columns; j++) row[j] = -INFINITY;
            } else {
                const float *added = mask ? mask + (start + r) * s.mask_strides[2] + c * s.mask_strides[3] : nullptr;
                finish_scores(s, row, added, slope, c - start - r, low, high, columns);
            }
            float share = weigh(row, columns, maxima[r], factor, rescale);
            totals[r] = totals[r] * rescale + share;
            if (c > first && rescale != 1)
                for (int64_t d = 0; d < width; d += LANES)
                    store(sums + r * width + d, load(sums + r * width + d) * splat(rescale));
        }
        for (int64_t d = 0; d < width; d += PANEL)
            product(rows, smaller((int64_t)PANEL, width - d), scores, SCORE_STRIDE, values + c * width + d, width, count,
                    sums + d, width, c > first);
    }
    float *out = s.out + b * s.out_strides[0] + h * s.out_strides[1] + start * s.out_strides[2];
    for (int64_t r = 0; r < rows; r++, out += s.out_strides[2]) {
        if (maxima[r] == -INFINITY && totals[r] == 0) {
            fill_empty(s, values, width, out);
            continue;
        }
        float inverse = 1 / totals[r];
        for (int64_t d = 0; d < s.value_dim; d++) out[d] = sums[r * width + d] * inverse;
    }
}

// Behind the last key of a batch that a mask shared by its heads and rows leaves; all keys for any other mask.
static int64_t keys_left(const Site &s, int64_t b) {
    int64_t end = s.keys;
    if (s.mask && s.mask_strides[1] == 0 && s.mask_strides[2] == 0 && s.mask_strides[3] == 1)
        while (end > 0 && s.mask[b * s.mask_strides[0] + end - 1] == -INFINITY) end--;
    return end;
}

extern "C" void regraft_attention(const Site *given) {
    const Site &s = *given;
    if (s.batch == 0 || s.heads == 0 || s.length == 0 || s.value_dim == 0) return;
    int64_t padded = round_up(s.keys, PANEL), width = round_up(s.value_dim, LANES), groups = s.heads / s.kv_heads;
    int64_t each = padded * (s.head_dim + width), blocks = ceil_div(s.length, QUERY_BLOCK);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < s.batch * s.kv_heads; i++)
            for (int64_t first = 0; first < padded; first += PANEL) {
                int64_t b = i / s.kv_heads, h = i % s.kv_heads;
                float *packed = s.workspace + i * each;
                const float *key = s.key + b * s.key_strides[0] + h * s.key_strides[1];
                pack_keys(s, key, first, packed + first * s.head_dim);
                const float *value = s.value + b * s.value_strides[0] + h * s.value_strides[1];
                pack_values(s, value, first, packed + padded * s.head_dim, width);
            }
        size_t floats = QUERY_BLOCK * (SCORE_STRIDE + width + 2);
        float *scratch = (float *)memalign(64, floats * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * s.heads * blocks; task++) {
            int64_t b = task / (s.heads * blocks), h = task / blocks % s.heads;
            // The last blocks of a causal site have the most keys: they come first, so that no thread waits for one.
            int64_t start = (blocks - 1 - task % blocks) * QUERY_BLOCK;
            const float *packed = s.workspace + (b * s.kv_heads + h / groups) * each;
            attend_block(s, b, h, start, keys_left(s, b), packed, packed + padded * s.head_dim, width, scratch);
        }
        free(scratch);
    }
}
