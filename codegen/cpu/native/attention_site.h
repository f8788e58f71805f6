// A site of attention as its launcher describes it, and which keys a block of its queries meets.
#pragma once

#include "vector.h"

constexpr int64_t QUERY_BLOCK = 48, KEY_BLOCK = 512;
constexpr int64_t SCORE_STRIDE = KEY_BLOCK + LANES;  // no power of two: rows would share their places in the cache
constexpr int64_t GAP = 64;  // keys that no row of a block sees: fewer are not worth leaving out
constexpr int64_t MOST_SPANS = 8;
constexpr int64_t FEW_ROWS = 32;  // queries that read keys where they lie
constexpr int64_t ENOUGH_TASKS = 64;  // fewer blocks than these are parted by their keys, by KEY_BLOCK at least
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

// One row of a block: a query of some head, and what its scores meet.
struct Query {
    int64_t head, place;
    const float *mask;             // of the first key
    const int64_t *starts, *ends;  // of its spans
    const int32_t *bits;
    float slope, sink;
};

static Query query_at(const Site &s, int64_t b, int64_t h, int64_t r) {
    Query q = {h, r, nullptr, nullptr, nullptr, nullptr, s.slopes ? s.slopes[h] : 0, s.sinks ? s.sinks[h] : -INFINITY};
    if (s.mask) q.mask = s.mask + b * s.mask_strides[0] + h * s.mask_strides[1] + r * s.mask_strides[2];
    int64_t table = b * s.span_strides[0] + h * s.span_strides[1] + r * s.spans;
    if (s.starts) q.starts = s.starts + table, q.ends = s.ends + table;
    if (s.bits) q.bits = s.bits + b * s.bit_strides[0] + h * s.bit_strides[1] + r * s.bit_strides[2];
    return q;
}

// Ranges of `keys` that some of `rows` queries see, in order and apart; each starts with a panel.
static int64_t find_ranges(const Site &s, const Query *queries, int64_t rows, Range keys, Range *ranges) {
    if (!s.starts) {
        ranges[0] = keys;
        return keys.first < keys.last;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < s.spans; i++) {
        int64_t first = s.keys, last = 0;
        for (const Query *q = queries; q < queries + rows; q++)
            if (q->starts[i] < q->ends[i]) first = smaller(first, q->starts[i]), last = larger(last, q->ends[i]);
        first = larger(first / PANEL * PANEL, keys.first), last = smaller(last, keys.last);
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

INLINE int_vec word_of(const int32_t *bits, int64_t place) {
    int_vec word;
    memcpy(&word, bits + place / WORD * LANES, sizeof word);
    return word;
}

// The first run of some keys, of KEY_BLOCK at most, in which rows have bits; it starts with a panel and ends with the keys
// or before GAP keys that no row sees. Nothing where there is none.
static Range first_run(const Query *queries, int64_t rows, Range part) {
    int64_t first = part.last, last = part.first;
    for (int64_t word = part.first / LANES / WORD; word * WORD * LANES < part.last; word++) {
        int_vec used = {};
        for (const Query *q = queries; q < queries + rows; q++) used |= word_of(q->bits, word * WORD);
        uint32_t any = 0;
        for (int i = 0; i < LANES; i++) any |= (uint32_t)used[i];
        for (int64_t t = 0; t < WORD; t++) {
            int64_t key = (word * WORD + t) * LANES;
            bool seen = any >> t & 1 && key < part.last && key >= part.first;
            if (seen) first = smaller(first, key), last = key + LANES;
            else if (first < last && key - last >= GAP) word = part.last, t = WORD;
        }
    }
    return {larger(first / PANEL * PANEL, part.first), smaller(last, part.last)};
}
