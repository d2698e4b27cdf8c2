/* What both ways of convolving share: the matrix product, and the pooling behind it. */

#pragma once
#include "vectors.h"

/* Matrix product in registers: c (ROWS, columns x LANES) = or += sum over k of a[row, k] * b[k, :]. Of `next`, what is multiplied
   after it, it asks for `depth` vectors. */
static inline __attribute__((always_inline)) void product_of(const int columns, const float *a, long a_row, long a_k,
                                                             const float *b, long b_k, long depth, float *c, long c_row,
                                                             int add, const float *next) {
    vector sums[ROWS][COLUMNS];
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < columns; column++)
            sums[row][column] = add ? (vector)*(const loose *)(c + row * c_row + column * LANES) : (vector){0};
    for (long k = 0; k < depth; k++) {
        vector others[COLUMNS];
        __builtin_prefetch(next + k * LANES, 0, 2);
        for (int column = 0; column < columns; column++) others[column] = *(const loose *)(b + k * b_k + column * LANES);
        for (int row = 0; row < ROWS; row++) {
            float unit = a[row * a_row + k * a_k];
            for (int column = 0; column < columns; column++)
                sums[row][column] = multiply_add(sums[row][column], unit, others[column]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < columns; column++)
            *(loose *)(c + row * c_row + column * LANES) = sums[row][column];
}

static void product(long columns, const float *a, long a_row, long a_k, const float *b, long b_k, long depth, float *c,
                    long c_row, int add, const float *next) {
    switch (columns) {
        case 1: product_of(1, a, a_row, a_k, b, b_k, depth, c, c_row, add, next); break;
#if COLUMNS > 1
        case 2: product_of(2, a, a_row, a_k, b, b_k, depth, c, c_row, add, next); break;
#endif
#if COLUMNS > 2
        case 3: product_of(3, a, a_row, a_k, b, b_k, depth, c, c_row, add, next); break;
        case 4: product_of(4, a, a_row, a_k, b, b_k, depth, c, c_row, add, next); break;
#endif
    }
}

/* 2x2 max pooling of a window whose rows and pixels lie so many vectors apart, at least zero with `relu`. `where` is the first of
   its pixels that has its maximum, 0 to 3, or 4 where `relu` has made a zero of it. A NaN stays. */
static inline vector pool(const vector *window, long row_apart, long pixel_apart, vector shift, long relu, whole *where) {
    vector most = *window;
    *where = (whole){0};
    for (int pixel = 1; pixel < 4; pixel++) {
        vector other = window[pixel / 2 * row_apart + pixel % 2 * pixel_apart];
        whole more = (whole)(other > most) | (whole)(other != other);
        most = choose(more, other, most);
        *where = (more & pixel) | (~more & *where);
    }
    most += shift;
    if (relu) {
        whole kept = (whole)(most > 0);
        *where = (kept & *where) | (~kept & 4);
        most = choose((whole)(most < 0), (vector){0}, most);
    }
    return most;
}
