/* Products of whole matrices, and Newton-Schulz by them, for one set of vector instructions; cpu.c includes this behind
 * cpu_rows.h, whose tiles it takes. */

#define PANEL (2 * LANES)

/* C [n, PANEL] = A [n, K] B [K, PANEL], or C += A B; B lies together. */
static void NAME(tiles)(
    const float *A, int64_t lda, int64_t step, int64_t n, int64_t K, const float *B, float *C, int64_t ldc, int more
) {
    int64_t i = 0;
    for (; i + TALL <= n; i += TALL) NAME(tile)(A + i * lda, lda, step, K, B, PANEL, C + i * ldc, ldc, TALL, 2, more);
    for (; i < n; i++) NAME(tile)(A + i * lda, lda, step, K, B, PANEL, C + i * ldc, ldc, 1, 2, more);
}

/* PANEL columns of out [n, m] = alpha · a b + beta · plus, without `plus` of a b, and with `more` of out + a b; a
 * symmetric result's down to the diagonal alone, and then their mirror image. a [n, K] and b [K, m] lie in any order, by
 * their steps down and across; plus and out have whole rows. b is copied DEPTH rows at a time, so that all rows of a find
 * it in the nearest cache.
 */
static void NAME(panel)(
    const float *a, int64_t a_down, int64_t a_across, const float *b, int64_t b_down, int64_t b_across, int64_t n,
    int64_t K, int64_t m, int symmetric, int more, const float *plus, float alpha, float beta, float *out,
    int64_t column
) {
    const int64_t width = m - column < PANEL ? m - column : PANEL, height = symmetric ? column + width : n;
    const size_t row_bytes = sizeof(float) * (size_t)width;
    float copied[DEPTH * PANEL], edge[TALL * PANEL];
    if (width < PANEL) memset(copied, 0, sizeof copied), memset(edge, 0, sizeof edge);
    for (int64_t first = 0; first < K; first += DEPTH) {
        const int64_t depth = K - first < DEPTH ? K - first : DEPTH;
        const float *from = b + first * b_down + column * b_across, *left = a + first * a_across;
        if (b_across == 1)
            for (int64_t k = 0; k < depth; k++) memcpy(copied + k * PANEL, from + k * b_down, row_bytes);
        else
            for (int64_t j = 0; j < width; j++)
                for (int64_t k = 0; k < depth; k++) copied[k * PANEL + j] = from[k * b_down + j * b_across];
        if (width == PANEL) {
            NAME(tiles)(left, a_down, a_across, height, depth, copied, out + column, m, more || first);
            continue;
        }
        for (int64_t row = 0; row < height; row += TALL) {
            const int64_t rows = height - row < TALL ? height - row : TALL;
            float *to = out + row * m + column;
            for (int64_t i = 0; i < rows; i++) memcpy(edge + i * PANEL, to + i * m, row_bytes);
            NAME(tiles)(left + row * a_down, a_down, a_across, rows, depth, copied, edge, PANEL, more || first);
            for (int64_t i = 0; i < rows; i++) memcpy(to + i * m, edge + i * PANEL, row_bytes);
        }
    }
    for (int64_t row = 0; row < height; row++) {
        float *to = out + row * m + column;
        if (plus)
            for (int64_t j = 0; j < width; j++) to[j] = alpha * to[j] + beta * plus[row * m + column + j];
        if (symmetric && row < column)
            for (int64_t j = 0; j < width; j++) out[(column + j) * m + row] = to[j];
    }
}

/* out [n, m] = alpha · a b + beta · plus of matrices with whole rows; plus may be missing. */
static void NAME(multiply)(
    const float *a, const float *b, int64_t n, int64_t K, int64_t m, const float *plus, float alpha, float beta,
    float *out
) {
    for (int64_t column = 0; column < m; column += PANEL)
        NAME(panel)(a, K, 1, b, m, 1, n, K, m, 0, 0, plus, alpha, beta, out, column);
}

/* out [r, r] = alpha · a b + beta · plus of symmetric matrices that commute, which the result then is, too. */
static void NAME(multiply_symmetric)(
    const float *a, const float *b, int64_t r, const float *plus, float alpha, float beta, float *out
) {
    for (int64_t column = 0; column < r; column += PANEL)
        NAME(panel)(a, r, 1, b, r, 1, r, r, r, 1, 0, plus, alpha, beta, out, column);
}

/* X Xᵀ [r, r] of x [r, c]; of a tall x [c, r] Xᵀ X. */
static void NAME(gram)(const float *x, int64_t r, int64_t c, int tall, float *out) {
    const int64_t down = tall ? 1 : c, across = tall ? r : 1;
    for (int64_t column = 0; column < r; column += PANEL)
        NAME(panel)(x, down, across, x, across, down, r, c, r, 1, 0, NULL, 1.0f, 0.0f, out, column);
}

/* Some rows and a panel of a b, up to DEPTH summands from one on; those before are in out. */
static void NAME(summands)(const struct matmul *o, int64_t row, int64_t rows, int64_t column, int64_t first) {
    const float *a = o->a + row * o->a_down + first * o->a_across, *b = o->b + first * o->b_down;
    const int64_t depth = o->depth - first < DEPTH ? o->depth - first : DEPTH;
    NAME(panel)(
        a, o->a_down, o->a_across, b, o->b_down, o->b_across, rows, depth, o->columns, 0, first > 0, NULL, 1.0f, 0.0f,
        o->out + row * o->columns, column
    );
}

/* The iteration of optim.py for one matrix, with `work` of its thread alone: [4, r, r], or [2, r, r] and [r, c]. */
static void NAME(newton_schulz)(const struct newton_schulz *o, int64_t matrix, float *work) {
    const int64_t elements = o->rows * o->columns;
    const int tall = o->rows > o->columns;
    const int64_t r = tall ? o->columns : o->rows, c = tall ? o->rows : o->columns;
    const float *g = o->g + matrix * elements;
    float *out = o->out + matrix * elements, *gram = work, *factor = work + r * r;
    double squares = 0.0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < elements; i++) squares += (double)g[i] * g[i];
    const float norm = (float)sqrt(squares), least = norm < o->eps ? o->eps : norm; /* no number stays none */
    if (o->in_gram) {
        float *product = work + 2 * r * r, *spare = work + 3 * r * r;
        for (int64_t i = 0; i < elements; i++) out[i] = g[i] / least;
        NAME(gram)(out, r, c, tall, gram);
        for (int64_t step = 0; step < o->steps; step++) {
            NAME(multiply_symmetric)(gram, gram, r, gram, o->quintic, o->cubic, factor);
            for (int64_t i = 0; i < r; i++) factor[i * r + i] += o->linear;
            if (step == 0) {
                memcpy(product, factor, sizeof(float) * (size_t)(r * r));
            } else {
                float *before = product;
                /* In full, and on the side of the last product: what is rounded off the factor then meets product · X,
                 * whose singular values are near 1, and not the product, which lifts the small ones 485 times. */
                if (tall)
                    NAME(multiply)(before, factor, r, r, r, NULL, 1.0f, 0.0f, spare);
                else
                    NAME(multiply)(factor, before, r, r, r, NULL, 1.0f, 0.0f, spare);
                product = spare;
                spare = before;
            }
            if (step + 1 < o->steps) {
                NAME(multiply_symmetric)(factor, gram, r, NULL, 1.0f, 0.0f, spare);
                NAME(multiply_symmetric)(spare, factor, r, NULL, 1.0f, 0.0f, gram);
            }
        }
        for (int64_t i = 0; i < r * r; i++) product[i] *= o->scale / least;
        if (tall)
            NAME(multiply)(g, product, c, r, r, NULL, 1.0f, 0.0f, out);
        else
            NAME(multiply)(product, g, r, r, c, NULL, 1.0f, 0.0f, out);
        return;
    }
    float *x = work + 2 * r * r, *next = out; /* a step writes from one to the other, the last into out */
    if (o->steps % 2 == 0) next = x, x = out;
    const float first = o->steps ? 1.0f : o->scale;
    for (int64_t i = 0; i < elements; i++) x[i] = first * (g[i] / least);
    for (int64_t step = 0; step < o->steps; step++) {
        const float last = step + 1 == o->steps ? o->scale : 1.0f;
        NAME(gram)(x, r, c, tall, gram);
        NAME(multiply_symmetric)(gram, gram, r, gram, o->quintic, o->cubic, factor);
        if (tall)
            NAME(multiply)(x, factor, c, r, r, x, last, last * o->linear, next);
        else
            NAME(multiply)(factor, x, r, r, c, x, last, last * o->linear, next);
        float *before = x;
        x = next;
        next = before;
    }
}

#undef PANEL
#undef TALL
