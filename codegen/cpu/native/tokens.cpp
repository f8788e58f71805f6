// Fewer tokens: which go and where each goes (bipartite soft matching, Bolya et al. 2023; greedy max-min, Alvar et al.
// 2025), merging by size, rows put back; and linear recurrences over tokens.
//
// Similarities are made a block of rows by a panel of columns at a time, and only the best of each row is kept: no
// matrix of all pairs is ever in memory.
#include "product.h"

constexpr int64_t ROW_BLOCK = 48, OUT_BLOCK = 16, SCAN_BLOCK = 256;
constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers
constexpr float NEVER = -INFINITY, PADDED = -1e30f, ODD = -2e30f, LAST = 2 * ODD, FIRST = 1e30f;  // as of plan_merge

struct Plan {
    const float *metric;  // [batch, heads, tokens, width]; the mean over heads is compared
    const uint8_t *keep;  // [batch, tokens], 0 for padding; null for none
    int64_t *kept, *sources, *slots;
    float *workspace;
    int64_t batch, heads, tokens, width, remove, prefix, suffix, causal, diverse;
    int64_t metric_strides[3], keep_strides[2];  // batch, head, token; batch, token
};

// A sample's part of the workspace: by token two numbers for its target and two for its place in the order of ranks,
// twice, and its rank; then every second token as rows and the others as panels of columns, or, where all are compared
// (diverse), all as one panel, and two rows of cosines.
struct Sample {
    float *rows, *panels, *rank, *closest, *near;
    int64_t *target, *order, *spare;
    bool *free, *wanted;
};

static int64_t inner_of(const Plan &s) { return s.tokens - s.prefix - s.suffix; }

static int64_t panel_floats(const Plan &s) {
    return s.diverse ? s.tokens * (s.width + 2) : round_up(inner_of(s) / 2, PANEL) * s.width;
}

static int64_t row_floats(const Plan &s) { return s.diverse ? 0 : ceil_div(inner_of(s), 2) * s.width; }

static int64_t sample_floats(const Plan &s) { return round_up(row_floats(s) + panel_floats(s) + 8 * s.tokens + 2, 16); }

static Sample sample_of(const Plan &s, int64_t b) {
    Sample found;
    float *at = s.workspace + b * sample_floats(s);
    found.target = (int64_t *)at;  // first, where the memory is aligned
    found.order = found.target + s.tokens;
    found.spare = found.order + s.tokens;
    found.rank = (float *)(found.spare + s.tokens);
    found.free = (bool *)(found.rank + s.tokens);
    found.wanted = found.free + s.tokens;
    found.rows = found.rank + s.tokens + ceil_div(s.tokens, 2) + 1;
    found.panels = found.rows + row_floats(s);
    found.closest = found.panels + s.tokens * s.width;
    found.near = found.closest + s.tokens;
    return found;
}

extern "C" int64_t regraft_plan_workspace(
    int64_t batch, int64_t tokens, int64_t width, int64_t prefix, int64_t suffix, int64_t diverse) {
    Plan s = {};
    s.tokens = tokens, s.width = width, s.prefix = prefix, s.suffix = suffix, s.diverse = diverse;
    return batch * sample_floats(s);
}

constexpr uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;

// The power of two that brings a number, given by its bits, near one: squares of what is multiplied by it stay in range,
// and nothing is rounded.
static float scale_of(uint32_t bits) {
    uint32_t exponent = bits >> 23;
    exponent = 254 - (exponent < 2 ? 2 : exponent > 252 ? 252 : exponent);
    bits = exponent << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// The metric of one token, of length one or zero, into its row or column. A token that is not finite is not free.
static void compare_by(const Plan &s, const Sample &to, int64_t b, int64_t token, float *mean) {
    const float *from = s.metric + b * s.metric_strides[0] + token * s.metric_strides[2];
    int64_t place = token - s.prefix, step = s.diverse ? s.tokens : place % 2 ? PANEL : 1;
    for (int64_t d = 0; d < s.width; d++) mean[d] = from[d];
    for (int64_t h = 1; h < s.heads; h++)
        for (int64_t d = 0; d < s.width; d++) mean[d] += from[h * s.metric_strides[1] + d];
    uint32_t largest = 0;  // bits: magnitudes are ordered as these are, and what is not finite comes last
    for (int64_t d = 0; d < s.width; d++) {
        uint32_t bits;
        mean[d] /= (float)s.heads;
        memcpy(&bits, mean + d, sizeof bits);
        bits &= MAGNITUDE;
        largest = bits > largest ? bits : largest;
    }
    bool finite = largest < INFINITE;
    float square = 0, scale = scale_of(largest);
    for (int64_t d = 0; d < s.width; d++) mean[d] *= scale, square += mean[d] * mean[d];
    float length = __builtin_sqrtf(square);
    if (length == 0) length = 1;
    float *out = s.diverse ? to.panels + token
                 : step == 1 ? to.rows + place / 2 * s.width
                             : to.panels + place / 2 / PANEL * PANEL * s.width + place / 2 % PANEL;
    for (int64_t d = 0; d < s.width; d++) out[d * step] = finite ? mean[d] / length : 0;
    bool padded = s.keep && !s.keep[b * s.keep_strides[0] + token * s.keep_strides[1]];
    to.free[token] = finite && !padded;
    to.rank[token] = padded ? PADDED : finite ? NEVER : ODD;
    to.target[token] = -1;
    to.wanted[token] = false;
}

// The best column of each of a block of rows; among equals the first.
static void match_rows(const Plan &s, const Sample &to, int64_t first, float *scratch) {
    int64_t inner = inner_of(s), count = ceil_div(inner, 2), columns = inner / 2;
    int64_t rows = smaller(ROW_BLOCK, count - first);
    for (int64_t p = 0; p < columns; p += PANEL) {
        int64_t wide = smaller((int64_t)PANEL, columns - p);
        product(rows, round_up(wide, LANES), to.rows + first * s.width, s.width, to.panels + p * s.width, PANEL, s.width,
                scratch, PANEL, false);
        for (int64_t r = 0; r < rows; r++) {
            int64_t token = s.prefix + 2 * (first + r);
            if (!to.free[token]) continue;
            for (int64_t c = s.causal ? larger(first + r - p, (int64_t)0) : 0; c < wide; c++) {
                int64_t other = s.prefix + 2 * (p + c) + 1;
                if (scratch[r * PANEL + c] > to.rank[token] && to.free[other])
                    to.rank[token] = scratch[r * PANEL + c], to.target[token] = other;
            }
        }
    }
}

// The cosines of one token with all.
static void near_to(const Plan &s, const Sample &of, int64_t token) {
    for (int64_t i = 0; i < s.tokens; i++) of.near[i] = 0;
    for (int64_t d = 0; d < s.width; d++) {
        const float *row = of.panels + d * s.tokens;
        float own = row[token];
        for (int64_t i = 0; i < s.tokens; i++) of.near[i] += own * row[i];
    }
}

static void come_closer(const Plan &s, const Sample &of) {
    for (int64_t i = 0; i < s.tokens; i++) of.closest[i] = of.near[i] > of.closest[i] ? of.near[i] : of.closest[i];
}

// Tokens are taken one by one, each time the one whose closest among those taken is farthest; their number is the rank.
static void take_by_turns(const Plan &s, const Sample &of) {
    int64_t last = s.tokens - s.suffix;
    for (int64_t i = 0; i < s.tokens; i++) of.closest[i] = -FIRST;
    for (int64_t i = 0; i < (s.prefix ? s.prefix : last); i++) {  // without a prefix: how close all others are
        if (!s.prefix && !of.free[i]) continue;
        near_to(s, of, i);
        if (!s.prefix) of.near[i] = -FIRST;
        come_closer(s, of);
    }
    for (int64_t i = s.prefix; i < last; i++)
        if (of.rank[i] == PADDED) of.rank[i] = FIRST;
    for (int64_t number = 0; number < last - s.prefix; number++) {
        int64_t taken = -1;
        for (int64_t i = s.prefix; i < last; i++)
            if (of.free[i] && (taken < 0 || of.closest[i] < of.closest[taken])) taken = i;
        if (taken < 0) return;
        of.rank[taken] = (float)number, of.free[taken] = false;
        near_to(s, of, taken);
        if (number == 0 && !s.prefix)
            memcpy(of.closest, of.near, s.tokens * sizeof(float));
        else
            come_closer(s, of);
    }
}

// Tokens by falling rank, equal ones by their place: a merge sort from the bottom.
static int64_t *by_rank(const Plan &s, const Sample &of) {
    int64_t *from = of.order, *to = of.spare;
    for (int64_t i = 0; i < s.tokens; i++) from[i] = i;
    for (int64_t width = 1; width < s.tokens; width *= 2) {
        for (int64_t first = 0; first < s.tokens; first += 2 * width) {
            int64_t middle = smaller(first + width, s.tokens), last = smaller(first + 2 * width, s.tokens);
            int64_t left = first, right = middle;
            for (int64_t i = first; i < last; i++)
                to[i] = right == last || (left < middle && of.rank[from[left]] >= of.rank[from[right]]) ? from[left++]
                                                                                                      : from[right++];
        }
        int64_t *held = from;
        from = to, to = held;
    }
    return from;
}

static void choose(const Plan &s, const Sample &of, int64_t b) {
    int64_t last = s.tokens - s.suffix;
    for (int64_t i = 0; i < s.tokens; i++)
        if (i < s.prefix || i >= last) of.rank[i] = NEVER, of.target[i] = -1, of.wanted[i] = false;
    for (int64_t i = s.prefix; i < last; i++)
        if (of.target[i] >= 0) of.wanted[of.target[i]] = true;
    for (int64_t i = s.prefix; i < last && !s.diverse; i++)
        if (of.rank[i] == NEVER && !of.wanted[i]) of.rank[i] = LAST;
    const int64_t *order = by_rank(s, of);
    int64_t *kept = s.kept + b * (s.tokens - s.remove), *sources = s.sources + b * s.remove, *slots = s.slots + b * s.tokens;
    for (int64_t i = 0; i < s.tokens; i++) slots[i] = 0;
    for (int64_t i = 0; i < s.remove; i++) slots[order[i]] = -1;
    int64_t stay = 0, go = 0;
    for (int64_t i = 0; i < s.tokens; i++) {
        if (slots[i] < 0)
            sources[go++] = i;
        else
            slots[i] = stay, kept[stay++] = i;
    }
    for (int64_t i = 0; i < s.remove; i++)
        if (of.target[sources[i]] >= 0) slots[sources[i]] = slots[of.target[sources[i]]];
}

extern "C" void regraft_plan_merge(const Plan *given) {
    const Plan &s = *given;
    int64_t first = s.diverse ? 0 : s.prefix, compared = s.diverse ? s.tokens : inner_of(s);
    int64_t blocks = s.diverse ? 0 : ceil_div(ceil_div(compared, 2), ROW_BLOCK);
#pragma omp parallel
    {
        float *scratch = (float *)memalign(64, (ROW_BLOCK * PANEL + s.width) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * compared; i++)
            compare_by(s, sample_of(s, i / compared), i / compared, first + i % compared, scratch);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * blocks; i++)
            match_rows(s, sample_of(s, i / blocks), i % blocks * ROW_BLOCK, scratch);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s.batch; b++) {
            if (s.diverse) take_by_turns(s, sample_of(s, b));
            choose(s, sample_of(s, b), b);
        }
        free(scratch);
    }
}

struct Merge {
    const float *x, *sizes;  // [batch, tokens, width], [batch, tokens]; null for sizes of one
    const int64_t *kept, *sources, *slots;
    float *out, *total;  // [batch, left, width], [batch, left]
    int64_t batch, tokens, left, width, x_strides[2], size_strides[2];
};

// Rows [first, last) of one sample: x_j + sum of (s_i / s'_j) (x_i - x_j) over the tokens that come to j, in order.
static void merge_rows(const Merge &s, int64_t b, int64_t first, int64_t last) {
    int64_t gone = s.tokens - s.left, bytes = s.width * sizeof(float);
    const int64_t *kept = s.kept + b * s.left, *sources = s.sources + b * gone, *slots = s.slots + b * s.tokens;
    float *out = s.out + b * s.left * s.width, *total = s.total + b * s.left;
    auto row = [&](int64_t token) { return s.x + b * s.x_strides[0] + token * s.x_strides[1]; };
    auto size = [&](int64_t token) { return s.sizes ? s.sizes[b * s.size_strides[0] + token * s.size_strides[1]] : 1; };
    for (int64_t j = first; j < last; j++) {
        memcpy(out + j * s.width, row(kept[j]), bytes);
        total[j] = size(kept[j]);
    }
    for (int64_t i = 0; i < gone; i++) {
        int64_t j = slots[sources[i]];
        if (j >= first && j < last) total[j] += size(sources[i]);
    }
    for (int64_t i = 0; i < gone; i++) {
        int64_t j = slots[sources[i]];
        if (j < first || j >= last) continue;
        const float *coming = row(sources[i]), *staying = row(kept[j]);
        float share = size(sources[i]) / total[j], *to = out + j * s.width;
        for (int64_t d = 0; d < s.width; d++) to[d] += (coming[d] - staying[d]) * share;
    }
}

extern "C" void regraft_merge_tokens(const Merge *given) {
    const Merge &s = *given;
    int64_t blocks = ceil_div(s.left, OUT_BLOCK), tasks = s.batch * blocks;
    auto work = [&](int64_t i) {
        int64_t first = i % blocks * OUT_BLOCK;
        merge_rows(s, i / blocks, first, smaller(first + OUT_BLOCK, s.left));
    };
    if (s.batch * s.left * s.width <= WORTH_THREADS) {
        for (int64_t i = 0; i < tasks; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tasks; i++) work(i);
}

struct Log {
    const float *x;
    float *out;
    int64_t count;
};

// PyTorch's own logarithm wakes threads, for a handful of numbers.
extern "C" void regraft_log(const Log *given) {
    for (int64_t i = 0; i < given->count; i++) given->out[i] = __builtin_logf(given->x[i]);
}

struct Unmerge {
    const float *x;        // [batch, left, width]
    const int64_t *slots;  // [batch, tokens]; -1 for a row of zeros
    float *out;            // [batch, tokens, width]
    int64_t batch, tokens, width, x_strides[2];
};

extern "C" void regraft_unmerge_tokens(const Unmerge *given) {
    const Unmerge &s = *given;
    auto work = [&](int64_t i) {
        float *to = s.out + i * s.width;
        if (s.slots[i] < 0)
            memset(to, 0, s.width * sizeof(float));
        else
            memcpy(to, s.x + i / s.tokens * s.x_strides[0] + s.slots[i] * s.x_strides[1], s.width * sizeof(float));
    };
    if (s.batch * s.tokens * s.width <= WORTH_THREADS) {
        for (int64_t i = 0; i < s.batch * s.tokens; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < s.batch * s.tokens; i++) work(i);
}

struct Scan {
    const float *decay, *added, *start;  // [batch, steps, width or 1], [batch, steps, width], [batch, width]
    float *out;                          // [batch, steps + 1, width]
    int64_t batch, steps, width, decay_strides[3], added_strides[2], start_stride;
};

// h_t = decay_t h_(t-1) + added_t: some columns of one sample through all of time.
static void scan_columns(const Scan &s, int64_t b, int64_t first, int64_t last) {
    float *out = s.out + b * (s.steps + 1) * s.width;
    for (int64_t d = first; d < last; d++) out[d] = s.start[b * s.start_stride + d];
    for (int64_t t = 0; t < s.steps; t++) {
        const float *decay = s.decay + b * s.decay_strides[0] + t * s.decay_strides[1];
        const float *added = s.added + b * s.added_strides[0] + t * s.added_strides[1];
        const float *before = out + t * s.width;
        float *now = out + (t + 1) * s.width;
        if (s.decay_strides[2] == 0)
            for (int64_t d = first; d < last; d++) now[d] = decay[0] * before[d] + added[d];
        else
            for (int64_t d = first; d < last; d++) now[d] = decay[d] * before[d] + added[d];
    }
}

extern "C" void regraft_linear_scan(const Scan *given) {
    const Scan &s = *given;
    int64_t blocks = ceil_div(s.width, SCAN_BLOCK), tasks = s.batch * blocks;
    auto work = [&](int64_t i) {
        int64_t first = i % blocks * SCAN_BLOCK;
        scan_columns(s, i / blocks, first, smaller(first + SCAN_BLOCK, s.width));
    };
    if (s.batch * s.steps * s.width <= WORTH_THREADS) {
        for (int64_t i = 0; i < tasks; i++) work(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tasks; i++) work(i);
}
