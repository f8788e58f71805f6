// A mask as one bit for each score, evaluated from what it is said of: spans of keys, numbers that a row and a key
// share, tables. Bits are made once a call for all layers that share a mask; attention reads them instead of a tensor of
// the size of the scores.
//
// A word of 32 bits belongs to one lane: bit t of lane l of a row's word w is key (32 w + t) * LANES + l, so that a
// vector of scores meets its bits by one shift.
#include "vector.h"

enum Kinds { SPANS = 0, SAME = 1, TABLE = 2, NOT = 3, AND = 4, OR = 5 };

// One step of a predicate in postfix order. Strides are those of batch, head and row.
struct Step {
    const int64_t *first, *second;  // starts and ends of spans; numbers of rows and those of keys
    const uint8_t *table;           // not nought where a key is seen
    int64_t kind, count;            // of spans
    int64_t strides[3], key_stride; // key_stride: of the numbers of keys, from batch to batch
};

struct Mask {
    const Step *steps;
    int32_t *bits;
    int64_t count, depth;  // of steps; the most words that the steps have at hand
    int64_t batch, heads, rows, keys;
};

constexpr int64_t WORD = 32;

typedef int64_t long_vec __attribute__((vector_size(LANES * 8)));
typedef int64_t unaligned_long_vec __attribute__((vector_size(LANES * 8), aligned(8)));
typedef uint8_t byte_vec __attribute__((vector_size(LANES)));
typedef uint8_t unaligned_byte_vec __attribute__((vector_size(LANES), aligned(1)));

// Int32 of a row's mask, a vector of words for each WORD * LANES keys.
extern "C" int64_t regraft_mask_words(int64_t keys) { return ceil_div(keys, WORD * LANES) * LANES; }

// `seen(place, count)` says of LANES keys from `place` on, `count` of which are there, which are seen.
template <typename Seen>
INLINE int_vec gather(int64_t first, int64_t keys, Seen seen) {
    int_vec word = {};
    for (int64_t t = 0; t < WORD; t++) {
        int64_t place = first + t * LANES;
        if (place >= keys) break;
        word |= seen(place, smaller((int64_t)LANES, keys - place)) & (int32_t)(1u << t);
    }
    return word;
}

static int_vec spans_word(const Step &s, int64_t at, int64_t first, int64_t keys) {
    const int64_t *starts = s.first + at, *ends = s.second + at;
    int_vec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return gather(first, keys, [&](int64_t place, int64_t) {
        int_vec key = lane + (int32_t)place, seen = {};
        for (int64_t i = 0; i < s.count; i++) seen |= (key >= (int32_t)starts[i]) & (key < (int32_t)ends[i]);
        return seen;
    });
}

static int_vec same_word(int64_t number, const int64_t *numbers, int64_t first, int64_t keys) {
    return gather(first, keys, [&](int64_t place, int64_t count) {
        int64_t held[LANES];
        const int64_t *from = numbers + place;
        if (count < LANES) from = (const int64_t *)memcpy(held, from, count * sizeof(int64_t));
        return __builtin_convertvector(*(const unaligned_long_vec *)from == number, int_vec);
    });
}

// Eight times LANES truth values, a byte each, are first the bits of one byte for each lane: vectors of bytes are shorter.
static int_vec table_word(const uint8_t *table, int64_t first, int64_t keys) {
    constexpr int EACH = 8;
    int_vec word = {};
    for (int64_t part = 0; part < WORD / EACH; part++) {
        byte_vec bits = {};
        const uint8_t *from = table + first + part * EACH * LANES;
        int64_t left = keys - first - part * EACH * LANES;
        if (left >= EACH * LANES)
            _Pragma("GCC unroll 8") for (int t = 0; t < EACH; t++)
                bits |= (byte_vec)(*(const unaligned_byte_vec *)(from + t * LANES) != 0) & (uint8_t)(1 << t);
        else
            for (int64_t i = 0; i < left; i++) bits[i % LANES] |= (from[i] != 0) << i / LANES;
        word |= __builtin_convertvector(bits, int_vec) << (int32_t)(part * EACH);
    }
    return word;
}

// The bits of one row for WORD * LANES keys from `first` on; `stack` has room for all that is at hand.
static int_vec evaluate(const Mask &m, int64_t b, int64_t h, int64_t r, int64_t first, int_vec *stack) {
    int_vec *top = stack - 1;
    for (const Step *s = m.steps; s < m.steps + m.count; s++) {
        int64_t at = b * s->strides[0] + h * s->strides[1] + r * s->strides[2];
        switch (s->kind) {
        case SPANS: *++top = spans_word(*s, at, first, m.keys); break;
        case SAME: *++top = same_word(s->first[at], s->second + b * s->key_stride, first, m.keys); break;
        case TABLE: *++top = table_word(s->table + at, first, m.keys); break;
        case NOT: *top = ~*top; break;
        case AND: top--, *top &= top[1]; break;
        case OR: top--, *top |= top[1]; break;
        }
    }
    return *top;
}

extern "C" void regraft_mask(const Mask *given) {
    const Mask &m = *given;
    int64_t words = regraft_mask_words(m.keys);
#pragma omp parallel
    {
        int_vec *stack = (int_vec *)memalign(64, m.depth * sizeof(int_vec));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < m.batch * m.heads * m.rows; task++) {
            int64_t b = task / (m.heads * m.rows), h = task / m.rows % m.heads, r = task % m.rows;
            for (int64_t w = 0; w < words; w += LANES) {
                int_vec word = evaluate(m, b, h, r, w * WORD, stack);
                for (int64_t key = m.keys; key < round_up(m.keys, LANES) && key / LANES / WORD == w / LANES; key++)
                    word[key % LANES] &= ~(int32_t)(1u << key / LANES % WORD);  // none is behind the last
                memcpy(m.bits + task * words + w, &word, sizeof word);
            }
        }
        free(stack);
    }
}
