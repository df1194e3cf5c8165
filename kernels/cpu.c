/* Operators in float32 for CPUs: each row is read once where PyTorch reads it once an operation. And products of
 * matrices, where they are faster than those of PyTorch's libraries.
 *
 * Plain C, called through ctypes (cpu.py), which checks shapes, dtypes and strides. Compiled with OpenMP and not linked
 * with it: its functions are those of the runtime that PyTorch has loaded, whose threads then serve both. A sample is
 * worked on by one thread, and so is a number of a product, so results do not depend on how many there are.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { MAX_WIDTH = 2048, MAX_HEAD = 256, MAX_TOKENS = 64, WIDEST = 16 /* floats of a vector */ };
/* Elements below which starting threads costs more than they save, as PyTorch has it (at::internal::GRAIN_SIZE). */
enum { GRAIN = 32768 };

/* Summands of a product at a time: its rows of b then fit into the nearest cache, and those of a into the second. */
enum { DEPTH = 256 };

/* CRC-32 of this file and those that it includes, by which cpu.py tells a library that was compiled from others. */
uint32_t unite_sources(void) { return UNITE_SOURCES; }

struct adaln {
    const float *x, *branch, *gate, *closing, *weight, *shift, *scale;
    float *residual, *normed;
    const int32_t *offsets; /* [samples + 1], or samples of `tokens` each */
    int64_t samples, tokens, width, gate_stride, shift_stride, scale_stride;
    float eps;
};

struct adaln_backward {
    const float *grad_residual, *grad_normed, *x, *branch, *gate, *closing, *weight, *scale;
    float *grad_x, *grad_branch;
    float *along, *grad_shift, *grad_gate, *grad_closing; /* [samples, width], zero at first */
    const int32_t *offsets;
    int64_t samples, tokens, width, gate_stride, scale_stride;
    float eps;
};

struct rope {
    const float *qkv, *q_weight, *k_weight, *cosine, *sine; /* qkv [samples, tokens, 3, heads, width] */
    float *out;                                             /* as qkv */
    int64_t samples, tokens, heads, width, unrotated;
    float eps;
};

struct rope_backward {
    const float *grad, *qkv, *q_weight, *k_weight, *cosine, *sine; /* grad as qkv, in any order but for its last */
    float *grad_qkv, *grad_weights;                                /* [samples, 2, width], zero at first */
    int64_t strides[4];                                            /* of grad */
    int64_t samples, tokens, heads, width, unrotated;
    float eps;
};

struct attention {
    const float *qkv;       /* [samples, tokens, 3, heads, width] in any order but for its last, or [1, all tokens, ..] */
    const float *grad;      /* of out; backward alone */
    float *out, *grad_qkv;  /* [.., heads · width] and [.., 3, heads, width] of all tokens */
    float *weights;         /* [samples, heads, tokens, tokens in whole WIDEST] */
    const int32_t *offsets; /* [samples + 1], or samples of `tokens` each; with them `tokens` is the longest's */
    int64_t strides[4];     /* of qkv */
    int64_t samples, tokens, heads, width;
};

struct newton_schulz {
    const float *g;   /* [matrices, rows, columns] */
    float *out;       /* as g */
    float *work;      /* [workers, size] */
    int64_t matrices, rows, columns, steps, in_gram, workers, size;
    float eps, scale, linear, cubic, quintic;
};

struct matmul {
    const float *a;   /* [rows, depth], in any order */
    const float *b;   /* [depth, columns], in any order */
    float *out;       /* [rows, columns] */
    int64_t a_down, a_across, b_down, b_across, rows, depth, columns, threads;
};

static int64_t begin_of(const int32_t *offsets, int64_t tokens, int64_t sample) {
    return offsets ? offsets[sample] : sample * tokens;
}

/* Whether offsets [samples + 1] rise from 0 to all tokens and no sample is longer than the longest. */
int unite_offsets(const int32_t *offsets, int64_t samples, int64_t tokens, int64_t longest) {
    int good = offsets[0] == 0 && offsets[samples] == tokens;
    for (int64_t sample = 0; sample < samples; sample++) {
        const int64_t length = (int64_t)offsets[sample + 1] - offsets[sample];
        good &= length >= 0 && length <= longest;
    }
    return good;
}

#define NAME(function) function##_baseline
#define LANES 4
#include "cpu_rows.h"
#include "cpu_products.h"
#undef NAME
#undef LANES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SETS 3
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(function) function##_avx2
#define LANES 8
#include "cpu_rows.h"
#include "cpu_products.h"
#undef NAME
#undef LANES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma")
#define NAME(function) function##_avx512
#define LANES 16
#include "cpu_rows.h"
#include "cpu_products.h"
#undef NAME
#undef LANES
#pragma GCC pop_options
#define OF_EACH(function) {function##_baseline, function##_avx2, function##_avx512}
static int set(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}
#else
#define SETS 1
#define OF_EACH(function) {function##_baseline}
static int set(void) { return 0; }
#endif

void unite_swiglu(const float *x, float *out, int64_t rows, int64_t F) {
    static void (*const of[SETS])(const float *, float *, int64_t) = OF_EACH(swiglu);
    void (*const run)(const float *, float *, int64_t) = of[set()];
#pragma omp parallel for if (rows * F > GRAIN) schedule(static)
    for (int64_t row = 0; row < rows; row++) run(x + row * 2 * F, out + row * F, F);
}

void unite_swiglu_backward(const float *grad, const float *x, float *grad_x, int64_t rows, int64_t F) {
    static void (*const of[SETS])(const float *, const float *, float *, int64_t) = OF_EACH(swiglu_backward);
    void (*const run)(const float *, const float *, float *, int64_t) = of[set()];
#pragma omp parallel for if (rows * F > GRAIN) schedule(static)
    for (int64_t row = 0; row < rows; row++) run(grad + row * F, x + row * 2 * F, grad_x + row * 2 * F, F);
}

void unite_adaln(const struct adaln *o) {
    static void (*const of[SETS])(const struct adaln *, int64_t, int64_t, int64_t) = OF_EACH(adaln);
    void (*const run)(const struct adaln *, int64_t, int64_t, int64_t) = of[set()];
    const int64_t elements = begin_of(o->offsets, o->tokens, o->samples) * o->width;
#pragma omp parallel for if (elements > GRAIN) schedule(static)
    for (int64_t sample = 0; sample < o->samples; sample++)
        run(o, sample, begin_of(o->offsets, o->tokens, sample), begin_of(o->offsets, o->tokens, sample + 1));
}

void unite_adaln_backward(const struct adaln_backward *o) {
    static void (*const of[SETS])(const struct adaln_backward *, int64_t, int64_t, int64_t) = OF_EACH(adaln_backward);
    void (*const run)(const struct adaln_backward *, int64_t, int64_t, int64_t) = of[set()];
    const int64_t elements = begin_of(o->offsets, o->tokens, o->samples) * o->width;
#pragma omp parallel for if (elements > GRAIN) schedule(static)
    for (int64_t sample = 0; sample < o->samples; sample++)
        run(o, sample, begin_of(o->offsets, o->tokens, sample), begin_of(o->offsets, o->tokens, sample + 1));
}

void unite_rope(const struct rope *o) {
    static void (*const of[SETS])(const struct rope *, int64_t) = OF_EACH(rope);
    void (*const run)(const struct rope *, int64_t) = of[set()];
#pragma omp parallel for if (o->samples * o->tokens * o->heads * o->width * 3 > GRAIN) schedule(static)
    for (int64_t sample = 0; sample < o->samples; sample++) run(o, sample);
}

void unite_rope_backward(const struct rope_backward *o) {
    static void (*const of[SETS])(const struct rope_backward *, int64_t) = OF_EACH(rope_backward);
    void (*const run)(const struct rope_backward *, int64_t) = of[set()];
#pragma omp parallel for if (o->samples * o->tokens * o->heads * o->width * 3 > GRAIN) schedule(static)
    for (int64_t sample = 0; sample < o->samples; sample++) run(o, sample);
}

void unite_attention(const struct attention *o) {
    static void (*const of[SETS])(const struct attention *, int64_t, int64_t) = OF_EACH(attention);
    void (*const run)(const struct attention *, int64_t, int64_t) = of[set()];
#pragma omp parallel for collapse(2) if (o->samples * o->tokens * o->heads * o->width * 3 > GRAIN) schedule(static)
    for (int64_t sample = 0; sample < o->samples; sample++)
        for (int64_t head = 0; head < o->heads; head++) run(o, sample, head);
}

void unite_attention_backward(const struct attention *o) {
    static void (*const of[SETS])(const struct attention *, int64_t, int64_t) = OF_EACH(attention_backward);
    void (*const run)(const struct attention *, int64_t, int64_t) = of[set()];
#pragma omp parallel for collapse(2) if (o->samples * o->tokens * o->heads * o->width * 3 > GRAIN) schedule(static)
    for (int64_t sample = 0; sample < o->samples; sample++)
        for (int64_t head = 0; head < o->heads; head++) run(o, sample, head);
}

/* Whether this CPU has wide vectors: without them the products of PyTorch's libraries are faster. */
int unite_multiplies(void) { return set() > 0; }

/* A matrix is one thread's, and does not know of the others. */
void unite_newton_schulz(const struct newton_schulz *o) {
    static void (*const of[SETS])(const struct newton_schulz *, int64_t, float *) = OF_EACH(newton_schulz);
    void (*const run)(const struct newton_schulz *, int64_t, float *) = of[set()];
#pragma omp parallel for if (o->workers > 1) schedule(static)
    for (int64_t worker = 0; worker < o->workers; worker++)
        for (int64_t i = worker; i < o->matrices; i += o->workers) run(o, i, o->work + worker * o->size);
}

/* All threads take the same DEPTH summands at a time, which their panels then find in the caches that they share. The
 * number of threads decides who adds, and not in which order. */
void unite_matmul(const struct matmul *o) {
    static void (*const of[SETS])(const struct matmul *, int64_t, int64_t, int64_t, int64_t) = OF_EACH(summands);
    void (*const run)(const struct matmul *, int64_t, int64_t, int64_t, int64_t) = of[set()];
    const int64_t width = 8 << set(), panels = (o->columns + width - 1) / width;
    const int64_t parts = (o->threads + panels - 1) / panels, rows = ((o->rows + parts - 1) / parts + 7) / 8 * 8;
#pragma omp parallel if (o->threads > 1 && o->rows * o->columns * o->depth > GRAIN)
    for (int64_t first = 0; first < o->depth; first += DEPTH) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < panels * parts; i++) {
            const int64_t row = i / panels * rows, left = o->rows - row;
            if (left > 0) run(o, row, left < rows ? left : rows, i % panels * width, first);
        }
    }
}
