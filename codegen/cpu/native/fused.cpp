// Row programs: what element-wise calls and reductions of rows compute together, a block of rows at a time, so that what
// one hands to the next stays in the first cache. A program is data; an instruction works on whole blocks, so that
// reading it costs little.
#include "activation.h"

constexpr int64_t WORTH_THREADS = 1 << 15;  // elements
constexpr int64_t BLOCK = 1024;             // elements of a register, unless one row is longer
constexpr int MOST_OPERANDS = 16, MOST_AXES = 4;

// In the order of `WORDS` in fused.py.
enum class Word : int32_t {
    LOAD, STORE, FILL, MOVE, EXPAND, SUM, MEAN, AMAX, AMIN,
    COPY, NEG, ABS, RECIPROCAL, SQRT, RSQRT, FLOOR, CEIL, EXP, LOG, SIN, COS, ERF, TANH, SIGMOID, RELU, SILU, GELU,
    GELU_TANH, EXPM1, LOG1P, NOT,
    ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, EQ, NE, LT, LE, GT, GE, AND, OR, XOR,
    WHERE,
};

// `to`, `a`, `b`, `c` are registers, -1 for none; `width` is the columns of `to`, or of what STORE reads. LOAD reads
// `operand`, STORE writes it. MOVE copies every `step`-th column of `a`, which has `columns`, `from_width` of them, from
// `first` on to every `to_step`-th of `to` from `at` on. Where a binary operator has no `b`, it is `number`.
struct Instruction {
    Word word;
    int32_t to, a, b, c, operand, width, columns, from_width, first, step, at, to_step;
    float number;
};

struct Fused {
    void *operands[MOST_OPERANDS];  // tensors read and written
    const Instruction *program;
    int64_t instructions, registers, columns, whole;
    int64_t axes, sizes[MOST_AXES];
    int64_t kinds[MOST_OPERANDS];                     // 0: float, 1: bool
    int64_t strides[MOST_OPERANDS][MOST_AXES + 1];    // of the axes, then of the columns
};

// Rows [first, first + rows) and columns [column, column + columns) of what all registers stand for.
struct Block {
    int64_t first, rows, column, columns;
};

INLINE vec truth(int_vec x) { return x ? splat(1.0f) : splat(0.0f); }
// NaN wins, as in PyTorch.
INLINE vec maximum(vec a, vec b) { return (a > b) | (a != a) ? a : b; }
INLINE vec minimum(vec a, vec b) { return (a < b) | (a != a) ? a : b; }

// e^x to 1e-7, from zero to infinity: the exponent's part of ln 2 is taken off in two steps, so that large x lose nothing.
INLINE vec exp_of(vec x) {
    const vec magic = splat(12582912.0f);
    vec kept = smaller(larger(x, splat(-87.3f)), splat(88.7f));
    vec n = (kept * splat(LOG2_E) + magic) - magic;
    vec r = kept - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vec found = exp2_of(r * splat(LOG2_E)) * exp2_of(smaller(n, splat(127.0f)));
    found = n > splat(127.0f) ? found * splat(2.0f) : found;
    found = x < splat(-87.3f) ? splat(0.0f) : (x > splat(88.72284f) ? splat(INFINITY) : found);
    return x == x ? found : x;
}

INLINE vec sigmoid_of(vec x) { return splat(1.0f) / (splat(1.0f) + exp_of(-x)); }

template <float (*function)(float)> INLINE vec each_of(vec x) {
    vec found;
    for (int i = 0; i < LANES; i++) found[i] = function(x[i]);
    return found;
}
static float log_one(float x) { return __builtin_logf(x); }
static float sin_one(float x) { return __builtin_sinf(x); }
static float cos_one(float x) { return __builtin_cosf(x); }
static float expm1_one(float x) { return __builtin_expm1f(x); }
static float log1p_one(float x) { return __builtin_log1pf(x); }
static float floor_one(float x) { return __builtin_floorf(x); }
static float ceil_one(float x) { return __builtin_ceilf(x); }
static float sqrt_one(float x) { return __builtin_sqrtf(x); }

// to[i] = function(i) for a whole register.
template <typename Function> static void fill(float *to, int64_t count, Function function) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, function([&](const float *x) { return load(x + i); }));
    int64_t rest = count - i;
    if (rest) store_part(to + i, function([&](const float *x) { return load_part(x + i, rest); }), rest);
}

template <typename Function> static void unary(float *to, const float *a, int64_t count, Function function) {
    fill(to, count, [&](auto part) { return function(part(a)); });
}

template <typename Function>
static void binary(float *to, const float *a, const float *b, float number, int64_t count, Function function) {
    if (b)
        fill(to, count, [&](auto part) { return function(part(a), part(b)); });
    else
        fill(to, count, [&](auto part) { return function(part(a), splat(number)); });
}

template <typename Function>
static void reduce(float *to, const float *a, int64_t rows, int64_t width, float start, Function function) {
    int64_t r = 0;
    if (width < 2 * LANES)  // short rows side by side, one a lane
        for (; r + LANES <= rows; r += LANES, a += LANES * width) {
            vec held = splat(start);
            for (int64_t i = 0; i < width; i++) {
                vec next;
                for (int lane = 0; lane < LANES; lane++) next[lane] = a[lane * width + i];
                held = function(held, next);
            }
            store(to + r, held);
        }
    for (; r < rows; r++, a += width) {
        vec held = splat(start);
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) held = function(held, load(a + i));
        float found[LANES];
        store(found, held);
        vec whole = splat(found[0]);
        for (int lane = 1; lane < LANES; lane++) whole = function(whole, splat(found[lane]));
        for (; i < width; i++) whole = function(whole, splat(a[i]));
        to[r] = whole[0];
    }
}

// The columns of an instruction's register. A program without reductions and moves of columns runs on parts of rows.
static int64_t width_of(const Fused &s, const Instruction &at, const Block &block) {
    return at.width == 1 ? 1 : s.whole ? at.width : block.columns;
}

// Calls with (rows before, rows, place of the first) for each run of rows that lie one stride of the last axis apart.
template <typename Work> static void runs(const Fused &s, int64_t operand, const Block &block, Work work) {
    const int64_t *strides = s.strides[operand];
    int64_t inner = s.axes ? s.sizes[s.axes - 1] : 1;
    for (int64_t done = 0; done < block.rows;) {
        int64_t row = block.first + done, place = 0;
        int64_t count = smaller(inner - row % inner, block.rows - done);
        for (int64_t axis = s.axes - 1; axis >= 0; axis--) {
            place += row % s.sizes[axis] * strides[axis];
            row /= s.sizes[axis];
        }
        work(done, count, place);
        done += count;
    }
}

static void copy_rows(void *to, int64_t to_step, const void *from, int64_t from_step, int64_t count, int64_t width) {
    if (to_step == width && from_step == width) {
        memcpy(to, from, count * width * sizeof(float));
        return;
    }
    for (int64_t r = 0; r < count; r++)
        memcpy((float *)to + r * to_step, (const float *)from + r * from_step, width * sizeof(float));
}

static int64_t row_step(const Fused &s, int64_t operand) { return s.axes ? s.strides[operand][s.axes - 1] : 0; }

template <typename Kind>
static const float *load_rows(const Fused &s, const Instruction &at, const Block &block, float *to) {
    const Kind *from = (const Kind *)s.operands[at.operand];
    int64_t step = row_step(s, at.operand), across = s.strides[at.operand][MOST_AXES], width = width_of(s, at, block);
    int64_t column = at.width == 1 ? 0 : block.column;
    const float *direct = nullptr;
    runs(s, at.operand, block, [&](int64_t done, int64_t count, int64_t place) {
        const Kind *rows = from + place + column * across;
        float *out = to + done * width;
        bool dense = (across == 1 || width == 1) && (step == width || count == 1);  // one after the other
        if constexpr (sizeof(Kind) == sizeof(float)) {
            if (dense && count == block.rows) {
                direct = (const float *)rows;
                return;
            }
            if (dense || (across == 1 && width > 1)) {
                copy_rows(out, width, rows, step, count, width);
                return;
            }
        }
        if (width == 1)
            for (int64_t r = 0; r < count; r++) out[r] = (float)rows[r * step];
        else if (across == 1)
            for (int64_t r = 0; r < count; r++)
                for (int64_t c = 0; c < width; c++) out[r * width + c] = (float)rows[r * step + c];
        else if (step == 1)  // rows lie side by side: read along them
            for (int64_t c = 0; c < width; c++)
                for (int64_t r = 0; r < count; r++) out[r * width + c] = (float)rows[r + c * across];
        else
            for (int64_t r = 0; r < count; r++)
                for (int64_t c = 0; c < width; c++) out[r * width + c] = (float)rows[r * step + c * across];
    });
    return direct ? direct : to;
}

template <typename Kind>
static void store_rows(const Fused &s, const Instruction &at, const Block &block, const float *from) {
    Kind *to = (Kind *)s.operands[at.operand];
    int64_t step = row_step(s, at.operand), across = s.strides[at.operand][MOST_AXES], width = width_of(s, at, block);
    int64_t column = at.width == 1 ? 0 : block.column;
    runs(s, at.operand, block, [&](int64_t done, int64_t count, int64_t place) {
        Kind *rows = to + place + column * across;
        const float *in = from + done * width;
        if constexpr (sizeof(Kind) == sizeof(float)) {
            if ((across == 1 && width > 1) || (width == 1 && step == 1)) {
                copy_rows(rows, step, in, width, count, width);
                return;
            }
        }
        for (int64_t r = 0; r < count; r++)
            for (int64_t c = 0; c < width; c++) rows[r * step + c * across] = (Kind)in[r * width + c];
    });
}

static void move(const Instruction &at, int64_t rows, float *to, const float *from) {
    for (int64_t r = 0; r < rows; r++) {
        float *out = to + r * at.width + at.at;
        const float *in = from + r * at.columns + at.first;
        if (at.step == 1 && at.to_step == 1)
            memcpy(out, in, at.from_width * sizeof(float));
        else
            for (int64_t c = 0; c < at.from_width; c++) out[c * at.to_step] = in[c * at.step];
    }
}

static void run_block(const Fused &s, const Block &block, float *const *own, const float **held) {
    for (const Instruction *p = s.program; p < s.program + s.instructions; p++) {
        const Instruction &at = *p;
        int64_t width = width_of(s, at, block), count = block.rows * width;
        float *to = at.to < 0 ? nullptr : own[at.to];
        const float *a = at.a < 0 ? nullptr : held[at.a], *b = at.b < 0 ? nullptr : held[at.b];
        const float *c = at.c < 0 ? nullptr : held[at.c];
        float n = at.number;
        switch (at.word) {
        case Word::LOAD: held[at.to] = s.kinds[at.operand] ? load_rows<uint8_t>(s, at, block, to) : load_rows<float>(s, at, block, to); continue;
        case Word::STORE: s.kinds[at.operand] ? store_rows<uint8_t>(s, at, block, a) : store_rows<float>(s, at, block, a); continue;
        case Word::FILL: fill(to, count, [&](auto) { return splat(n); }); break;
        case Word::MOVE: move(at, block.rows, to, a); break;
        case Word::EXPAND:  // whole vectors: what is too much is written over by the next row, or lies behind the register
            for (int64_t r = 0; r < block.rows; r++)
                for (int64_t i = 0; i < width; i += LANES) store(to + r * width + i, splat(a[r]));
            break;
        case Word::SUM: reduce(to, a, block.rows, at.from_width, 0, [](vec x, vec y) { return x + y; }); break;
        case Word::MEAN:
            reduce(to, a, block.rows, at.from_width, 0, [](vec x, vec y) { return x + y; });
            for (int64_t r = 0; r < block.rows; r++) to[r] /= (float)at.from_width;
            break;
        case Word::AMAX: reduce(to, a, block.rows, at.from_width, -INFINITY, maximum); break;
        case Word::AMIN: reduce(to, a, block.rows, at.from_width, INFINITY, minimum); break;
        case Word::COPY: unary(to, a, count, [](vec x) { return x; }); break;
        case Word::NEG: unary(to, a, count, [](vec x) { return -x; }); break;
        case Word::ABS: unary(to, a, count, [](vec x) { return (vec)((int_vec)x & 0x7fffffff); }); break;
        case Word::RECIPROCAL: unary(to, a, count, [](vec x) { return splat(1.0f) / x; }); break;
        case Word::SQRT: unary(to, a, count, each_of<sqrt_one>); break;
        case Word::RSQRT: unary(to, a, count, [](vec x) { return splat(1.0f) / each_of<sqrt_one>(x); }); break;
        case Word::FLOOR: unary(to, a, count, each_of<floor_one>); break;
        case Word::CEIL: unary(to, a, count, each_of<ceil_one>); break;
        case Word::EXP: unary(to, a, count, exp_of); break;
        case Word::LOG: unary(to, a, count, each_of<log_one>); break;
        case Word::SIN: unary(to, a, count, each_of<sin_one>); break;
        case Word::COS: unary(to, a, count, each_of<cos_one>); break;
        case Word::ERF: unary(to, a, count, erf_of); break;
        case Word::TANH: unary(to, a, count, tanh_of); break;
        case Word::SIGMOID: unary(to, a, count, sigmoid_of); break;
        case Word::RELU: unary(to, a, count, [](vec x) { return activated(x, RELU); }); break;
        case Word::SILU: unary(to, a, count, silu); break;
        case Word::GELU: unary(to, a, count, [](vec x) { return activated(x, GELU); }); break;
        case Word::GELU_TANH: unary(to, a, count, [](vec x) { return activated(x, GELU_TANH); }); break;
        case Word::EXPM1: unary(to, a, count, each_of<expm1_one>); break;
        case Word::LOG1P: unary(to, a, count, each_of<log1p_one>); break;
        case Word::NOT: unary(to, a, count, [](vec x) { return truth(x == splat(0.0f)); }); break;
        case Word::ADD: binary(to, a, b, n, count, [](vec x, vec y) { return x + y; }); break;
        case Word::SUB: binary(to, a, b, n, count, [](vec x, vec y) { return x - y; }); break;
        case Word::MUL: binary(to, a, b, n, count, [](vec x, vec y) { return x * y; }); break;
        case Word::DIV: binary(to, a, b, n, count, [](vec x, vec y) { return x / y; }); break;
        case Word::MAXIMUM: binary(to, a, b, n, count, maximum); break;
        case Word::MINIMUM: binary(to, a, b, n, count, minimum); break;
        case Word::EQ: binary(to, a, b, n, count, [](vec x, vec y) { return truth(x == y); }); break;
        case Word::NE: binary(to, a, b, n, count, [](vec x, vec y) { return truth(x != y); }); break;
        case Word::LT: binary(to, a, b, n, count, [](vec x, vec y) { return truth(x < y); }); break;
        case Word::LE: binary(to, a, b, n, count, [](vec x, vec y) { return truth(x <= y); }); break;
        case Word::GT: binary(to, a, b, n, count, [](vec x, vec y) { return truth(x > y); }); break;
        case Word::GE: binary(to, a, b, n, count, [](vec x, vec y) { return truth(x >= y); }); break;
        case Word::AND: binary(to, a, b, n, count, [](vec x, vec y) { return truth((x != splat(0.0f)) & (y != splat(0.0f))); }); break;
        case Word::OR: binary(to, a, b, n, count, [](vec x, vec y) { return truth((x != splat(0.0f)) | (y != splat(0.0f))); }); break;
        case Word::XOR: binary(to, a, b, n, count, [](vec x, vec y) { return truth((x != splat(0.0f)) ^ (y != splat(0.0f))); }); break;
        case Word::WHERE: fill(to, count, [&](auto part) { return part(a) != splat(0.0f) ? part(b) : part(c); }); break;
        }
        held[at.to] = to;
    }
}

extern "C" void regraft_fused(const Fused *given) {
    const Fused &s = *given;
    int64_t rows = 1;
    for (int64_t axis = 0; axis < s.axes; axis++) rows *= s.sizes[axis];
    int64_t wide = s.whole ? s.columns : smaller(s.columns, BLOCK), tall = larger(BLOCK / wide, (int64_t)1);
    int64_t across = ceil_div(s.columns, wide), tasks = ceil_div(rows, tall) * across;
    int64_t size = round_up(tall * wide, 16) + LANES;
    auto part = [&](int64_t first, int64_t last) {
        float *memory = (float *)memalign(64, s.registers * size * sizeof(float));
        float *own[s.registers];
        const float *held[s.registers];
        for (int64_t i = 0; i < s.registers; i++) own[i] = memory + i * size;
        for (int64_t task = first; task < last; task++) {
            int64_t row = task / across * tall, column = task % across * wide;
            run_block(s, {row, smaller(tall, rows - row), column, smaller(wide, s.columns - column)}, own, held);
        }
        free(memory);
    };
    if (rows * s.columns * s.instructions <= WORTH_THREADS * 4) return part(0, tasks);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < smaller(tasks, (int64_t)64); i++) {
        int64_t shares = smaller(tasks, (int64_t)64);
        part(tasks * i / shares, tasks * (i + 1) / shares);
    }
}
