/* What PyTorch has no quick operator for on a CPU: attention within each of many short texts, GELU
 * together with its derivative, and thin products of many clients' own matrices.
 *
 * native.py compiles this once for each type of number: float, or with -DBFLOAT16 bfloat16, in which
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

/* Room for L numbers; rows that are a power of two apart would share few places in cache. */
INLINE long room_for(long L) {
    long S = whole(L);
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

/* A tile of a product in registers: `tall` rows of C, `wide` registers each. */
INLINE void tile(int tall, int wide, long K, struct matrix A, const float *B, long row_B, float *C,
                 long row_C, int add) {
    vec sum[TALL][2] = {};
    for (long k = 0; k < K; k++)
        for (int i = 0; i < tall; i++)
            for (int j = 0; j < wide; j++)
                sum[i][j] += A.at[i * A.row + k * A.column] * *(const vec *)(B + k * row_B + j * LANES);
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++) {
            vec *to = (vec *)(C + i * row_C + j * LANES);
            if (add) sum[i][j] += *to;
            *to = sum[i][j];
        }
}

/* Tiles below each other, about equally tall: in short ones each sum waits for itself. */
INLINE void tiles(int wide, long M, long K, struct matrix A, const float *B, long row_B, float *C,
                  long row_C, int add) {
    for (long left = (M + TALL - 1) / TALL; left; left--) {
        long tall = (M + left - 1) / left;
        switch (tall) {
#define CASE(n)                                                         \
    case n:                                                             \
        tile(n < TALL ? n : TALL, wide, K, A, B, row_B, C, row_C, add); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
        M -= tall, A.at += tall * A.row, C += tall * row_C;
    }
}

/* C = A B, or C += A B: (M, K) times (K, N), N in whole registers. */
static __attribute__((noinline)) void product(long M, long N, long K, struct matrix A, const float *B,
                                              long row_B, float *C, long row_C, int add) {
    long n = 0;
    for (; n + 2 * LANES <= N; n += 2 * LANES) tiles(2, M, K, A, B + n, row_B, C + n, row_C, add);
    if (n < N) tiles(1, M, K, A, B + n, row_B, C + n, row_C, add);
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

/* out = softmax(q k^T / sqrt(d)) v within each text and head, (T, 3 H d) -> (T, H d); or, where there
 * is a gradient of that, the gradient of qkv, (T, H d) -> (T, 3 H d). */
void attention(number *out, const number *qkv, const number *gradient, const int64_t *starts,
               const int64_t *lengths, long texts, long longest, long H, long d, int threads) {
    long width = H * d, D = whole(d), most = room_for(longest);
    float scale = 1 / sqrtf(d);
    PARALLEL {
        float *q = aligned_alloc(4 * LANES, 4 * (6 * most * D + 2 * most * most));
        float *k = q + most * D, *v = k + most * D, *g = v + most * D;
        float *result = g + most * D, *across = result + most * D;
        /* Weights and their gradients, (L, S): a column for each token that attends. */
        float *weights = across + most * D, *changes = weights + most * most;
        SHARED for (long job = 0; job < texts * H; job++) {
            long L = lengths[job / H], S = room_for(L);
            long start = starts[job / H] * width, head = job % H * d;
            const number *from = qkv + 3 * start + head;
            gather(q, from, 3 * width, L, d, D, scale, d);
            gather(k, from + width, 3 * width, L, d, D, 1, d);
            gather(v, from + 2 * width, 3 * width, L, d, D, 1, d);
            transpose(across, q, L, D, S);
            product(L, S, D, (struct matrix){k, D, 1}, across, S, weights, S, 0);
            softmax(weights, L, S);
            if (!gradient) {
                product(L, D, L, (struct matrix){weights, 1, S}, v, D, result, D, 0);
                scatter(out + start + head, result, width, L, d, D, 1, d, 0);
                continue;
            }
            number *to = out + 3 * start + head;
            gather(g, gradient + start + head, width, L, d, D, 1, d);
            product(L, D, L, (struct matrix){weights, S, 1}, g, D, result, D, 0);
            scatter(to + 2 * width, result, 3 * width, L, d, D, 1, d, 0);
            transpose(across, g, L, D, S);
            product(L, S, D, (struct matrix){v, D, 1}, across, S, changes, S, 0);
            softmax_gradient(changes, weights, L, S);
            product(L, D, L, (struct matrix){changes, 1, S}, k, D, result, D, 0);
            scatter(to, result, 3 * width, L, d, D, scale, d, 0);
            product(L, D, L, (struct matrix){changes, S, 1}, q, D, result, D, 0);
            scatter(to + width, result, 3 * width, L, d, D, 1, d, 0);
        }
        free(q);
    }
}

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

#endif

/* Tokens, or columns, that are computed at once. */
#define BLOCK 96

/* Each client's tokens times its own matrix: out = x W, or out += x W, (T, K) and (n, K, N) -> (T, N). */
void products(number *out, long row_out, const number *x, long row_x, const number *W,
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
            product(M, width, K, (struct matrix){tokens, depth, 1}, own, width, result, width, 0);
            scatter(out + begin * row_out, result, row_out, M, N, width, 1, row_out, add);
        }
        free(tokens);
    }
}

/* For each client the sum of its tokens' outer products: out = x^T y, (T, M) and (T, N) -> (n, M, N). */
void sums(float *out, const number *x, long row_x, const number *y, long row_y, const int64_t *bounds,
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
                        begin > bounds[i]);
            }
            for (long m = 0; m < M; m++)
                memcpy(out + (i * M + m) * N + column, result + m * width, own * sizeof(float));
        }
        free(left);
    }
}
