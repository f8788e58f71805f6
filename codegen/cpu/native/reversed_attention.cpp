// Attention whose values go along transposed weights: out_j = sum_i softmax_j(s_ij) v_i, s = softcap(scale * q k^T).
//
// A task is one head: a block of queries at a time meets all keys, so that each softmax is whole at once and no score is
// made twice. Scores are held turned, keys down and queries across: a softmax then runs down the lanes of vectors, and
// what it leaves is the left side of the product that adds the block's values to the outputs of all keys.
#include "product.h"

constexpr int64_t MOST_VECTORS = PANEL / LANES;

struct Reversed {
    const float *query, *key, *value;  // [batch, heads, length, ...], [batch, heads, keys, head_dim]
    const float *gates;                // [batch, heads, length], what each query's value is multiplied with; null for one
    float *out;                        // [batch, heads, keys, value_dim]
    int64_t batch, heads, length, keys, head_dim, value_dim;
    int64_t query_strides[3], key_strides[3], value_strides[3], gate_strides[3], out_strides[3];  // batch, head, row
    float scale, softcap;
};

// `count` queries as columns, scaled; nought behind the last.
static void turn(const Reversed &s, const float *query, int64_t count, int64_t across, float *columns) {
    for (int64_t d = 0; d < s.head_dim; d++)
        for (int64_t i = 0; i < across; i++) columns[d * PANEL + i] = i < count ? query[i * s.query_strides[2] + d] * s.scale : 0;
}

// Scores [keys, across] become exp(score - the column's largest); `totals` are the sums of the columns.
static void weigh(const Reversed &s, float *scores, int64_t across, float *totals) {
    vec top[MOST_VECTORS], total[MOST_VECTORS];
    int64_t vectors = across / LANES;
    for (int64_t v = 0; v < vectors; v++) top[v] = splat(-INFINITY), total[v] = vec{};
    for (int64_t j = 0; j < s.keys; j++)
        for (int64_t v = 0; v < vectors; v++) {
            float *at = scores + j * PANEL + v * LANES;
            vec score = load(at);
            if (s.softcap != 0) store(at, score = tanh_of(score * splat(1 / s.softcap)) * splat(s.softcap));
            top[v] = larger(score, top[v]);
        }
    for (int64_t j = 0; j < s.keys; j++)
        for (int64_t v = 0; v < vectors; v++) {
            float *at = scores + j * PANEL + v * LANES;
            vec weight = exp2_of((load(at) - top[v]) * splat(LOG2_E));
            store(at, weight);
            total[v] += weight;
        }
    for (int64_t v = 0; v < vectors; v++) store(totals + v * LANES, total[v]);
}

// Values of `count` queries, by their gates, over the sums of their weights, in rows of `width` numbers.
static void share(const Reversed &s, const float *value, const float *gates, int64_t count, const float *totals,
                  int64_t width, float *to) {
    for (int64_t i = 0; i < count; i++) {
        float part = (gates ? gates[i * s.gate_strides[2]] : 1) / totals[i];
        for (int64_t d = 0; d < width; d++) to[i * width + d] = d < s.value_dim ? value[i * s.value_strides[2] + d] * part : 0;
    }
}

static void attend_head(const Reversed &s, int64_t b, int64_t h, float *memory) {
    int64_t width = round_up(s.value_dim, LANES);
    float *scores = memory, *columns = scores + s.keys * PANEL, *values = columns + s.head_dim * PANEL;
    float *totals = values + PANEL * width, *sums = totals + PANEL;
    const float *query = s.query + b * s.query_strides[0] + h * s.query_strides[1];
    const float *key = s.key + b * s.key_strides[0] + h * s.key_strides[1];
    const float *value = s.value + b * s.value_strides[0] + h * s.value_strides[1];
    const float *gates = s.gates ? s.gates + b * s.gate_strides[0] + h * s.gate_strides[1] : nullptr;
    float *out = s.out + b * s.out_strides[0] + h * s.out_strides[1];
    bool direct = width == s.value_dim;
    float *to = direct ? out : sums;
    int64_t to_stride = direct ? s.out_strides[2] : width;
    for (int64_t first = 0; first < s.length; first += PANEL) {
        int64_t count = smaller((int64_t)PANEL, s.length - first), across = round_up(count, LANES);
        turn(s, query + first * s.query_strides[2], count, across, columns);
        product(s.keys, across, key, s.key_strides[2], columns, PANEL, s.head_dim, scores, PANEL, false);
        weigh(s, scores, across, totals);
        share(s, value + first * s.value_strides[2], gates ? gates + first * s.gate_strides[2] : nullptr, count, totals, width,
              values);
        for (int64_t d = 0; d < width; d += PANEL)
            product(s.keys, smaller((int64_t)PANEL, width - d), scores, PANEL, values + d, width, count, to + d, to_stride,
                    first > 0);
    }
    if (!s.length) memset(sums, 0, s.keys * width * sizeof(float));
    for (int64_t j = 0; !(direct && s.length) && j < s.keys; j++)
        memcpy(out + j * s.out_strides[2], sums + j * width, s.value_dim * sizeof(float));
}

extern "C" void regraft_reversed(const Reversed *given) {
    const Reversed &s = *given;
    int64_t width = round_up(s.value_dim, LANES);
    int64_t floats = s.keys * PANEL + s.head_dim * PANEL + PANEL * width + PANEL + s.keys * width;
#pragma omp parallel
    {
        float *memory = (float *)memalign(64, floats * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.batch * s.heads; task++) attend_head(s, task / s.heads, task % s.heads, memory);
        free(memory);
    }
}
