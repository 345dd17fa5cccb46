/* What PyTorch has no quick operator for on a CPU: attention within each of many short texts, thin
 * products of many clients' own matrices, and an encoder layer whose parts find in cache what the
 * part before has made.
 *
 * compiled.py compiles this once for each type of number: float, or with -DBFLOAT16 bfloat16, in which
 * numbers are kept while all arithmetic is float's. What a text or a client gets depends on nothing
 * but itself. GCC's vector extensions, which Clang has too, stand for the registers.
 *
 * Legend: H heads; d a head's width and D the same in whole registers; L tokens of a text and S
 * room for as many; n clients.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Numbers in a register, and the rows of a product that are summed at once. */
#ifdef __AVX512F__
#define LANES 16
#define TALL 12
#else
#define LANES 8
#define TALL 6
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define PARALLEL _Pragma("omp parallel num_threads(threads) if (threads > 1)")
#define SHARED _Pragma("omp for schedule(dynamic, 4)")
#define EACH _Pragma("omp for schedule(dynamic)")

#ifdef BFLOAT16
typedef uint16_t number;
typedef uint16_t stored __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec load(const number *from) {
    return (vec)(__builtin_convertvector(*(const stored *)from, bits) << 16);
}

INLINE void store(number *to, vec x) {
    bits rounded = (bits)x + 0x7fff + (((bits)x >> 16) & 1); /* to the nearest, ties to even */
    *(stored *)to = __builtin_convertvector(rounded >> 16, stored);
}
#else
typedef float number;

INLINE vec load(const number *from) { return *(const vec *)from; }

INLINE void store(number *to, vec x) { *(vec *)to = x; }
#endif

/* The same for the first few lanes. */
INLINE vec load_some(const number *from, long count) {
    number all[LANES] = {0};
    memcpy(all, from, count * sizeof(number));
    return load(all);
}

INLINE void store_some(number *to, vec x, long count) {
    number all[LANES];
    store(all, x);
    memcpy(to, all, count * sizeof(number));
}

INLINE long whole(long count) { return (count + LANES - 1) / LANES * LANES; }

/* How far apart rows of so many numbers lie: a multiple of a power of two would leave them few places
 * in cache. */
INLINE long room_for(long count) {
    long S = whole(count);
    return S % 256 ? S : S + LANES;
}

INLINE long smaller(long a, long b) { return a < b ? a : b; }

INLINE long larger(long a, long b) { return a > b ? a : b; }

INLINE vec choose(ints where, vec a, vec b) { return (vec)(((ints)a & where) | ((ints)b & ~where)); }

INLINE vec maximum(vec a, vec b) { return choose(a > b, a, b); }

/* e^x for x <= 0, to the last bit or two: Cody and Waite's reduction, and Cephes' polynomial. What is
 * not a number stays so: a training that diverges has to be seen to. */
INLINE vec exponential(vec x) {
    x = choose(x < -87.0f, (vec){} - 87.0f, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: the integer is in the low bits */
    vec power = shifted - 12582912.0f;
    vec r = x - power * 0.693359375f + power * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((ints)p + ((ints)shifted << 23));
}

/* A matrix whose rows and columns are so far apart. */
struct matrix {
    float *at;
    long row, column;
};

/* A tile of a product in registers: `tall` rows of C, `wide` registers each. It starts from `first`, if
 * there is one: an array like C, or of which each row is the same where `row_first` is 0. */
INLINE void tile(int tall, int wide, long K, struct matrix A, const float *B, long row_B, float *C,
                 long row_C, const float *first, long row_first) {
    vec sum[TALL][3] = {};
    if (first)
        for (int i = 0; i < tall; i++)
            for (int j = 0; j < wide; j++)
                sum[i][j] = *(const vec *)(first + i * row_first + j * LANES);
    for (long k = 0; k < K; k++)
        for (int i = 0; i < tall; i++)
            for (int j = 0; j < wide; j++)
                sum[i][j] += A.at[i * A.row + k * A.column] * *(const vec *)(B + k * row_B + j * LANES);
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) *(vec *)(C + i * row_C + j * LANES) = sum[i][j];
}

/* Tiles below each other, about equally tall: in short ones each sum waits for itself. */
INLINE void tiles(int wide, long M, long K, struct matrix A, const float *B, long row_B, float *C,
                  long row_C, const float *first, long row_first) {
    const long most = wide == 3 ? TALL * 2 / 3 : TALL;
    for (long left = (M + most - 1) / most; left; left--) {
        uint32_t tall = (uint32_t)(M + left - 1) / (uint32_t)left;
        switch (tall) {
#define CASE(n)                                                                       \
    case n:                                                                           \
        tile(n < most ? n : most, wide, K, A, B, row_B, C, row_C, first, row_first); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
        M -= tall, A.at += tall * A.row, C += tall * row_C;
        if (first) first += tall * row_first;
    }
}

/* C = first + A B: (M, K) times (K, N), N in whole registers. */
static __attribute__((noinline)) void product(long M, long N, long K, struct matrix A, const float *B,
                                              long row_B, float *C, long row_C, const float *first,
                                              long row_first) {
    while (N > 0) {
        long width = smaller(3 * LANES, N);
        switch (width / LANES) {
            case 3: tiles(3, M, K, A, B, row_B, C, row_C, first, row_first); break;
            case 2: tiles(2, M, K, A, B, row_B, C, row_C, first, row_first); break;
            case 1: tiles(1, M, K, A, B, row_B, C, row_C, first, row_first); break;
        }
        N -= width, B += width, C += width;
        if (first) first += width;
    }
}

#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif
#ifdef __clang__
#define INTERLEAVED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVED(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* (L, D) -> (D, S), a square of registers at a time, interleaved log2(LANES) times. */
static void transpose(float *to, const float *from, long L, long D, long S) {
    for (long c = 0; c < D; c += LANES)
        for (long t = 0; t < S; t += LANES) {
            vec rows[LANES], next[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = t + i < L ? *(const vec *)(from + (t + i) * D + c) : (vec){};
            for (int times = 1; times < LANES; times *= 2) {
                for (int i = 0; i < LANES / 2; i++) {
                    next[2 * i] = INTERLEAVED(rows[i], rows[i + LANES / 2], LOW);
                    next[2 * i + 1] = INTERLEAVED(rows[i], rows[i + LANES / 2], HIGH);
                }
                for (int i = 0; i < LANES; i++) rows[i] = next[i];
            }
            for (int i = 0; i < LANES; i++) *(vec *)(to + (c + i) * S + t) = rows[i];
        }
}

/* (L, d) out of rows so far apart, to (L, D), times `scale`; what lies `ahead` comes to cache. */
INLINE void gather(float *to, const number *from, long row, long L, long d, long D, float scale,
                   long ahead) {
    for (long t = 0; t < L; t++, to += D, from += row)
        for (long c = 0; c < D; c += LANES) {
            __builtin_prefetch(from + ahead + c);
            *(vec *)(to + c) = scale * (c + LANES <= d ? load(from + c) : load_some(from + c, d - c));
        }
}

/* The reverse, or with `add` added to what is there. */
INLINE void scatter(number *to, const float *from, long row, long L, long d, long D, float scale,
                    long ahead, int add) {
    for (long t = 0; t < L; t++, to += row, from += D)
        for (long c = 0; c < D; c += LANES) {
            long some = smaller(LANES, d - c);
            vec x = scale * *(const vec *)(from + c);
            __builtin_prefetch(to + ahead + c, 1);
            if (add) x += some == LANES ? load(to + c) : load_some(to + c, some);
            if (some == LANES) store(to + c, x);
            else store_some(to + c, x, some);
        }
}

/* Down each column of (L, S). */
static void softmax(float *x, long L, long S) {
    for (long c = 0; c < S; c += LANES, x += LANES) {
        vec most = *(vec *)x, total = {};
        for (long t = 1; t < L; t++) most = maximum(most, *(vec *)(x + t * S));
        for (long t = 0; t < L; t++) {
            vec *at = (vec *)(x + t * S);
            *at = exponential(*at - most);
            total += *at;
        }
        total = 1 / total;
        for (long t = 0; t < L; t++) *(vec *)(x + t * S) *= total;
    }
}

/* The gradient of what went into softmax, in place of the one `g` of what came out, `p`. */
static void softmax_gradient(float *g, const float *p, long L, long S) {
    for (long c = 0; c < S; c += LANES, g += LANES, p += LANES) {
        vec total = {};
        for (long t = 0; t < L; t++) total += *(vec *)(g + t * S) * *(const vec *)(p + t * S);
        for (long t = 0; t < L; t++) {
            vec *at = (vec *)(g + t * S);
            *at = *(const vec *)(p + t * S) * (*at - total);
        }
    }
}

/* Room for one text and head of attention: seven arrays of L tokens, two of L by L. */
struct room {
    float *q, *k, *v, *g, *result, *across, *weights, *changes;
};

static struct room room(long longest, long d) {
    long most = room_for(longest), D = whole(d);
    float *at = aligned_alloc(4 * LANES, 4 * (6 * most * D + 2 * most * most));
    float *square = at + 6 * most * D;
    return (struct room){at, at + most * D, at + 2 * most * D, at + 3 * most * D,
                         at + 4 * most * D, at + 5 * most * D, square, square + most * most};
}

/* out = softmax(q k^T / sqrt(d)) v of a text of L tokens in one of the heads that make up `width`; or,
 * where there is a gradient of that, the gradient of q, k and v. All point to the first token's part. */
static void attend(number *out, const number *qkv, const number *gradient, long L, long width, long d,
                   struct room at) {
    long D = whole(d), S = room_for(L);
    float scale = 1 / sqrtf(d);
    gather(at.q, qkv, 3 * width, L, d, D, scale, d);
    gather(at.k, qkv + width, 3 * width, L, d, D, 1, d);
    gather(at.v, qkv + 2 * width, 3 * width, L, d, D, 1, d);
    transpose(at.across, at.q, L, D, S);
    product(L, S, D, (struct matrix){at.k, D, 1}, at.across, S, at.weights, S, 0, 0);
    softmax(at.weights, L, S);
    if (!gradient) {
        product(L, D, L, (struct matrix){at.weights, 1, S}, at.v, D, at.result, D, 0, 0);
        scatter(out, at.result, width, L, d, D, 1, d, 0);
        return;
    }
    gather(at.g, gradient, width, L, d, D, 1, d);
    product(L, D, L, (struct matrix){at.weights, S, 1}, at.g, D, at.result, D, 0, 0);
    scatter(out + 2 * width, at.result, 3 * width, L, d, D, 1, d, 0);
    transpose(at.across, at.g, L, D, S);
    product(L, S, D, (struct matrix){at.v, D, 1}, at.across, S, at.changes, S, 0, 0);
    softmax_gradient(at.changes, at.weights, L, S);
    product(L, D, L, (struct matrix){at.changes, 1, S}, at.k, D, at.result, D, 0, 0);
    scatter(out, at.result, 3 * width, L, d, D, scale, d, 0);
    product(L, D, L, (struct matrix){at.changes, S, 1}, at.q, D, at.result, D, 0, 0);
    scatter(out + width, at.result, 3 * width, L, d, D, 1, d, 0);
}

/* Attention within each text and head, (T, 3 H d) -> (T, H d); or, where there is a gradient of that,
 * the gradient of qkv, (T, H d) -> (T, 3 H d). */
void attention(number *out, const number *qkv, const number *gradient, const int64_t *starts,
               const int64_t *lengths, long texts, long longest, long H, long d, int threads) {
    long width = H * d, wide = gradient ? 3 : 1;
    PARALLEL {
        struct room own = room(longest, d);
        SHARED for (long job = 0; job < texts * H; job++) {
            long start = starts[job / H] * width, head = job % H * d;
            attend(out + wide * start + head, qkv + 3 * start + head,
                   gradient ? gradient + start + head : 0, lengths[job / H], width, d, own);
        }
        free(own.q);
    }
}

/* The sum of a register's numbers, in each of them. */
INLINE vec total(vec x) {
    for (int times = 1; times < LANES; times *= 2)
        x = INTERLEAVED(x, x, LOW) + INTERLEAVED(x, x, HIGH);
    return x;
}

/* Queries that are computed at once: their weights stay in cache, and keys that none of them sees are
 * left out. */
#define QUERIES (3 * LANES)

/* Where a head's numbers of a token are: `row` from a token to the next, `head` from a head to the next. */
struct heads {
    number *at;
    long row, head;
};

INLINE number *head_of(struct heads x, long token, long head) { return x.at + token * x.row + head * x.head; }

/* Room for one text's keys and values and their gradients, and for a block of queries. */
struct interval_room {
    float *k, *v, *grad_k, *grad_v, *q, *g, *across, *result, *weights, *changes;
};

static struct interval_room interval_room(long longest, long d) {
    long L = longest * whole(d), block = QUERIES * whole(d), square = longest * QUERIES;
    float *at = aligned_alloc(4 * LANES, 4 * (4 * L + 4 * block + 2 * square)), *blocks = at + 4 * L;
    return (struct interval_room){at, at + L, at + 2 * L, at + 3 * L, blocks, blocks + block, blocks + 2 * block,
                                blocks + 3 * block, blocks + 4 * block, blocks + 4 * block + square};
}

/* Some queries of a text: those from `begin`, `count` of them. Query i sees the keys from first[i] to
 * before last[i], and all of them the keys from `from` to before `to`. */
struct block {
    long begin, count, from, to;
    int32_t first[QUERIES], last[QUERIES];
};

static struct block block(const int32_t *first, const int32_t *last, long begin, long L) {
    struct block b = {begin, smaller(QUERIES, L - begin), L, 0};
    for (long i = 0; i < b.count; i++) {
        b.first[i] = first[begin + i], b.last[i] = last[begin + i];
        b.from = smaller(b.from, b.first[i]), b.to = larger(b.to, b.last[i]);
    }
    for (long i = b.count; i < QUERIES; i++) b.first[i] = b.from, b.last[i] = b.to;
    return b;
}

/* What each key of a block counts for each of its queries, (keys, QUERIES). */
static void weigh(float *weights, const float *k, const float *across, const struct block *b, long D) {
    product(b->to - b->from, QUERIES, D, (struct matrix){(float *)k + b->from * D, D, 1}, across, QUERIES,
            weights, QUERIES, 0, 0);
    for (long c = 0; c < QUERIES; c += LANES) {
        ints first = *(const ints *)(b->first + c), last = *(const ints *)(b->last + c);
        vec most = (vec){} - 3e38f, sum = {};
        for (long t = b->from; t < b->to; t++) {
            ints seen = (first <= (int32_t)t) & (last > (int32_t)t);
            vec own = *(vec *)(weights + (t - b->from) * QUERIES + c);
            most = choose(seen, maximum(most, own), most);
        }
        for (long t = b->from; t < b->to; t++) {
            ints seen = (first <= (int32_t)t) & (last > (int32_t)t);
            vec *at = (vec *)(weights + (t - b->from) * QUERIES + c);
            *at = choose(seen, exponential(*at - most), (vec){});
            sum += *at;
        }
        sum = 1 / sum;
        for (long t = b->from; t < b->to; t++) *(vec *)(weights + (t - b->from) * QUERIES + c) *= sum;
    }
}

/* (count, d) numbers of a head from token `begin` on, to (QUERIES, D) and transposed to (D, QUERIES). */
static void take_block(float *to, float *across, struct heads from, long begin, long head, const struct block *b,
                       long d, float scale) {
    long D = whole(d);
    gather(to, head_of(from, begin + b->begin, head), from.row, b->count, d, D, scale, from.row);
    memset(to + b->count * D, 0, 4 * (QUERIES - b->count) * D);
    transpose(across, to, QUERIES, D, QUERIES);
}

/* softmax(scale q k^T) v within each text, over an interval of keys for each query: q (T, H, d), k and v
 * (T, G, d), H a multiple of G, to out (T, H, d). */
void interval_attention(number *out, number *q, long row_q, long head_q, number *k, long row_k, long head_k,
                        number *v, long row_v, long head_v, const int32_t *first, const int32_t *last,
                        const int64_t *starts, const int64_t *lengths, long texts, long longest, long H, long G,
                        long d, double scale, int threads) {
    struct heads Q = {q, row_q, head_q}, K = {k, row_k, head_k}, V = {v, row_v, head_v}, to = {out, H * d, d};
    PARALLEL {
        long D = whole(d);
        struct interval_room own = interval_room(longest, d);
        SHARED for (long job = 0; job < texts * G; job++) {
            long start = starts[job / G], L = lengths[job / G], group = job % G;
            gather(own.k, head_of(K, start, group), K.row, L, d, D, 1, K.row);
            gather(own.v, head_of(V, start, group), V.row, L, d, D, 1, V.row);
            for (long head = group * (H / G); head < (group + 1) * (H / G); head++)
                for (long begin = 0; begin < L; begin += QUERIES) {
                    struct block b = block(first + start, last + start, begin, L);
                    take_block(own.q, own.across, Q, start, head, &b, d, scale);
                    weigh(own.weights, own.k, own.across, &b, D);
                    product(b.count, D, b.to - b.from, (struct matrix){own.weights, 1, QUERIES},
                            own.v + b.from * D, D, own.result, D, 0, 0);
                    scatter(head_of(to, start + begin, head), own.result, to.row, b.count, d, D, 1, d, 0);
                }
        }
        free(own.k);
    }
}

/* The gradients of q, k and v, in the shapes of those and contiguous, given that of the result. */
void interval_attention_gradient(number *grad_q, number *grad_k, number *grad_v, number *gradient, long row_g,
                                 long head_g, number *q, long row_q, long head_q, number *k, long row_k,
                                 long head_k, number *v, long row_v, long head_v, const int32_t *first,
                                 const int32_t *last, const int64_t *starts, const int64_t *lengths, long texts,
                                 long longest, long H, long G, long d, double scale, int threads) {
    struct heads Q = {q, row_q, head_q}, K = {k, row_k, head_k}, V = {v, row_v, head_v};
    struct heads g = {gradient, row_g, head_g}, to_q = {grad_q, H * d, d};
    struct heads to_k = {grad_k, G * d, d}, to_v = {grad_v, G * d, d};
    PARALLEL {
        long D = whole(d);
        struct interval_room own = interval_room(longest, d);
        SHARED for (long job = 0; job < texts * G; job++) {
            long start = starts[job / G], L = lengths[job / G], group = job % G;
            gather(own.k, head_of(K, start, group), K.row, L, d, D, 1, K.row);
            gather(own.v, head_of(V, start, group), V.row, L, d, D, 1, V.row);
            memset(own.grad_k, 0, 4 * L * D), memset(own.grad_v, 0, 4 * L * D);
            for (long head = group * (H / G); head < (group + 1) * (H / G); head++)
                for (long begin = 0; begin < L; begin += QUERIES) {
                    struct block b = block(first + start, last + start, begin, L);
                    long keys = b.to - b.from, at = b.from * D;
                    take_block(own.q, own.across, Q, start, head, &b, d, scale);
                    weigh(own.weights, own.k, own.across, &b, D);
                    take_block(own.g, own.across, g, start, head, &b, d, 1);
                    product(keys, D, QUERIES, (struct matrix){own.weights, QUERIES, 1}, own.g, D,
                            own.grad_v + at, D, own.grad_v + at, D);
                    product(keys, QUERIES, D, (struct matrix){own.v + at, D, 1}, own.across, QUERIES, own.changes,
                            QUERIES, 0, 0);
                    softmax_gradient(own.changes, own.weights, keys, QUERIES);
                    product(b.count, D, keys, (struct matrix){own.changes, 1, QUERIES}, own.k + at, D, own.result,
                            D, 0, 0);
                    scatter(head_of(to_q, start + begin, head), own.result, to_q.row, b.count, d, D, scale, d, 0);
                    product(keys, D, QUERIES, (struct matrix){own.changes, QUERIES, 1}, own.q, D, own.grad_k + at,
                            D, own.grad_k + at, D);
                }
            scatter(head_of(to_k, start, group), own.grad_k, to_k.row, L, d, D, 1, d, 0);
            scatter(head_of(to_v, start, group), own.grad_v, to_v.row, L, d, D, 1, d, 0);
        }
        free(own.k);
    }
}

/* What rows of d numbers are multiplied by to have a mean square of 1. */
INLINE vec rms_scale(const number *x, long d, float epsilon) {
    vec squares = {};
    for (long c = 0; c < d; c += LANES) squares += load(x + c) * load(x + c);
    return (vec){} + 1 / sqrtf(total(squares)[0] / d + epsilon);
}

/* y = x / rms(x) * gain: (T, d), d in whole registers. */
void rms_norm(number *y, const number *x, const float *gain, long T, long d, double epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++) {
        const number *from = x + t * d;
        vec scale = rms_scale(from, d, epsilon);
        for (long c = 0; c < d; c += LANES)
            store(y + t * d + c, load(from + c) * scale * *(const vec *)(gain + c));
    }
}

/* The gradient of x, given that of y. */
void rms_norm_gradient(number *to, const number *gradient, const number *x, const float *gain, long T, long d,
                       double epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++) {
        const number *from = x + t * d, *g = gradient + t * d;
        vec scale = rms_scale(from, d, epsilon), along = {};
        for (long c = 0; c < d; c += LANES) along += load(g + c) * *(const vec *)(gain + c) * load(from + c);
        along = total(along) * scale * scale / (float)d;
        for (long c = 0; c < d; c += LANES)
            store(to + t * d + c, scale * (load(g + c) * *(const vec *)(gain + c) - along * load(from + c)));
    }
}

/* Rotary positions: out = x cos + (-x_2, x_1) sin, x_1 and x_2 the halves of a head's d numbers, of x
 * (T, H, d) with cos and sin (T, d); or, with `back`, the gradient of x, given that of out. */
void rotary(number *out, const number *x, long row, long head, const number *cos, const number *sin, long T,
            long H, long d, int back, int threads) {
    long half = d / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++)
        for (long h = 0; h < H; h++)
            for (long c = 0; c < half; c += LANES) {
                const number *from = x + t * row + h * head + c, *cos_t = cos + t * d + c, *sin_t = sin + t * d + c;
                number *to = out + (t * H + h) * d + c;
                vec a = load(from), b = load(from + half), sin_1 = load(sin_t), sin_2 = load(sin_t + half);
                store(to, a * load(cos_t) + b * (back ? sin_2 : -sin_1));
                store(to + half, b * load(cos_t + half) + a * (back ? -sin_1 : sin_2));
            }
}

INLINE vec sigmoid(vec x) {
    vec e = exponential((vec)((ints)x | (ints)((bits){} + 0x80000000u)));
    return choose(x > 0, (vec){} + 1, e) / (1 + e);
}

/* y = silu(gate) up: (T, 2 f), gate beside up, to (T, f), f in whole registers. */
void gated(number *y, const number *x, long T, long f, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++)
        for (long c = t * f, i = 2 * t * f; c < (t + 1) * f; c += LANES, i += LANES) {
            vec gate = load(x + i);
            store(y + c, gate * sigmoid(gate) * load(x + i + f));
        }
}

/* The gradient of x, given that of y. */
void gated_gradient(number *to, const number *gradient, const number *x, long T, long f, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long t = 0; t < T; t++)
        for (long c = t * f, i = 2 * t * f; c < (t + 1) * f; c += LANES, i += LANES) {
            vec gate = load(x + i), g = load(gradient + c), s = sigmoid(gate);
            store(to + i, g * load(x + i + f) * s * (1 + gate * (1 - s)));
            store(to + i + f, g * gate * s);
        }
}

/* Tokens, or columns, that are computed at once. */
#define BLOCK 96

#ifndef BFLOAT16
/* x Phi(x); x becomes the derivative. */
INLINE vec gelu_of(vec *x) {
    /* Abramowitz and Stegun 7.1.26, to 1.5e-7, whose exponential is that of the density too. */
    vec t = 1 / (1 + 0.23164189f * (vec)((ints)*x & 0x7fffffff));
    vec e = exponential(-0.5f * *x * *x);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    p = 0.5f * p * t * e;
    vec below = choose(*x > 0, 1 - p, p), y = *x * below;
    *x = below + *x * e * 0.39894228f;
    return y;
}

/* y = GELU of `count` numbers x; x becomes the derivative. */
void gelu(float *y, float *x, long count, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < count; i += LANES) {
        long some = smaller(LANES, count - i);
        vec a = some == LANES ? load(x + i) : load_some(x + i, some), b = gelu_of(&a);
        if (some == LANES) store(x + i, a), store(y + i, b);
        else store_some(x + i, a, some), store_some(y + i, b, some);
    }
}

/* What a row's layer normalisation subtracts and what it multiplies by; first x += bias, if there is
 * one. */
INLINE void moments(float *x, const float *bias, long d, float epsilon, vec *mean, vec *scale) {
    vec sum = {}, squares = {};
    for (long c = 0; c < d; c += LANES) {
        vec own = load(x + c);
        if (bias) store(x + c, own += load(bias + c));
        sum += own;
    }
    *mean = total(sum) / (float)d;
    for (long c = 0; c < d; c += LANES) {
        vec away = load(x + c) - *mean;
        squares += away * away;
    }
    float variance = total(squares)[0] / d;
    *scale = (vec){} + (1 / sqrtf(variance + epsilon) + 0 * variance); /* an overflow is seen to */
}

struct norm {
    const float *gain, *shift;
    double epsilon;
};

/* x += bias; y = LayerNorm(x): (M, d). */
static void normalise(float *y, float *x, const float *bias, struct norm norm, long M, long d) {
    for (; M; M--, x += d, y += d) {
        vec mean, scale;
        moments(x, bias, d, norm.epsilon, &mean, &scale);
        for (long c = 0; c < d; c += LANES)
            store(y + c, (load(x + c) - mean) * scale * load(norm.gain + c) + load(norm.shift + c));
    }
}

/* The gradient of x, given that of y; `to` may be `g`. */
static void normalise_gradient(float *to, const float *g, const float *x, struct norm norm, long M,
                               long d) {
    for (; M; M--, x += d, g += d, to += d) {
        vec mean, scale, sum = {}, along = {};
        moments((float *)x, 0, d, norm.epsilon, &mean, &scale);
        for (long c = 0; c < d; c += LANES) {
            vec own = load(g + c) * load(norm.gain + c);
            sum += own, along += own * (load(x + c) - mean);
        }
        sum = total(sum) / (float)d, along = total(along) * scale * scale / (float)d;
        for (long c = 0; c < d; c += LANES) {
            vec own = load(g + c) * load(norm.gain + c);
            store(to + c, scale * (own - sum - along * (load(x + c) - mean)));
        }
    }
}

/* A frozen matrix (K, N) as `frozen` reads it: a panel of three registers' columns, then the next. */
void prepack(float *to, const float *W, long row, long column, long K, long N) {
    for (long n = 0; n < N; n += 3 * LANES)
        for (long k = 0, width = smaller(3 * LANES, N - n); k < K; k++)
            for (long j = 0; j < width; j++) *to++ = W[k * row + (n + j) * column];
}

/* C = GELU(C) of (M, N), rows so far apart; the derivative to `derivative`, if that isn't NULL. */
static void gelu_in_place(float *C, long row, long M, long N, float *derivative) {
    for (; M; M--, C += row)
        for (long n = 0; n < N; n += LANES) {
            vec x = load(C + n);
            store(C + n, gelu_of(&x));
            if (derivative) store(derivative, x), derivative += LANES;
        }
}

/* C *= other, whose rows lie one after another. */
static void multiply(float *C, long row, long M, long N, const float *other) {
    for (; M; M--, C += row)
        for (long n = 0; n < N; n += LANES, other += LANES) store(C + n, load(C + n) * load(other));
}

enum after { NOTHING, GELU, TIMES };

/* C = first + A B, B prepacked; then C = GELU(C), with the derivative to `other` if there is one, or
 * C *= other, which lies in the order in which it was computed. */
static void frozen(long M, long N, long K, const float *A, long row_A, const float *B, float *C,
                   long row_C, const float *first, long row_first, enum after after, float *other) {
    for (long m = 0; m < M; m += BLOCK)
        for (long n = 0, some = smaller(BLOCK, M - m); n < N; n += 3 * LANES) {
            long width = smaller(3 * LANES, N - n);
            float *c = C + m * row_C + n, *own = other ? other + m * N + n * some : 0;
            if (after == TIMES)
                for (long i = 0; i < some * width; i += 16) __builtin_prefetch(own + i);
            product(some, width, K, (struct matrix){(float *)A + m * row_A, row_A, 1}, B + n * K, width, c, row_C,
                    first ? first + m * row_first + n : 0, row_first);
            if (after == GELU) gelu_in_place(c, row_C, some, width, own);
            if (after == TIMES) multiply(c, row_C, some, width, own);
        }
}

/* Tokens that go through frozen layers together: enough to make use of a weight once it is in cache,
 * and few enough for what they become to stay there. */
INLINE long together(long T, int threads) {
    return smaller(384, (T / threads + TALL) / TALL * TALL);
}

/* out = x W + bias, or without a bias x W; W prepacked. */
void linear(float *out, const float *x, const float *W, const float *bias, long T, long N, long K,
            int threads) {
    long rows = together(T, threads);
    PARALLEL {
        EACH for (long t = 0; t < T; t += rows)
            frozen(smaller(rows, T - t), N, K, x + t * K, K, W, out + t * N, N, bias, 0, NOTHING, 0);
    }
}

/* A layer's frozen weights: matrices prepacked for the forward pass and for the backward pass, H heads.
 * LoRA sits at `count` of query, key and value, which `part` numbers; `place` numbers all its places. */
struct layer {
    const float *qkv, *qkv_back, *qkv_bias, *merge, *merge_back, *merge_bias;
    const float *up, *up_back, *up_bias, *down, *down_back, *down_bias;
    struct norm norm_1, norm_2;
    long d, f, H, part[3], place[3], count;
};

/* out = norm_2(a + down(GELU(up(a)))), a = norm_1(h + merge(context)): (T, d). What went into the norms
 * and the derivative of GELU are kept, unless they are NULL. */
static void past_attention(float *out, float *sum_1, float *sum_2, float *derivative, const float *context,
                           const float *h, const struct layer *layer, long T, int threads) {
    long d = layer->d, f = layer->f, rows = together(T, threads);
    PARALLEL {
        long F = room_for(f);
        float *a = aligned_alloc(4 * LANES, 4 * rows * (2 * d + F)), *inner = a + rows * d;
        float *sum = inner + rows * F;
        EACH for (long t = 0; t < T; t += rows) {
            long M = smaller(rows, T - t), at = t * d;
            float *before_1 = sum_1 ? sum_1 + at : sum, *before_2 = sum_2 ? sum_2 + at : sum;
            frozen(M, d, d, context + at, d, layer->merge, before_1, d, h + at, d, NOTHING, 0);
            normalise(a, before_1, layer->merge_bias, layer->norm_1, M, d);
            frozen(M, f, d, a, d, layer->up, inner, F, layer->up_bias, 0, GELU,
                   derivative ? derivative + t * f : 0);
            frozen(M, d, f, inner, F, layer->down, before_2, d, a, d, NOTHING, 0);
            normalise(out + at, before_2, layer->down_bias, layer->norm_2, M, d);
        }
        free(a);
    }
}

/* The gradients of context and h. */
static void past_attention_gradient(float *grad_context, float *grad_h, const float *gradient,
                                    const float *sum_1, const float *sum_2, float *derivative,
                                    const struct layer *layer, long T, int threads) {
    long d = layer->d, f = layer->f, rows = together(T, threads);
    PARALLEL {
        long F = room_for(f);
        float *g = aligned_alloc(4 * LANES, 4 * rows * (d + F)), *inner = g + rows * d;
        EACH for (long t = 0; t < T; t += rows) {
            long M = smaller(rows, T - t), at = t * d;
            normalise_gradient(g, gradient + at, sum_2 + at, layer->norm_2, M, d);
            frozen(M, f, d, g, d, layer->down_back, inner, F, 0, 0, TIMES, derivative + t * f);
            frozen(M, d, f, inner, F, layer->up_back, grad_h + at, d, g, d, NOTHING, 0);
            normalise_gradient(grad_h + at, grad_h + at, sum_1 + at, layer->norm_1, M, d);
            frozen(M, d, d, grad_h + at, d, layer->merge_back, grad_context + at, d, 0, 0, NOTHING, 0);
        }
        free(g);
    }
}

/* The LoRA factors of all places: A (n, places, r, d) and B (n, places, d, r), or their gradients, B's
 * transposed. In a layer R = count r, S the same in whole registers. */
struct adapters {
    float *A, *B;
    long places, r;
    float scale;
};

/* A client's factors of a place, or the gradients of them. */
INLINE long factor(const struct adapters *lora, long client, long place, long d) {
    return (client * lora->places + place) * lora->r * d;
}

/* Texts of one client: portions, over which its factors' gradients are summed one by one, so that a sum
 * does not depend on who computes it; and pieces, some portions that are computed together, of at most
 * so many `rows` of tokens. Portion i begins with text[i], piece p with portion[p]. */
struct pieces {
    const int64_t *text, *portion, *starts, *lengths;
    long count, texts_each, rows, longest, texts, tokens;
};

/* Texts, and their tokens. */
struct span {
    long client, text, end, begin, rows;
};

static struct span span(const struct pieces *all, long portion, long portions_end) {
    long text = all->text[portion], end = all->text[portions_end], begin = all->starts[text];
    return (struct span){text / all->texts_each, text, end, begin,
                         all->starts[end - 1] + all->lengths[end - 1] - begin};
}

static struct span piece(const struct pieces *all, long p) {
    return span(all, all->portion[p], all->portion[p + 1]);
}

/* context = attention(h W + bias + LoRA(h)), (T, d) -> (T, d). What attention was given and h A^T,
 * (T, S), are kept, unless they are NULL. */
static void adapted_attention(float *context, float *qkv, float *low, const float *h,
                              const struct layer *layer, const struct adapters *lora,
                              const struct pieces *pieces, int threads) {
    long d = layer->d, width = d / layer->H, r = lora->r, R = layer->count * r, S = whole(R), s = whole(r);
    PARALLEL {
        struct room own = room(pieces->longest, width);
        long rows = pieces->rows;
        float *A = aligned_alloc(4 * LANES, 4 * (rows * (3 * d + S) + d * (R + S + 2 * s) + LANES));
        float *A_t = A + R * d, *B = A_t + S * d, *B_t = B + s * d, *own_qkv = B_t + s * d;
        EACH for (long p = 0; p < pieces->count; p++) {
            struct span at = piece(pieces, p);
            const float *x = h + at.begin * d;
            float *y = qkv ? qkv + 3 * at.begin * d : own_qkv;
            float *l = low ? low + at.begin * S : own_qkv + 3 * rows * d;
            frozen(at.rows, 3 * d, d, x, d, layer->qkv, y, 3 * d, layer->qkv_bias, 0, NOTHING, 0);
            for (long b = 0; b < layer->count; b++)
                gather(A + b * r * d, lora->A + factor(lora, at.client, layer->place[b], d), d, r, d, d,
                       lora->scale, d);
            transpose(A_t, A, R, d, S);
            product(at.rows, S, d, (struct matrix){(float *)x, d, 1}, A_t, S, l, S, 0, 0);
            for (long b = 0; b < layer->count; b++) {
                float *to = y + layer->part[b] * d;
                gather(B, lora->B + factor(lora, at.client, layer->place[b], d), r, d, r, s, 1, r);
                transpose(B_t, B, d, s, d);
                product(at.rows, d, r, (struct matrix){l + b * r, S, 1}, B_t, d, to, 3 * d, to, 3 * d);
            }
            for (long text = at.text; text < at.end; text++)
                for (long head = 0, start = pieces->starts[text]; head < d; head += width)
                    attend(context + start * d + head, y + 3 * (start - at.begin) * d + head, 0,
                           pieces->lengths[text], d, width, own);
        }
        free(own.q), free(A);
    }
}

/* Rows of the texts' first tokens, (R, d), each to its token's place among all, (T, d), and zeros between. */
static void spread(float *x, const struct pieces *pieces, long d) {
    long end = pieces->tokens;
    for (long i = pieces->texts - 1; i >= 0; i--) {
        long start = pieces->starts[i];
        memmove(x + start * d, x + i * d, 4 * d);
        memset(x + (start + 1) * d, 0, 4 * d * (end - start - 1));
        end = start;
    }
}

/* What a portion adds to the gradients of a layer's A and B. */
static void add_portion(const struct adapters *grads, const float *own_A, const float *own_B,
                        const struct layer *layer, struct span at, const struct pieces *pieces) {
    long size = grads->r * layer->d;
    for (long b = 0; b < layer->count; b++) {
        long place = factor(grads, at.client, layer->place[b], layer->d);
        for (int k = 0; k < 2; k++) {
            float *to = (k ? grads->B : grads->A);
            const float *from = (k ? own_B : own_A) + b * size;
            if (!to) continue;
            to += place;
            if (at.text % pieces->texts_each == 0) memcpy(to, from, 4 * size);
            else
                for (long i = 0; i < size; i += LANES) store(to + i, load(to + i) + load(from + i));
        }
    }
}

/* The gradients of the factors, and of h, added to what is there; what is NULL isn't wanted. */
static void adapted_attention_gradient(float *grad_h, const struct adapters *grads,
                                       const float *gradient, const float *qkv, const float *low,
                                       const float *h, const struct layer *layer,
                                       const struct adapters *lora, const struct pieces *pieces,
                                       int threads) {
    long d = layer->d, width = d / layer->H, r = lora->r, R = layer->count * r, S = whole(R);
    long size = R * d, portions = pieces->portion[pieces->count];
    long slots = threads > 1 ? portions : 1;
    float *own_A = aligned_alloc(4 * LANES, 4 * (2 * slots * size + LANES)), *own_B = own_A + slots * size;
    PARALLEL {
        struct room own = room(pieces->longest, width);
        long rows = pieces->rows;
        float *grad_qkv = aligned_alloc(4 * LANES, 4 * (rows * (3 * d + S) + size + S * d + LANES));
        float *grad_low = grad_qkv + 3 * rows * d, *A = grad_low + rows * S, *B = A + size;
        EACH for (long p = 0; p < pieces->count; p++) {
            struct span at = piece(pieces, p);
            for (long text = at.text; text < at.end; text++)
                for (long head = 0, start = pieces->starts[text]; head < d; head += width)
                    attend(grad_qkv + 3 * (start - at.begin) * d + head, qkv + 3 * start * d + head,
                           gradient + start * d + head, pieces->lengths[text], d, width, own);
            for (long b = 0; b < layer->count && (grads->A || grad_h); b++) {
                const float *g = grad_qkv + layer->part[b] * d;
                long place = factor(lora, at.client, layer->place[b], d);
                const float *own_B = lora->B + place;
                memcpy(A + b * r * d, lora->A + place, 4 * r * d);
                /* This one's B beside zeros in the places of the others: they all add to grad_low. */
                memset(B, 0, 4 * S * d);
                for (long c = 0; c < d; c++)
                    for (long k = 0; k < r; k++) B[c * S + b * r + k] = lora->scale * own_B[c * r + k];
                product(at.rows, S, d, (struct matrix){(float *)g, 3 * d, 1}, B, S, grad_low, S,
                        b ? grad_low : 0, S);
            }
            for (long i = pieces->portion[p]; i < pieces->portion[p + 1] && size; i++) {
                struct span some = span(pieces, i, i + 1);
                const float *g = grad_qkv + 3 * (some.begin - at.begin) * d, *l = low + some.begin * S;
                float *to_A = own_A + (slots > 1 ? i * size : 0), *to_B = own_B + (slots > 1 ? i * size : 0);
                if (grads->A)
                    product(R, d, some.rows, (struct matrix){grad_low + (some.begin - at.begin) * S, 1, S},
                            h + some.begin * d, d, to_A, d, 0, 0);
                for (long b = 0; b < layer->count && grads->B; b++)
                    product(r, d, some.rows, (struct matrix){(float *)l + b * r, 1, S},
                            g + layer->part[b] * d, 3 * d, to_B + b * r * d, d, 0, 0);
                if (slots == 1) add_portion(grads, to_A, to_B, layer, some, pieces);
            }
            if (!grad_h) continue;
            float *to = grad_h + at.begin * d;
            frozen(at.rows, d, 3 * d, grad_qkv, 3 * d, layer->qkv_back, to, d, to, d, NOTHING, 0);
            product(at.rows, d, R, (struct matrix){grad_low, S, 1}, A, d, to, d, to, d);
        }
        free(own.q), free(grad_qkv);
    }
    for (long i = 0; i < portions && slots > 1; i++)
        add_portion(grads, own_A + i * size, own_B + i * size, layer, span(pieces, i, i + 1), pieces);
    free(own_A);
}

/* What a layer gives, and what it keeps for the backward pass, or NULL. */
struct kept {
    float *out, *qkv, *low, *sum_1, *sum_2, *derivative;
};

/* Layers one after another, (T, d) -> (T, d); of the last one only the texts' first tokens, if so asked,
 * (R, d): past attention tokens don't meet again. */
void layers(const struct kept *kept, const float *h, const struct layer *layer,
            const struct adapters *lora, long count, const struct pieces *pieces, int first_tokens,
            int threads) {
    long d = layer->d, T = pieces->tokens, R = pieces->texts;
    float *context = aligned_alloc(4 * LANES, whole(T * d) * 4), *firsts = 0;
    for (const struct layer *last = layer + count - 1; layer <= last; layer++, kept++) {
        adapted_attention(context, kept->qkv, kept->low, h, layer, lora, pieces, threads);
        if (layer == last && first_tokens) {
            firsts = aligned_alloc(4 * LANES, whole(R * d) * 4);
            for (long i = 0; i < R; i++) {
                long place = pieces->starts[i] * d;
                memcpy(firsts + i * d, h + place, 4 * d);
                memmove(context + i * d, context + place, 4 * d);
            }
        }
        past_attention(kept->out, kept->sum_1, kept->sum_2, kept->derivative, context, firsts ? firsts : h,
                       layer, firsts ? R : T, threads);
        h = kept->out;
    }
    free(context), free(firsts);
}

/* The gradients of all layers' factors, given that of the result. */
void layers_gradient(const struct adapters *grads, const float *gradient, const struct kept *kept,
                     const float *h, const struct layer *layer, const struct adapters *lora, long count,
                     const struct pieces *pieces, int first_tokens, int threads) {
    long d = layer->d, T = pieces->tokens, R = pieces->texts;
    float *grad_context = aligned_alloc(4 * LANES, whole(T * d) * 4);
    float *grad_h = aligned_alloc(4 * LANES, whole(T * d) * 4);
    for (long k = count - 1; k >= 0; k--) {
        int firsts = k == count - 1 && first_tokens;
        past_attention_gradient(grad_context, grad_h, gradient, kept[k].sum_1, kept[k].sum_2,
                                kept[k].derivative, layer + k, firsts ? R : T, threads);
        if (firsts) spread(grad_context, pieces, d), spread(grad_h, pieces, d);
        adapted_attention_gradient(k ? grad_h : 0, grads, grad_context, kept[k].qkv, kept[k].low,
                                   k ? kept[k - 1].out : h, layer + k, lora, pieces, threads);
        gradient = grad_h;
    }
    free(grad_context), free(grad_h);
}

#endif

/* Each client's tokens times its own matrix: out = x W, or out += x W, (T, K) and (n, K, N) -> (T, N). */
void grouped_matmul(number *out, long row_out, const number *x, long row_x, const number *W,
              const int64_t *bounds, long n, long K, long N, int add, int threads) {
    long blocks = 0, width = whole(N), depth = whole(K);
    for (long i = 0; i < n; i++)
        blocks = larger(blocks, (bounds[i + 1] - bounds[i] + BLOCK - 1) / BLOCK);
    PARALLEL {
        float *tokens = aligned_alloc(4 * LANES, 4 * (BLOCK * (depth + width) + K * width));
        float *result = tokens + BLOCK * depth, *own = result + BLOCK * width;
        SHARED for (long job = 0; job < n * blocks; job++) {
            long i = job / blocks, begin = bounds[i] + job % blocks * BLOCK;
            long M = smaller(BLOCK, bounds[i + 1] - begin);
            if (M <= 0) continue;
            gather(own, W + i * K * N, N, K, N, width, 1, N);
            gather(tokens, x + begin * row_x, row_x, M, K, depth, 1, row_x);
            product(M, width, K, (struct matrix){tokens, depth, 1}, own, width, result, width, 0, 0);
            scatter(out + begin * row_out, result, row_out, M, N, width, 1, row_out, add);
        }
        free(tokens);
    }
}

/* For each client the sum of its tokens' outer products: out = x^T y, (T, M) and (T, N) -> (n, M, N). */
void grouped_matmul_t(float *out, const number *x, long row_x, const number *y, long row_y, const int64_t *bounds,
          long n, long M, long N, int threads) {
    long blocks = (N + BLOCK - 1) / BLOCK, height = whole(M);
    PARALLEL {
        float *left = aligned_alloc(4 * LANES, 4 * (2 * BLOCK * height + BLOCK * BLOCK));
        float *result = left + BLOCK * height, *right = result + BLOCK * height;
        SHARED for (long job = 0; job < n * blocks; job++) {
            long i = job / blocks, column = job % blocks * BLOCK, own = smaller(BLOCK, N - column);
            long width = whole(own);
            for (long begin = bounds[i]; begin < bounds[i + 1]; begin += BLOCK) {
                long K = smaller(BLOCK, bounds[i + 1] - begin);
                gather(left, x + begin * row_x, row_x, K, M, height, 1, row_x);
                gather(right, y + begin * row_y + column, row_y, K, own, width, 1, row_y);
                product(M, width, K, (struct matrix){left, 1, height}, right, width, result, width,
                        begin > bounds[i] ? result : 0, width);
            }
            for (long m = 0; m < M; m++)
                memcpy(out + (i * M + m) * N + column, result + m * width, own * sizeof(float));
        }
        free(left);
    }
}
