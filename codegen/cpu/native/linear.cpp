// A linear layer on a weight packed into panels, with its epilogue: bias, activation, product, sum.
//
// Made for few rows (short prompts, decoding), where a product is as fast as its weight arrives.
#include "activation.h"
#include "product.h"

constexpr int64_t MOST_ROWS = 72;  // whose results of one panel stay in the first cache
constexpr int64_t MANY_FLOATS = 1 << 22;  // of x: more leave the caches before the next panel reads them again
constexpr int64_t AHEAD = 8;  // rows of an epilogue that are asked for early: its parts of rows lie too far apart to guess

struct Linear {
    const float *x, *weight;  // [rows, depth], [panels, depth, PANEL]
    const float *bias, *multiplier, *residual;  // [columns], [rows, columns] twice; null for none
    float *out;                                 // [rows, columns]
    int64_t rows, depth, columns, x_stride, multiplier_stride, residual_stride;
    int32_t activation;
    const float *next;  // the weight that is needed after this one, in panels; null where it is not known
    int64_t next_panels, next_panel;  // their number, and the numbers that each holds
};

// The epilogue but for the bias and the activation on one row, `columns` wide, written to `to`. WHOLE: of a panel.
template <bool WHOLE>
INLINE void finish_row(const float *from, const float *multiplier, const float *residual, float *to, int64_t columns) {
    for (int64_t j = 0; j < (WHOLE ? PANEL : columns); j += LANES) {
        int64_t count = WHOLE ? LANES : smaller((int64_t)LANES, columns - j);
        auto part = [&](const float *at) { return count == LANES ? load(at) : load_part(at, count); };
        vec x = load(from + j);
        if (multiplier) x *= part(multiplier + j);
        if (residual) x += part(residual + j);
        count == LANES ? store(to + j, x) : store_part(to + j, x, count);
    }
}

// The epilogue but for the bias on the results of one panel, `from` [rows, PANEL], written to `to`.
static void finish(const Linear &s, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, float *from,
                   float *to) {
    activate(from, rows * PANEL, s.activation);
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = first_row + r;
        const float *multiplier = s.multiplier ? s.multiplier + row * s.multiplier_stride + first_column : nullptr;
        const float *residual = s.residual ? s.residual + row * s.residual_stride + first_column : nullptr;
        for (int64_t j = 0; residual && j < columns; j += LINE) __builtin_prefetch(residual + AHEAD * s.residual_stride + j);
        if (columns == PANEL) finish_row<true>(from + r * PANEL, multiplier, residual, to + r * s.columns, columns);
        else finish_row<false>(from + r * PANEL, multiplier, residual, to + r * s.columns, columns);
    }
}

// Where the part of `thread` begins when `tasks` are shared out in order.
static int64_t share(int64_t tasks, int64_t thread, int64_t threads) { return tasks * thread / threads; }

extern "C" int omp_get_thread_num(), omp_get_num_threads();  // the header of some compilers is a package of its own

extern "C" int64_t regraft_panel() { return PANEL; }

extern "C" void regraft_linear(const Linear *given) {
    const Linear &s = *given;
    int64_t panels = ceil_div(s.columns, PANEL), blocks = ceil_div(s.rows, MOST_ROWS);
    // Blocks of one size: each reads the panel anew, however few its rows are.
    int64_t block = blocks ? round_up(ceil_div(s.rows, blocks), TILE_ROWS) : TILE_ROWS;
    bool epilogue = s.activation || s.multiplier || s.residual;
    // Each panel meets all rows, so that a weight comes from memory once, or each block of rows all panels.
    bool by_rows = s.rows * s.depth > MANY_FLOATS && s.rows > s.columns;
    float last[PANEL] = {};  // the last panel's bias, with zeros behind it
    if (s.bias) memcpy(last, s.bias + (panels - 1) * PANEL, (s.columns - (panels - 1) * PANEL) * sizeof(float));
#pragma omp parallel
    {
        float *scratch = (float *)memalign(64, block * PANEL * sizeof(float));
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int64_t task = share(panels * blocks, thread, threads), end = share(panels * blocks, thread + 1, threads);
        const float *next = s.next ? s.next + share(s.next_panels, thread, threads) * s.next_panel : nullptr;
        for (; task < end; task++) {
            int64_t panel = by_rows ? task % panels : task / blocks, column = panel * PANEL;
            int64_t first = (by_rows ? task / panels : task % blocks) * block;
            int64_t rows = smaller(block, s.rows - first), columns = smaller((int64_t)PANEL, s.columns - column);
            float *to = s.out + first * s.columns + column;
            bool direct = columns == PANEL && !epilogue;
            const float *weight = s.weight + panel * s.depth * PANEL;
            const float *bias = !s.bias ? nullptr : panel + 1 < panels ? s.bias + column : last;
            const float *after = nullptr;
            int64_t floats = 0;
            if (task + 1 == end)
                after = next, floats = next ? s.next_panel : 0;
            else if (first + rows == s.rows && !by_rows)
                after = weight + s.depth * PANEL, floats = s.depth * PANEL;
            product(rows, PANEL, s.x + first * s.x_stride, s.x_stride, weight, PANEL, s.depth, direct ? to : scratch,
                    direct ? s.columns : PANEL, false, bias, after, floats);
            if (!direct) finish(s, first, rows, column, columns, scratch, to);
        }
        free(scratch);
    }
}
