// Routed experts with a SiLU gate: every token's rows through its experts, weighted and summed.
//
// Weights are packed into panels, [experts, panels, in, PANEL], gate and up apart. Pairs of token and expert are sorted
// by expert; a task is one panel of one expert, so that each weight is read once, by one thread.
#include "product.h"

constexpr int64_t ROW_BLOCK = 96;  // rows whose results of one panel stay in the second cache

struct Experts {
    const float *hidden, *weight;          // [tokens, in], [tokens, top_k]
    const int64_t *index;                  // [tokens, top_k]; pairs outside [0, experts) add nothing
    const float *gate, *up, *down;         // packed
    const float *gate_bias, *up_bias, *down_bias;  // [experts, ...]; null for none
    float *out, *workspace;                // [tokens, in]; see regraft_experts_workspace
    int64_t *places;                       // [tokens * top_k + experts + 1]
    int64_t tokens, top_k, experts, in, inner, hidden_stride;
};

// Floats of workspace: rows of inputs, of inner values and of outputs, a pair of token and expert each.
extern "C" int64_t regraft_experts_workspace(int64_t pairs, int64_t in, int64_t inner) {
    return pairs * (in + round_up(inner, PANEL) + round_up(in, PANEL));
}

// Stable counting sort: place[pair] is the pair's row, -1 for none; ends[e] is behind the last row of expert e - 1.
static void sort_pairs(const Experts &s, int64_t *place, int64_t *ends) {
    int64_t pairs = s.tokens * s.top_k;
    for (int64_t e = 0; e <= s.experts; e++) ends[e] = 0;
    for (int64_t p = 0; p < pairs; p++)
        if (s.index[p] >= 0 && s.index[p] < s.experts) ends[s.index[p] + 1]++;
    for (int64_t e = 0; e < s.experts; e++) ends[e + 1] += ends[e];
    int64_t *next = (int64_t *)malloc(s.experts * sizeof(int64_t));
    memcpy(next, ends, s.experts * sizeof(int64_t));
    for (int64_t p = 0; p < pairs; p++) {
        bool known = s.index[p] >= 0 && s.index[p] < s.experts;
        place[p] = known ? next[s.index[p]]++ : -1;
    }
    free(next);
}

static void add_bias(float *rows, int64_t count, int64_t stride, const float *bias, int64_t columns) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < columns; j++) rows[r * stride + j] += bias[j];
}

// One panel of silu(gate) * up for all rows of one expert.
static void open_panel(const Experts &s, int64_t e, int64_t panel, const float *rows, float *inner, int64_t stride,
                       int64_t count, float *scratch) {
    int64_t columns = smaller((int64_t)PANEL, s.inner - panel * PANEL), panels = ceil_div(s.inner, PANEL);
    int64_t weights = (e * panels + panel) * s.in * PANEL, bias = e * s.inner + panel * PANEL;
    for (int64_t r = 0; r < count; r += ROW_BLOCK) {
        int64_t height = smaller(ROW_BLOCK, count - r);
        float *gate = inner + r * stride + panel * PANEL;
        product(height, PANEL, rows + r * s.in, s.in, s.gate + weights, PANEL, s.in, gate, stride, false);
        product(height, PANEL, rows + r * s.in, s.in, s.up + weights, PANEL, s.in, scratch, PANEL, false);
        if (s.gate_bias) add_bias(gate, height, stride, s.gate_bias + bias, columns);
        if (s.up_bias) add_bias(scratch, height, PANEL, s.up_bias + bias, columns);
        for (int64_t i = 0; i < height; i++)
            for (int64_t j = 0; j < PANEL; j += LANES)
                store(gate + i * stride + j, silu(load(gate + i * stride + j)) * load(scratch + i * PANEL + j));
    }
}

static void combine(const Experts &s, const int64_t *place, const float *results, int64_t stride, int64_t token) {
    float *out = s.out + token * s.in;
    for (int64_t i = 0; i < s.in; i++) out[i] = 0;
    for (int64_t k = 0; k < s.top_k; k++) {
        int64_t row = place[token * s.top_k + k];
        if (row < 0) continue;
        float share = s.weight[token * s.top_k + k];
        const float *from = results + row * stride;
        for (int64_t i = 0; i < s.in; i++) out[i] += share * from[i];
    }
}

extern "C" void regraft_experts(const Experts *given) {
    const Experts &s = *given;
    int64_t pairs = s.tokens * s.top_k, *place = s.places, *ends = s.places + pairs;
    int64_t inner_stride = round_up(s.inner, PANEL), out_stride = round_up(s.in, PANEL);
    int64_t inner_panels = ceil_div(s.inner, PANEL), out_panels = ceil_div(s.in, PANEL);
    float *rows = s.workspace, *inner = rows + pairs * s.in, *results = inner + pairs * inner_stride;
    sort_pairs(s, place, ends);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; p++)
            if (place[p] >= 0)
                memcpy(rows + place[p] * s.in, s.hidden + p / s.top_k * s.hidden_stride, s.in * sizeof(float));
        float *scratch = (float *)memalign(64, ROW_BLOCK * PANEL * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.experts * inner_panels; task++) {
            int64_t e = task / inner_panels, first = ends[e], count = ends[e + 1] - first;
            if (count)
                open_panel(s, e, task % inner_panels, rows + first * s.in, inner + first * inner_stride, inner_stride,
                           count, scratch);
        }
        free(scratch);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.experts * out_panels; task++) {
            int64_t e = task / out_panels, panel = task % out_panels, first = ends[e], count = ends[e + 1] - first;
            if (!count) continue;
            float *out = results + first * out_stride + panel * PANEL;
            product(count, PANEL, inner + first * inner_stride, inner_stride,
                    s.down + (e * out_panels + panel) * s.inner * PANEL, PANEL, s.inner, out, out_stride, false);
            int64_t columns = smaller((int64_t)PANEL, s.in - panel * PANEL);
            if (s.down_bias) add_bias(out, count, out_stride, s.down_bias + e * s.in + panel * PANEL, columns);
        }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.tokens; token++) combine(s, place, results, out_stride, token);
    }
}
