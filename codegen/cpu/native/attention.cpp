// Attention in one pass over the keys (flash attention, Dao et al. 2022; online softmax, Milakov & Gimelshein 2018).
//
// Keys are packed into panels of transposed columns, so that a block of queries meets them as a matrix product; values
// are packed into rows of whole vectors. Each task is one block of queries of one head. Keys that none of its queries
// sees, by their spans, by their bits or because a padding mask ends before them, are never touched.
//
// Few queries over many keys (verified drafts, a step of decoding) read keys and values where they lie: packing them would
// cost more than the arithmetic. Either way keys may lie in two pieces, a cache and what is appended to it.
//
// Weights are those of a softmax, or a map of each score by itself: no maximum is kept then.
#include "product.h"

constexpr int64_t QUERY_BLOCK = 48, KEY_BLOCK = 512;
constexpr int64_t SCORE_STRIDE = KEY_BLOCK + LANES;  // no power of two: rows would share their places in the cache
constexpr int64_t MOST_SPANS = 8;
constexpr int64_t FEW_ROWS = 32;  // queries of a head that read keys where they lie
constexpr int64_t WORD = 32;  // keys whose bits lie in one lane, see mask.cpp
enum EmptyRows { ZERO = 0, NOT_A_NUMBER = 1, MEAN = 2 };
enum Weights { SOFTMAX = 0, EXP = 1, SIGMOID = 2, RELU = 3, ELU1 = 4, GELU = 5, IDENTITY = 6 };
// What the sum of mapped weights Z makes of a row: Z, 1, Z + constant, max(|Z|, 1) or a constant divides it.
enum Normalisers { SUM = 0, NONE = 1, SUM_EPS = 2, SUM_ABS = 3, CONSTANT = 4 };

struct Site {
    const float *query, *key, *value;
    const float *mask;    // added to the scaled scores; null for none
    const float *slopes;  // [heads], times (key - query), added to the scaled scores (ALiBi); null for none
    const float *sinks;   // [heads], a logit that takes weight and gives nothing; null for none
    float *out, *workspace;
    float *lse;                    // [batch, heads, length], the log-sum-exp of a softmax's scores; null for none
    const int64_t *starts, *ends;  // of the keys that each query sees, [batch, heads, length, spans]; null for all keys
    const float *key_more, *value_more;  // the keys from `before` on, and their values
    const int32_t *bits;           // which of these are seen in truth, as mask.cpp lays them out; null for none
    int64_t batch, heads, kv_heads, length, keys, head_dim, value_dim;
    int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3];  // batch, head, row
    int64_t key_more_strides[3], value_more_strides[3], before;
    int64_t mask_strides[4];                                                     // batch, head, row, key (0 or 1)
    int64_t span_strides[2], spans;                                              // of starts and ends: batch, head
    int64_t bit_strides[3];                                                      // batch, head, row
    float scale, softcap, constant;
    int32_t empty_rows, weights, normaliser;
};

struct Range {
    int64_t first, last;
};

// Keys or values that lie one after the other, `count` rows a stride apart.
struct Rows {
    const float *from;
    int64_t stride, count;
};

// Of keys [first, last) of one batch and head: those that lie together with the first.
static Rows keys_from(const Site &s, int64_t b, int64_t h, int64_t first, int64_t last) {
    bool more = first >= s.before;
    const int64_t *strides = more ? s.key_more_strides : s.key_strides;
    const float *from = (more ? s.key_more : s.key) + b * strides[0] + h * strides[1];
    return {from + (first - (more ? s.before : 0)) * strides[2], strides[2], (more ? last : smaller(last, s.before)) - first};
}

static Rows values_from(const Site &s, int64_t b, int64_t h, int64_t first, int64_t last) {
    bool more = first >= s.before;
    const int64_t *strides = more ? s.value_more_strides : s.value_strides;
    const float *from = (more ? s.value_more : s.value) + b * strides[0] + h * strides[1];
    return {from + (first - (more ? s.before : 0)) * strides[2], strides[2], (more ? last : smaller(last, s.before)) - first};
}

static bool is_direct(int64_t length, int64_t value_dim) { return length <= FEW_ROWS && value_dim % LANES == 0; }

// Floats that a caller provides as workspace: packed keys and values of every batch and head.
extern "C" int64_t regraft_attention_workspace(int64_t batch, int64_t kv_heads, int64_t length, int64_t keys,
                                               int64_t head_dim, int64_t value_dim) {
    if (is_direct(length, value_dim)) return 1;
    return batch * kv_heads * round_up(keys, PANEL) * (head_dim + round_up(value_dim, LANES));
}

static void pack_keys(const Site &s, int64_t b, int64_t h, int64_t first, float *panel) {
    int64_t count = smaller((int64_t)PANEL, s.keys - first);
    for (int64_t done = 0; done < count;) {
        Rows part = keys_from(s, b, h, first + done, first + count);
        for (int64_t d = 0; d < s.head_dim; d++)
            for (int64_t j = 0; j < part.count; j++) panel[d * PANEL + done + j] = part.from[j * part.stride + d];
        done += part.count;
    }
    if (count < PANEL)
        for (int64_t d = 0; d < s.head_dim; d++)
            for (int64_t j = count; j < PANEL; j++) panel[d * PANEL + j] = 0;
}

static void pack_values(const Site &s, int64_t b, int64_t h, int64_t first, float *packed, int64_t width) {
    int64_t last = smaller(first + PANEL, s.keys);
    while (first < last) {
        Rows part = values_from(s, b, h, first, last);
        for (int64_t j = 0; j < part.count; j++) {
            float *to = packed + (first + j) * width;
            memcpy(to, part.from + j * part.stride, s.value_dim * sizeof(float));
            for (int64_t d = s.value_dim; d < width; d++) to[d] = 0;
        }
        first += part.count;
    }
}

// Scaled scores of one row in [low, high), capped, with mask and slopes added.
static void finish_scores(const Site &s, float *row, const float *mask, float slope, int64_t offset, Range part) {
    int64_t low = part.first, high = part.last;
    float scale = s.scale;
    if (s.softcap != 0) {
        vec inside = splat(scale / s.softcap), outside = splat(s.softcap);
        int64_t j = low;
        for (; j + LANES <= high; j += LANES) store(row + j, tanh_of(load(row + j) * inside) * outside);
        if (j < high) store_part(row + j, tanh_of(load_part(row + j, high - j) * inside) * outside, high - j);
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

INLINE vec mapped(vec x, int32_t weights) {
    vec one = splat(1.0f), nothing = vec{};
    switch (weights) {
        case EXP: {
            vec power = x * splat(LOG2_E);
            return power > splat(127.0f) ? splat(INFINITY) : exp2_of(power);
        }
        case SIGMOID: {
            vec power = x * splat(-LOG2_E);
            return one / (power > splat(127.0f) ? splat(INFINITY) : one + exp2_of(smaller(power, splat(127.0f))));
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

// Ranges of keys that some of `rows` queries see, in order and apart; each starts with a panel.
static int64_t find_ranges(const Site &s, const int64_t *starts, const int64_t *ends, int64_t rows, int64_t keys_end,
                           Range *ranges) {
    if (!starts) {
        ranges[0] = {0, keys_end};
        return keys_end > 0;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < s.spans; i++) {
        int64_t first = s.keys, last = 0;
        for (int64_t r = i; r < rows * s.spans; r += s.spans)
            if (starts[r] < ends[r]) first = smaller(first, starts[r]), last = larger(last, ends[r]);
        first = first / PANEL * PANEL, last = smaller(last, keys_end);
        if (first >= last) continue;
        int64_t place = count++;
        for (; place > 0 && ranges[place - 1].first > first; place--) ranges[place] = ranges[place - 1];
        ranges[place] = {first, last};
    }
    int64_t kept = 0;
    for (int64_t i = 1; i < count; i++) {
        if (ranges[i].first <= round_up(ranges[kept].last, PANEL))
            ranges[kept].last = larger(ranges[kept].last, ranges[i].last);
        else
            ranges[++kept] = ranges[i];
    }
    return count ? kept + 1 : 0;
}

// The scores of one query over keys [c, c + columns), finished where it sees the key and minus infinity elsewhere.
static void finish_row(const Site &s, float *row, const int64_t *starts, const int64_t *ends, int64_t c, int64_t count,
                       int64_t columns, bool plain, const float *added, float slope, int64_t offset) {
    int64_t done = 0, parts = starts ? s.spans : 1;
    for (int64_t i = 0; i < parts; i++) {
        Range part = {0, count};
        if (starts) {
            part.first = smaller(larger(starts[i] - c, done), count);
            part.last = larger(part.first, smaller(ends[i] - c, count));
        }
        if (part.first == part.last) continue;
        for (int64_t j = done; j < part.first; j++) row[j] = -INFINITY;
        if (!plain) finish_scores(s, row, added, slope, offset, part);
        done = part.last;
    }
    for (int64_t j = done; j < columns; j++) row[j] = -INFINITY;
}

INLINE int_vec word_of(const int32_t *bits, int64_t place) {
    int_vec word;
    memcpy(&word, bits + place / WORD * LANES, sizeof word);
    return word;
}

// Minus infinity where a key's bit is not set; the row's first key is `first`, a multiple of LANES.
static void hide(float *row, int64_t columns, const int32_t *bits, int64_t first) {
    for (int64_t j = 0; j < columns; j += LANES) {
        int64_t place = (first + j) / LANES;
        int_vec shown = word_of(bits, place) & (int32_t)(1u << place % WORD);
        store(row + j, shown != 0 ? load(row + j) : splat(-INFINITY));
    }
}

// The part of some keys, of KEY_BLOCK at most, outside of which no row has a bit; it starts with a panel.
static Range narrowed(const Site &s, const int32_t *bits, int64_t rows, Range part) {
    int64_t first = part.last, last = part.first;
    for (int64_t word = part.first / LANES / WORD; word * WORD * LANES < part.last; word++) {
        int_vec used = {};
        for (int64_t r = 0; r < rows; r++) used |= word_of(bits + r * s.bit_strides[2], word * WORD);
        uint32_t any = 0;
        for (int i = 0; i < LANES; i++) any |= (uint32_t)used[i];
        for (int64_t t = 0; t < WORD; t++)
            if (any >> t & 1) {
                int64_t key = (word * WORD + t) * LANES;
                if (key < part.last && key >= part.first) first = smaller(first, key), last = key + LANES;
            }
    }
    return {first / PANEL * PANEL, smaller(last, part.last)};
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

// Keys and values of one batch and head as a block of queries meets them: packed, or where they lie, with the queries
// turned to columns instead.
struct Operands {
    const float *panels, *values;  // null where nothing is packed
    float *columns, *turned;       // [head_dim, FEW_ROWS] and [KEY_BLOCK, FEW_ROWS] of scores, where nothing is
    int64_t width;
};

// The queries of a head as columns, nought behind the last.
static void turn_queries(const Site &s, int64_t b, int64_t h, float *columns) {
    const float *query = s.query + b * s.query_strides[0] + h * s.query_strides[1];
    for (int64_t d = 0; d < s.head_dim; d++)
        for (int64_t r = 0; r < FEW_ROWS; r++)
            columns[d * FEW_ROWS + r] = r < s.length ? query[r * s.query_strides[2] + d] : 0;
}

// Scores of a block of queries and `count` keys from `c` on, a multiple of PANEL.
static void score(const Site &s, const Operands &o, int64_t b, int64_t h, const float *query, int64_t rows, int64_t c,
                  int64_t count, float *scores) {
    for (int64_t p = 0, columns = round_up(count, LANES); o.panels && p < count; p += PANEL)
        product(rows, smaller((int64_t)PANEL, columns - p), query, s.query_strides[2], o.panels + (c + p) * s.head_dim,
                PANEL, s.head_dim, scores + p, SCORE_STRIDE, false);
    int64_t across = round_up(rows, LANES);
    for (int64_t done = 0; !o.panels && done < count;) {
        Rows part = keys_from(s, b, h, c + done, c + count);
        for (int64_t q = 0; q < across; q += PANEL)
            product(part.count, smaller((int64_t)PANEL, across - q), part.from, part.stride, o.columns + q, FEW_ROWS,
                    s.head_dim, o.turned + done * FEW_ROWS + q, FEW_ROWS, false);
        done += part.count;
    }
    for (int64_t r = 0; !o.panels && r < rows; r++)
        for (int64_t j = 0; j < count; j++) scores[r * SCORE_STRIDE + j] = o.turned[j * FEW_ROWS + r];
}

// Adds the values of `count` keys from `c` on to the sums, by their weights.
static void add_values(const Site &s, const Operands &o, int64_t b, int64_t h, const float *weights, int64_t rows,
                       int64_t c, int64_t count, float *sums, bool begun) {
    for (int64_t done = 0; done < count;) {
        Rows part = {o.values + c * o.width, o.width, count};
        if (!o.panels) part = values_from(s, b, h, c + done, c + count);
        for (int64_t d = 0; d < o.width; d += PANEL)
            product(rows, smaller((int64_t)PANEL, o.width - d), weights + done, SCORE_STRIDE, part.from + d, part.stride,
                    part.count, sums + d, o.width, begun || done);
        done += part.count;
    }
}

// One block of queries of one head. `keys_end` is behind the last key that the batch's mask leaves.
static void attend_block(const Site &s, int64_t b, int64_t h, int64_t start, int64_t keys_end, const Operands &operands,
                         float *scratch) {
    int64_t rows = smaller(QUERY_BLOCK, s.length - start), width = operands.width;
    int64_t kv_head = h / (s.heads / s.kv_heads);
    float *scores = scratch, *sums = scores + QUERY_BLOCK * SCORE_STRIDE, *maxima = sums + QUERY_BLOCK * width,
          *totals = maxima + QUERY_BLOCK;
    const float *query = s.query + b * s.query_strides[0] + h * s.query_strides[1] + start * s.query_strides[2];
    const float *mask = s.mask ? s.mask + b * s.mask_strides[0] + h * s.mask_strides[1] : nullptr;
    float sink = s.sinks ? s.sinks[h] : -INFINITY, slope = s.slopes ? s.slopes[h] : 0;
    bool online = s.weights == SOFTMAX, plain = online && !mask && !s.slopes && s.softcap == 0 && s.scale > 0;
    int64_t table = b * s.span_strides[0] + h * s.span_strides[1] + start * s.spans;
    const int64_t *starts = s.starts ? s.starts + table : nullptr, *ends = s.starts ? s.ends + table : nullptr;
    const int32_t *bits = s.bits;
    if (bits) bits += b * s.bit_strides[0] + h * s.bit_strides[1] + start * s.bit_strides[2];
    Range ranges[MOST_SPANS];
    int64_t count_ranges = find_ranges(s, starts, ends, rows, keys_end, ranges);
    for (int64_t r = 0; r < rows; r++) maxima[r] = sink, totals[r] = sink == -INFINITY ? 0 : 1;
    bool begun = false;
    for (const Range *range = ranges; range < ranges + count_ranges; range++)
        for (int64_t next = range->first; next < range->last; next += KEY_BLOCK) {
            Range part = {next, smaller(next + KEY_BLOCK, range->last)};
            if (bits) part = narrowed(s, bits, rows, part);
            if (part.first >= part.last) continue;
            int64_t c = part.first, count = part.last - c, columns = round_up(count, LANES);
            score(s, operands, b, kv_head, query, rows, c, count, scores);
            for (int64_t r = 0; r < rows; r++) {
                float *row = scores + r * SCORE_STRIDE;
                const float *added = mask ? mask + (start + r) * s.mask_strides[2] + c * s.mask_strides[3] : nullptr;
                const int64_t *from = starts ? starts + r * s.spans : nullptr, *to = starts ? ends + r * s.spans : nullptr;
                finish_row(s, row, from, to, c, count, columns, plain, added, slope, c - start - r);
                if (bits) hide(row, columns, bits + r * s.bit_strides[2], c);
                if (!online) {
                    totals[r] += map_scores(row, columns, s.weights);
                    continue;
                }
                float rescale, share = weigh(row, columns, maxima[r], plain ? s.scale : 1, rescale);
                totals[r] = totals[r] * rescale + share;
                if (begun && rescale != 1)
                    for (int64_t d = 0; d < width; d += LANES)
                        store(sums + r * width + d, load(sums + r * width + d) * splat(rescale));
            }
            add_values(s, operands, b, kv_head, scores, rows, c, count, sums, begun);
            begun = true;
        }
    if (!begun) memset(sums, 0, rows * width * sizeof(float));
    float *out = s.out + b * s.out_strides[0] + h * s.out_strides[1] + start * s.out_strides[2];
    for (int64_t r = 0; r < rows; r++, out += s.out_strides[2]) {
        if (s.lse) s.lse[(b * s.heads + h) * s.length + start + r] = maxima[r] + __builtin_logf(totals[r]);
        if (width) finish_output(s, b, kv_head, sums + r * width, totals[r], maxima[r], out);
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
    if (s.batch == 0 || s.heads == 0 || s.length == 0 || (s.value_dim == 0 && !s.lse)) return;
    int64_t padded = round_up(s.keys, PANEL), width = round_up(s.value_dim, LANES), groups = s.heads / s.kv_heads;
    int64_t each = padded * (s.head_dim + width), blocks = ceil_div(s.length, QUERY_BLOCK);
    bool direct = is_direct(s.length, s.value_dim);
#pragma omp parallel
    {
        if (!direct) {
#pragma omp for collapse(2) schedule(static)
            for (int64_t i = 0; i < s.batch * s.kv_heads; i++)
                for (int64_t first = 0; first < padded; first += PANEL) {
                    float *packed = s.workspace + i * each;
                    pack_keys(s, i / s.kv_heads, i % s.kv_heads, first, packed + first * s.head_dim);
                    pack_values(s, i / s.kv_heads, i % s.kv_heads, first, packed + padded * s.head_dim, width);
                }
        }
        size_t floats = QUERY_BLOCK * (SCORE_STRIDE + width + 2), columns = direct ? FEW_ROWS * s.head_dim : 0;
        size_t all = floats + columns + (direct ? FEW_ROWS * KEY_BLOCK : 0);
        float *scratch = (float *)memalign(64, all * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * s.heads * blocks; task++) {
            int64_t b = task / (s.heads * blocks), h = task / blocks % s.heads;
            // The last blocks of a causal site have the most keys: they come first, so that no thread waits for one.
            int64_t start = (blocks - 1 - task % blocks) * QUERY_BLOCK;
            const float *packed = s.workspace + (b * s.kv_heads + h / groups) * each;
            Operands operands = {packed, packed + padded * s.head_dim, nullptr, nullptr, width};
            if (direct) operands = {nullptr, nullptr, scratch + floats, scratch + floats + columns, width};
            if (direct) turn_queries(s, b, h, operands.columns);
            attend_block(s, b, h, start, keys_left(s, b), operands, scratch);
        }
        free(scratch);
    }
}
