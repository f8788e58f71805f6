// Attention in one pass over the keys (flash attention, Dao et al. 2022; online softmax, Milakov & Gimelshein 2018).
//
// Keys are packed into panels of transposed columns, so that a block of queries meets them as a matrix product; values
// are packed into rows of whole vectors. Each task is one block of queries of one head, or, where there are heads enough
// for all threads, all blocks of the heads that share keys, which the task packs for itself and finds in its cache. Keys
// that no query of a block sees, by their spans, by their bits or because a padding mask ends before them, are never
// touched.
//
// Few queries over many keys (verified drafts, a step of decoding) read keys and values where they lie: packing them would
// cost more than the arithmetic. Heads that share keys are rows of one block then, so that keys are read once; and where
// there are few such blocks, each is several tasks on a part of the keys (flash decoding, Dao et al. 2023), whose sums
// are put together at the end. Either way keys may lie in two pieces, a cache and what is appended to it.
//
// Weights are those of a softmax, or a map of each score by itself: no maximum is kept then.
#include "attention_rows.h"
#include "few_rows.h"
#include "product.h"

extern "C" int omp_get_max_threads();  // the header of some compilers is a package of its own

// Packed keys and values of one head, in floats, that a core's own cache holds; and tasks of whole heads for each thread
// that leave none waiting for long.
constexpr int64_t OWN_FLOATS = 1 << 17, HEADS_A_THREAD = 4;

// How a site is parted into tasks: `blocks` of queries for each batch and head of keys (of several heads, where nothing
// is packed), each on `parts` parts of the keys.
struct Plan {
    bool direct;
    int64_t heads, blocks, parts;  // heads: of a block

    // Numbers that a task leaves where there are several parts: sums, the largest score, the sum of weights.
    static int64_t left(int64_t width) { return FEW_ROWS * (width + 2); }
};

static Plan plan_of(int64_t batch, int64_t heads, int64_t kv_heads, int64_t length, int64_t keys, int64_t value_dim) {
    int64_t groups = kv_heads ? heads / kv_heads : 1;
    if (length > FEW_ROWS || value_dim % LANES) return {false, 1, groups * ceil_div(length, QUERY_BLOCK), 1};
    int64_t together = smaller(groups, larger(FEW_ROWS / larger(length, (int64_t)1), (int64_t)1));
    int64_t blocks = ceil_div(groups, together), tasks = larger(batch * kv_heads * blocks, (int64_t)1);
    int64_t parts = smaller(ceil_div(ENOUGH_TASKS, tasks), larger(keys / KEY_BLOCK, (int64_t)1));
    return {true, together, blocks, parts};
}

static int64_t packed_floats(int64_t keys, int64_t head_dim, int64_t value_dim) {
    return round_up(keys, PANEL) * (head_dim + round_up(value_dim, LANES));
}

// Floats that a caller provides as workspace: packed keys and values of every batch and head, or what parts leave. Nought
// where nothing is packed, or each task packs for itself.
extern "C" int64_t regraft_attention_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t length, int64_t keys,
                                               int64_t head_dim, int64_t value_dim) {
    Plan plan = plan_of(batch, heads, kv_heads, length, keys, value_dim);
    if (plan.parts > 1) return batch * kv_heads * plan.blocks * plan.parts * Plan::left(value_dim);
    int64_t each = packed_floats(keys, head_dim, value_dim);
    bool own = each <= OWN_FLOATS && batch * kv_heads >= HEADS_A_THREAD * omp_get_max_threads();
    return plan.direct || own ? 0 : batch * kv_heads * each;
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

// Some queries that share keys and values: rows a stride apart that meet packed keys, or `held` by themselves where keys
// are met where they lie: as columns [head_dim, FEW_ROWS], or as rows of whole vectors where they are fewer than LANES.
struct Block {
    int64_t b, kv_head, rows;
    Query queries[QUERY_BLOCK];
    const float *from;
    int64_t stride;
    const float *panels, *values;  // null where nothing is packed
    float *held, *turned;          // turned: [KEY_BLOCK, FEW_ROWS] of scores
    bool few() const { return rows <= LANES; }
};

// What a block has summed up: weighted values [rows, width], the highest score and the sum of weights of each row.
struct Sums {
    float *values, *maxima, *totals;
};

// Copies the queries of a block.
static void hold_queries(const Site &s, Block &block) {
    int64_t depth = round_up(s.head_dim, LANES);
    for (int64_t r = 0; r < block.rows; r++) {
        const Query &q = block.queries[r];
        const float *from = s.query + block.b * s.query_strides[0] + q.head * s.query_strides[1] + q.place * s.query_strides[2];
        for (int64_t d = 0; d < s.head_dim; d++) block.held[block.few() ? r * depth + d : d * FEW_ROWS + r] = from[d];
        for (int64_t d = s.head_dim; d < depth && block.few(); d++) block.held[r * depth + d] = 0;
    }
    for (int64_t r = block.rows; r < round_up(block.rows, LANES) && !block.few(); r++)
        for (int64_t d = 0; d < s.head_dim; d++) block.held[d * FEW_ROWS + r] = 0;
}

// Scores of a block and `count` keys that lie together, `done` behind others.
static void score_in_place(const Site &s, const Block &block, Rows keys, int64_t done, float *scores) {
    int64_t depth = round_up(s.head_dim, LANES), across = round_up(block.rows, LANES);
    if (block.few())
        return few_scores(block.rows, block.held, depth, keys.from, keys.stride, keys.count, s.head_dim, scores + done,
                          SCORE_STRIDE);
    for (int64_t q = 0; q < across; q += PANEL)
        product(keys.count, smaller((int64_t)PANEL, across - q), keys.from, keys.stride, block.held + q, FEW_ROWS, s.head_dim,
                block.turned + q, FEW_ROWS, false);
    for (int64_t r = 0; r < block.rows; r++)
        for (int64_t j = 0; j < keys.count; j++) scores[r * SCORE_STRIDE + done + j] = block.turned[j * FEW_ROWS + r];
}

// Asks for what is added to the scores of a panel of keys: its rows lie far apart, where the processor's own guess fails.
static void fetch_mask(const Site &s, const Block &block, int64_t c) {
    if (!s.mask || s.mask_strides[3] == 0) return;
    for (const Query *q = block.queries; q < block.queries + block.rows; q++)
        for (int64_t j = 0; j < PANEL; j += LINE) __builtin_prefetch(q->mask + c + j);
}

// Scores of a block of queries and `count` keys from `c` on, which starts a panel.
static void score(const Site &s, const Block &block, int64_t c, int64_t count, float *scores) {
    for (int64_t p = 0, columns = round_up(count, LANES); block.panels && p < count; p += PANEL) {
        fetch_mask(s, block, c + p);
        product(block.rows, smaller((int64_t)PANEL, columns - p), block.from, block.stride, block.panels + (c + p) * s.head_dim,
                PANEL, s.head_dim, scores + p, SCORE_STRIDE, false);
    }
    for (int64_t done = 0; !block.panels && done < count;) {
        Rows part = keys_from(s, block.b, block.kv_head, c + done, c + count);
        score_in_place(s, block, part, done, scores);
        done += part.count;
    }
}

// Adds the values of `count` keys from `c` on to the sums, by their weights.
static void add_values(const Site &s, const Block &block, const float *weights, int64_t width, int64_t c, int64_t count,
                       float *sums, bool begun) {
    for (int64_t done = 0; done < count;) {
        Rows part = {block.values + c * width, width, count};
        if (!block.panels) part = values_from(s, block.b, block.kv_head, c + done, c + count);
        bool few = !block.panels && block.few();
        if (few) few_sums(block.rows, weights + done, SCORE_STRIDE, part.from, part.stride, part.count, width, sums, begun || done);
        for (int64_t d = 0; !few && d < width; d += PANEL)
            product(block.rows, smaller((int64_t)PANEL, width - d), weights + done, SCORE_STRIDE, part.from + d, part.stride,
                    part.count, sums + d, width, begun || done);
        done += part.count;
    }
}

// One row of scores over keys [c, c + columns) becomes weights; what was summed before is scaled to the new maximum.
static void weigh_row(const Site &s, const Query &q, float *row, int64_t c, int64_t count, bool plain, bool begun,
                      int64_t width, int64_t r, const Sums &sums) {
    int64_t columns = round_up(count, LANES);
    finish_row(s, row, q, c, count, columns, plain);
    if (s.weights != SOFTMAX) {
        if (q.bits) hide(row, columns, q.bits, c);
        sums.totals[r] += map_scores(row, columns, s.weights);
        return;
    }
    vec top = q.bits ? hide(row, columns, q.bits, c) : highest(row, columns);
    float rescale, share = weigh(row, columns, top, sums.maxima[r], plain ? s.scale : 1, rescale);
    sums.totals[r] = sums.totals[r] * rescale + share;
    float *held = sums.values + r * width;
    if (begun && rescale != 1)
        for (int64_t d = 0; d < width; d += LANES) store(held + d, load(held + d) * splat(rescale));
}

// One block of queries over some keys, the first of all (`first`) with the sinks.
static void attend_block(const Site &s, const Block &block, Range keys, bool first, int64_t width, float *scores,
                         const Sums &sums) {
    bool plain = s.weights == SOFTMAX && !s.mask && !s.slopes && s.softcap == 0 && s.scale > 0, begun = false;
    Range ranges[MOST_SPANS];
    int64_t count_ranges = find_ranges(s, block.queries, block.rows, keys, ranges);
    for (int64_t r = 0; r < block.rows; r++) {
        sums.maxima[r] = first ? block.queries[r].sink : -INFINITY;
        sums.totals[r] = sums.maxima[r] == -INFINITY ? 0 : 1;
    }
    for (const Range *range = ranges; range < ranges + count_ranges; range++)
        for (int64_t next = range->first; next < range->last;) {
            Range part = {next, smaller(next + KEY_BLOCK, range->last)};
            next = part.last;
            if (s.bits) part = first_run(block.queries, block.rows, part);
            if (part.first >= part.last) continue;
            next = round_up(part.last, PANEL);
            int64_t c = part.first, count = part.last - c;
            score(s, block, c, count, scores);
            for (int64_t r = 0; r < block.rows; r++)
                weigh_row(s, block.queries[r], scores + r * SCORE_STRIDE, c, count, plain, begun, width, r, sums);
            add_values(s, block, scores, width, c, count, sums.values, begun);
            begun = true;
        }
    if (!begun) memset(sums.values, 0, block.rows * width * sizeof(float));
}

// The rows of a block become its output.
static void finish_block(const Site &s, const Block &block, int64_t width, const Sums &sums) {
    for (int64_t r = 0; r < block.rows; r++) {
        const Query &q = block.queries[r];
        float *out = s.out + block.b * s.out_strides[0] + q.head * s.out_strides[1] + q.place * s.out_strides[2];
        if (s.lse) s.lse[(block.b * s.heads + q.head) * s.length + q.place] = sums.maxima[r] + __builtin_logf(sums.totals[r]);
        if (width) finish_output(s, block.b, block.kv_head, sums.values + r * width, sums.totals[r], sums.maxima[r], out);
    }
}

// What a task on a part of the keys leaves in the workspace.
static Sums left_by(const Site &s, int64_t task) {
    int64_t width = round_up(s.value_dim, LANES);
    float *place = s.workspace + task * Plan::left(width);
    return {place, place + FEW_ROWS * width, place + FEW_ROWS * (width + 1)};
}

// Adds what another part of the keys gave to a block's sums.
static void join(const Site &s, int64_t rows, int64_t width, const Sums &sums, const Sums &more) {
    for (int64_t r = 0; r < rows; r++) {
        float top = __builtin_fmaxf(sums.maxima[r], more.maxima[r]), own = 1, others = 1;
        if (s.weights == SOFTMAX && sums.maxima[r] != top) own = __builtin_exp2f((sums.maxima[r] - top) * LOG2_E);
        if (s.weights == SOFTMAX && more.maxima[r] != top) others = __builtin_exp2f((more.maxima[r] - top) * LOG2_E);
        sums.maxima[r] = top, sums.totals[r] = sums.totals[r] * own + more.totals[r] * others;
        for (int64_t d = r * width; d < (r + 1) * width; d += LANES)
            store(sums.values + d, load(sums.values + d) * splat(own) + load(more.values + d) * splat(others));
    }
}

// Behind the last key of a batch that a mask shared by its heads and rows leaves; all keys for any other mask.
static int64_t keys_left(const Site &s, int64_t b) {
    int64_t end = s.keys;
    if (s.mask && s.mask_strides[1] == 0 && s.mask_strides[2] == 0 && s.mask_strides[3] == 1)
        while (end > 0 && s.mask[b * s.mask_strides[0] + end - 1] == -INFINITY) end--;
    return end;
}

// A block of a plan by its number: of one head, or of several where nothing is packed.
static void find_block(const Site &s, const Plan &plan, int64_t number, Block &block) {
    int64_t groups = s.heads / s.kv_heads, inside = number % plan.blocks, each = plan.blocks / groups;
    block.b = number / plan.blocks / s.kv_heads, block.kv_head = number / plan.blocks % s.kv_heads;
    int64_t h = block.kv_head * groups + (plan.direct ? inside * plan.heads : inside / each);
    int64_t last = smaller(h + plan.heads, (block.kv_head + 1) * groups);
    // The last blocks of a causal site have the most keys: they come first, so that no thread waits for one.
    int64_t start = plan.direct ? 0 : (each - 1 - inside % each) * QUERY_BLOCK;
    block.from = s.query + block.b * s.query_strides[0] + h * s.query_strides[1] + start * s.query_strides[2];
    block.stride = s.query_strides[2], block.rows = 0;
    for (; h < last; h++)
        for (int64_t r = start; r < smaller(start + QUERY_BLOCK, s.length); r++)
            block.queries[block.rows++] = query_at(s, block.b, h, r);
}

// A panel of keys from `first` on, and its values, among the packed ones of one batch and head.
static void pack(const Site &s, int64_t b, int64_t kv_head, int64_t first, float *packed) {
    pack_keys(s, b, kv_head, first, packed + first * s.head_dim);
    pack_values(s, b, kv_head, first, packed + round_up(s.keys, PANEL) * s.head_dim, round_up(s.value_dim, LANES));
}

static void pack_all(const Site &s, int64_t each) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t i = 0; i < s.batch * s.kv_heads; i++)
        for (int64_t first = 0; first < round_up(s.keys, PANEL); first += PANEL)
            pack(s, i / s.kv_heads, i % s.kv_heads, first, s.workspace + i * each);
}

// Where a thread works: a block, its scores and sums, and packed keys and values that are its own.
struct Desk {
    Block block;
    float *scores, *packed;
    Sums sums;

    Desk(const Site &s, const Plan &plan, int64_t own) {
        int64_t width = round_up(s.value_dim, LANES), rows = plan.direct ? FEW_ROWS : QUERY_BLOCK;
        int64_t held = plan.direct ? FEW_ROWS * round_up(s.head_dim, LANES) : 0, turned = plan.direct ? FEW_ROWS * KEY_BLOCK : 0;
        int64_t floats = rows * (SCORE_STRIDE + width + 2);
        scores = (float *)memalign(64, (floats + held + turned + own) * sizeof(float));
        float *values = scores + rows * SCORE_STRIDE;
        sums = {values, values + rows * width, values + rows * (width + 1)};
        block.held = scores + floats, block.turned = block.held + held, packed = block.turned + turned;
    }
    ~Desk() { free(scores); }
};

// One block of queries on one part of the keys.
static void attend_task(const Site &s, const Plan &plan, int64_t task, const float *packed, Desk &desk, const Sums &sums) {
    int64_t step = round_up(ceil_div(s.keys, plan.parts), PANEL), part = task % plan.parts;
    find_block(s, plan, task / plan.parts, desk.block);
    desk.block.panels = packed, desk.block.values = packed ? packed + round_up(s.keys, PANEL) * s.head_dim : nullptr;
    if (plan.direct) hold_queries(s, desk.block);
    int64_t end = keys_left(s, desk.block.b), width = round_up(s.value_dim, LANES);
    Range keys = {smaller(part * step, end), smaller((part + 1) * step, end)};
    attend_block(s, desk.block, keys, part == 0, width, desk.scores, sums);
    if (plan.parts == 1) finish_block(s, desk.block, width, sums);
}

// Blocks whose keys were parted: what the parts left is put together.
static void join_parts(const Site &s, const Plan &plan, int64_t number, Desk &desk) {
    int64_t width = round_up(s.value_dim, LANES);
    Sums sums = left_by(s, number * plan.parts);
    find_block(s, plan, number, desk.block);
    for (int64_t part = 1; part < plan.parts; part++)
        join(s, desk.block.rows, width, sums, left_by(s, number * plan.parts + part));
    finish_block(s, desk.block, width, sums);
}

extern "C" void regraft_attention(const Site *given) {
    const Site &s = *given;
    if (s.batch == 0 || s.heads == 0 || s.length == 0 || (s.value_dim == 0 && !s.lse)) return;
    Plan plan = plan_of(s.batch, s.heads, s.kv_heads, s.length, s.keys, s.value_dim);
    int64_t each = packed_floats(s.keys, s.head_dim, s.value_dim), heads = s.batch * s.kv_heads;
    bool own = !plan.direct && !s.workspace;
#pragma omp parallel
    {
        Desk desk(s, plan, own ? each : 0);
        if (!plan.direct && !own) pack_all(s, each);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t head = 0; head < (own ? heads : 0); head++) {
            for (int64_t first = 0; first < s.keys; first += PANEL) pack(s, head / s.kv_heads, head % s.kv_heads, first, desk.packed);
            for (int64_t inside = 0; inside < plan.blocks; inside++)
                attend_task(s, plan, head * plan.blocks + inside, desk.packed, desk, desk.sums);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < (own ? 0 : heads * plan.blocks * plan.parts); task++) {
            const float *packed = plan.direct ? nullptr : s.workspace + task / plan.blocks * each;
            attend_task(s, plan, task, packed, desk, plan.parts > 1 ? left_by(s, task) : desk.sums);
        }
        if (plan.parts > 1) {  // threads wait for each other only where parts are to be joined
#pragma omp barrier
        }
#pragma omp for schedule(static) nowait
        for (int64_t number = 0; number < (plan.parts > 1 ? heads * plan.blocks : 0); number++)
            join_parts(s, plan, number, desk);
    }
}
