/* Rows of the operators for one set of vector instructions; cpu.c includes this once a set, with NAME to tell them apart
 * and LANES, the floats of a vector.
 *
 * Shapes: C width of a row, F hidden width, H heads, d head width.
 */

static inline float NAME(exp)(float x) {
    /* 2^k · e^r with |r| ≤ ln(2)/2 and the polynomial of Cephes' expf, in operations that vectorise everywhere: within
     * 2 units in the last place below e^88, infinite from there on. */
    x = x < -87.0f ? -87.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: the integer k in the last bits */
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23; /* any bits where x is no number: p is none, too */
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* A row: x holds gate and up, 2F. */
static void NAME(swiglu)(const float *x, float *out, int64_t F) {
#pragma omp simd
    for (int64_t i = 0; i < F; i++) out[i] = x[i] / (1.0f + NAME(exp)(-x[i])) * x[F + i];
}

static void NAME(swiglu_backward)(const float *grad, const float *x, float *grad_x, int64_t F) {
#pragma omp simd
    for (int64_t i = 0; i < F; i++) {
        const float sigmoid = 1.0f / (1.0f + NAME(exp)(-x[i]));
        grad_x[i] = grad[i] * x[F + i] * sigmoid * (1.0f + x[i] * (1.0f - sigmoid));
        grad_x[F + i] = grad[i] * x[i] * sigmoid;
    }
}

/* 1 / root mean square of x [C] */
static inline float NAME(inverse_rms)(const float *x, int64_t C, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < C; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / (float)C + eps);
}

static void NAME(adaln)(const struct adaln *o, int64_t sample, int64_t first, int64_t last) {
    const int64_t C = o->width;
    const float *scale = o->scale + sample * o->scale_stride;
    const float *gate = o->branch ? o->gate + sample * o->gate_stride : NULL;
    float factor[MAX_WIDTH], shift[MAX_WIDTH];
    for (int64_t i = 0; i < C; i++) factor[i] = (1.0f + scale[i]) * (o->weight ? o->weight[i] : 1.0f);
    for (int64_t i = 0; i < C; i++) shift[i] = o->shift ? o->shift[sample * o->shift_stride + i] : 0.0f;
    for (int64_t row = first; row < last; row++) {
        const float *x = o->x + row * C;
        float *normed = o->normed + row * C;
        if (o->branch) {
            const float *branch = o->branch + row * C;
            float *residual = o->residual + row * C;
#pragma omp simd
            for (int64_t i = 0; i < C; i++) residual[i] = x[i] + gate[i] * branch[i];
            if (o->closing) {
                const float inverse = NAME(inverse_rms)(residual, C, o->eps);
#pragma omp simd
                for (int64_t i = 0; i < C; i++) residual[i] = residual[i] * inverse * o->closing[i];
            }
            x = residual;
        }
        const float inverse = NAME(inverse_rms)(x, C, o->eps);
#pragma omp simd
        for (int64_t i = 0; i < C; i++) normed[i] = x[i] * inverse * factor[i] + shift[i];
    }
}

/* x is the stream that was normalised, but with a closing norm what it was before the branch came in. */
static void NAME(adaln_backward)(const struct adaln_backward *o, int64_t sample, int64_t first, int64_t last) {
    const int64_t C = o->width;
    const float *scale = o->scale + sample * o->scale_stride;
    const float *gate = o->branch ? o->gate + sample * o->gate_stride : NULL;
    float factor[MAX_WIDTH], stream[MAX_WIDTH], grad[MAX_WIDTH];
    float *along = o->along + sample * C, *shift = o->grad_shift ? o->grad_shift + sample * C : NULL;
    float *grad_gate = o->branch ? o->grad_gate + sample * C : NULL;
    float *closed = o->closing ? o->grad_closing + sample * C : NULL;
    for (int64_t i = 0; i < C; i++) factor[i] = (1.0f + scale[i]) * (o->weight ? o->weight[i] : 1.0f);
    for (int64_t row = first; row < last; row++) {
        const float *x = o->x + row * C, *branch = o->branch ? o->branch + row * C : NULL;
        const float *grad_normed = o->grad_normed + row * C;
        const float *grad_residual = o->grad_residual ? o->grad_residual + row * C : NULL;
        float *grad_x = o->grad_x + row * C;
        float before = 1.0f; /* 1 / root mean square of the stream before its closing norm */
        const float *y = x;
        if (o->closing) {
#pragma omp simd
            for (int64_t i = 0; i < C; i++) stream[i] = x[i] + gate[i] * branch[i];
            before = NAME(inverse_rms)(stream, C, o->eps);
#pragma omp simd
            for (int64_t i = 0; i < C; i++) {
                stream[i] *= before;
                grad[i] = stream[i] * o->closing[i];
            }
            y = grad;
        }
        const float inverse = NAME(inverse_rms)(y, C, o->eps);
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < C; i++) dot += grad_normed[i] * factor[i] * y[i];
        dot *= inverse * inverse / (float)C;
#pragma omp simd
        for (int64_t i = 0; i < C; i++) {
            along[i] += grad_normed[i] * y[i] * inverse;
            grad[i] = inverse * (grad_normed[i] * factor[i] - y[i] * dot) + (grad_residual ? grad_residual[i] : 0.0f);
        }
        if (shift) {
#pragma omp simd
            for (int64_t i = 0; i < C; i++) shift[i] += grad_normed[i];
        }
        if (o->closing) {
            dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < C; i++) {
                closed[i] += grad[i] * stream[i];
                grad[i] *= o->closing[i];
                dot += grad[i] * stream[i];
            }
            dot /= (float)C;
#pragma omp simd
            for (int64_t i = 0; i < C; i++) grad[i] = before * (grad[i] - stream[i] * dot);
        }
        memcpy(grad_x, grad, C * sizeof *grad);
        if (branch) {
            float *grad_branch = o->grad_branch + row * C;
#pragma omp simd
            for (int64_t i = 0; i < C; i++) {
                grad_gate[i] += grad[i] * branch[i];
                grad_branch[i] = grad[i] * gate[i];
            }
        }
    }
}

/* (a, b) -> (a·cos − b·sin, b·cos + a·sin) of the pairs of x [d], sign turned for the way back; no tables: as it is. */
static inline void NAME(rotate)(const float *x, const float *cosine, const float *sine, float sign, float *out, int64_t d) {
    if (!cosine) {
        memcpy(out, x, d * sizeof *x);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < d / 2; i++) {
        const float a = x[2 * i], b = x[2 * i + 1], s = sign * sine[i];
        out[2 * i] = a * cosine[i] - b * s;
        out[2 * i + 1] = b * cosine[i] + a * s;
    }
}

static void NAME(rope)(const struct rope *o, int64_t sample) {
    const int64_t N = o->tokens, H = o->heads, d = o->width;
    float scaled[MAX_HEAD];
    for (int64_t n = 0; n < N; n++) {
        const int64_t place = n - o->unrotated;
        const float *cosine = place < 0 ? NULL : o->cosine + place * (d / 2);
        const float *sine = place < 0 ? NULL : o->sine + place * (d / 2);
        const float *from = o->qkv + (sample * N + n) * 3 * H * d;
        for (int64_t which = 0; which < 3; which++) {
            const float *weight = which ? o->k_weight : o->q_weight;
            for (int64_t h = 0; h < H; h++) {
                const float *x = from + (which * H + h) * d;
                float *out = o->out + (sample * N + n) * 3 * H * d + (which * H + h) * d;
                if (which == 2) {
                    memcpy(out, x, d * sizeof *x);
                    continue;
                }
                const float inverse = NAME(inverse_rms)(x, d, o->eps);
#pragma omp simd
                for (int64_t i = 0; i < d; i++) scaled[i] = x[i] * inverse * weight[i];
                NAME(rotate)(scaled, cosine, sine, 1.0f, out, d);
            }
        }
    }
}

static void NAME(rope_backward)(const struct rope_backward *o, int64_t sample) {
    const int64_t N = o->tokens, H = o->heads, d = o->width;
    float turned[MAX_HEAD];
    float *sums = o->grad_weights + sample * 2 * d;
    for (int64_t n = 0; n < N; n++) {
        const int64_t place = n - o->unrotated;
        const float *cosine = place < 0 ? NULL : o->cosine + place * (d / 2);
        const float *sine = place < 0 ? NULL : o->sine + place * (d / 2);
        const int64_t row = (sample * N + n) * 3 * H * d;
        for (int64_t which = 0; which < 3; which++) {
            const float *weight = which ? o->k_weight : o->q_weight;
            for (int64_t h = 0; h < H; h++) {
                const int64_t at = row + (which * H + h) * d;
                const float *grad = o->grad + sample * o->strides[0] + n * o->strides[1] + which * o->strides[2] +
                                    h * o->strides[3];
                if (which == 2) {
                    memcpy(o->grad_qkv + at, grad, d * sizeof *grad);
                    continue;
                }
                const float *x = o->qkv + at;
                float *grad_x = o->grad_qkv + at, *sum = sums + which * d;
                const float inverse = NAME(inverse_rms)(x, d, o->eps);
                NAME(rotate)(grad, cosine, sine, -1.0f, turned, d);
                float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < d; i++) {
                    sum[i] += turned[i] * x[i] * inverse;
                    turned[i] *= weight[i];
                    dot += turned[i] * x[i];
                }
                dot *= inverse * inverse / (float)d;
#pragma omp simd
                for (int64_t i = 0; i < d; i++) grad_x[i] = inverse * (turned[i] - x[i] * dot);
            }
        }
    }
}

#define TALL (LANES == 16 ? 8 : 4) /* rows of the tallest tile: AVX-512 has 32 registers for its sums, others 16 */

typedef float NAME(vector) __attribute__((vector_size(4 * LANES)));

/* rows × vectors · LANES of C = A B, or with `more` of C += A B, with the sums in registers. Number k of row r of A is
 * A[r · lda + k · step], row k of B and row r of C are ldb and ldc apart. rows and vectors are constants where this is
 * called.
 */
static inline __attribute__((always_inline)) void NAME(tile)(
    const float *A, int64_t lda, int64_t step, int64_t K, const float *B, int64_t ldb, float *C, int64_t ldc, int rows,
    int vectors, int more
) {
    NAME(vector) sum[TALL][2] = {{{0}}};
    if (more)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) memcpy(&sum[r][v], C + r * ldc + v * LANES, sizeof sum[r][v]);
    for (int64_t k = 0; k < K; k++) {
        for (int v = 0; v < vectors; v++) {
            NAME(vector) b;
            memcpy(&b, B + k * ldb + v * LANES, sizeof b);
            for (int r = 0; r < rows; r++) sum[r][v] += A[r * lda + k * step] * b;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) memcpy(C + r * ldc + v * LANES, &sum[r][v], sizeof sum[r][v]);
}

/* C [n, m] = A [n, K] B [K, m]; m is a multiple of LANES. */
static void NAME(product)(
    const float *A, int64_t lda, int64_t step, int64_t n, int64_t K, const float *B, int64_t ldb, int64_t m, float *C,
    int64_t ldc
) {
    for (int64_t j = 0; j < m;) {
        const int two = m - j >= 2 * LANES;
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) {
            if (two)
                NAME(tile)(A + i * lda, lda, step, K, B + j, ldb, C + i * ldc + j, ldc, 4, 2, 0);
            else
                NAME(tile)(A + i * lda, lda, step, K, B + j, ldb, C + i * ldc + j, ldc, 4, 1, 0);
        }
        for (; i < n; i++) {
            if (two)
                NAME(tile)(A + i * lda, lda, step, K, B + j, ldb, C + i * ldc + j, ldc, 1, 2, 0);
            else
                NAME(tile)(A + i * lda, lda, step, K, B + j, ldb, C + i * ldc + j, ldc, 1, 1, 0);
        }
        j += two ? 2 * LANES : LANES;
    }
}

/* to [columns, MAX_TOKENS] = x [n, columns] turned, with rows of x `stride` apart; 0 from n to padded. */
static inline void NAME(turn)(const float *x, int64_t stride, int64_t n, int64_t padded, int64_t columns, float *to) {
    for (int64_t i = 0; i < columns; i++) {
        for (int64_t j = 0; j < n; j++) to[i * MAX_TOKENS + j] = x[j * stride + i];
        for (int64_t j = n; j < padded; j++) to[i * MAX_TOKENS + j] = 0.0f;
    }
}

/* Where one head of a sample stands: its first token, its tokens, these in whole vectors, floats from token to token in
 * qkv and in out, and of a row of its weights, which stand [keys, queries], so that a softmax runs down its columns. */
struct NAME(place) {
    int64_t first, n, padded, step, row, queries;
    const float *query, *key, *value;
    float *weights;
};

static inline struct NAME(place) NAME(place_of)(const struct attention *o, int64_t sample, int64_t head) {
    struct NAME(place) p;
    p.first = begin_of(o->offsets, o->tokens, sample);
    p.n = begin_of(o->offsets, o->tokens, sample + 1) - p.first;
    p.padded = (p.n + LANES - 1) / LANES * LANES;
    p.step = o->strides[1];
    p.row = o->heads * o->width;
    p.queries = (o->tokens + WIDEST - 1) / WIDEST * WIDEST;
    p.query = o->qkv + (o->offsets ? p.first * p.step : sample * o->strides[0]) + head * o->strides[3];
    p.key = p.query + o->strides[2];
    p.value = p.key + o->strides[2];
    p.weights = o->weights + (sample * o->heads + head) * o->tokens * p.queries;
    return p;
}

static void NAME(attention)(const struct attention *o, int64_t sample, int64_t head) {
    const struct NAME(place) p = NAME(place_of)(o, sample, head);
    const int64_t d = o->width;
    const float scale = 1.0f / sqrtf((float)d);
    float queries[MAX_HEAD * MAX_TOKENS], most[MAX_TOKENS], sum[MAX_TOKENS];
    NAME(turn)(p.query, p.step, p.n, p.padded, d, queries);
    NAME(product)(p.key, p.step, 1, p.n, d, queries, MAX_TOKENS, p.padded, p.weights, p.queries);
    for (int64_t i = 0; i < p.padded; i++) most[i] = -INFINITY, sum[i] = 0.0f;
    for (int64_t j = 0; j < p.n; j++) {
        const float *row = p.weights + j * p.queries;
#pragma omp simd
        for (int64_t i = 0; i < p.padded; i++) most[i] = row[i] > most[i] ? row[i] : most[i];
    }
    for (int64_t j = 0; j < p.n; j++) {
        float *row = p.weights + j * p.queries;
#pragma omp simd
        for (int64_t i = 0; i < p.padded; i++) {
            row[i] = NAME(exp)(scale * (row[i] - most[i]));
            sum[i] += row[i];
        }
    }
    for (int64_t i = 0; i < p.padded; i++) sum[i] = 1.0f / sum[i];
    for (int64_t j = 0; j < p.n; j++) {
        float *row = p.weights + j * p.queries;
#pragma omp simd
        for (int64_t i = 0; i < p.padded; i++) row[i] *= sum[i];
    }
    NAME(product)(p.weights, 1, p.queries, p.n, p.n, p.value, p.step, d, o->out + p.first * p.row + head * d, p.row);
}

static void NAME(attention_backward)(const struct attention *o, int64_t sample, int64_t head) {
    const struct NAME(place) p = NAME(place_of)(o, sample, head);
    const int64_t d = o->width;
    const float scale = 1.0f / sqrtf((float)d);
    const float *grad = o->grad + p.first * p.row + head * d;
    float *grad_query = o->grad_qkv + p.first * 3 * p.row + head * d, *grad_key = grad_query + p.row;
    float *grad_value = grad_key + p.row;
    float turned[MAX_HEAD * MAX_TOKENS], scores[MAX_TOKENS * MAX_TOKENS], along[MAX_TOKENS];
    NAME(turn)(grad, p.row, p.n, p.padded, d, turned);
    NAME(product)(p.value, p.step, 1, p.n, d, turned, MAX_TOKENS, p.padded, scores, MAX_TOKENS);
    for (int64_t i = 0; i < p.padded; i++) along[i] = 0.0f;
    for (int64_t j = 0; j < p.n; j++) {
        const float *weights = p.weights + j * p.queries, *row = scores + j * MAX_TOKENS;
#pragma omp simd
        for (int64_t i = 0; i < p.padded; i++) along[i] += weights[i] * row[i];
    }
    for (int64_t j = 0; j < p.n; j++) {
        const float *weights = p.weights + j * p.queries;
        float *row = scores + j * MAX_TOKENS;
#pragma omp simd
        for (int64_t i = 0; i < p.padded; i++) row[i] = scale * weights[i] * (row[i] - along[i]);
    }
    NAME(product)(scores, 1, MAX_TOKENS, p.n, p.n, p.key, p.step, d, grad_query, 3 * p.row);
    NAME(product)(scores, MAX_TOKENS, 1, p.n, p.n, p.query, p.step, d, grad_key, 3 * p.row);
    NAME(product)(p.weights, p.queries, 1, p.n, p.n, grad, p.row, d, grad_value, 3 * p.row);
}
