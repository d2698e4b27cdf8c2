/* What both ways of convolving share: the matrix product, and the pooling behind it. */

#pragma once
#include "products.h"

/* 2x2 max pooling of a window whose rows and pixels lie so many vectors apart, at least zero with `relu`. `where` is the first of
   its pixels that has its maximum, 0 to 3, or 4 where `relu` has made a zero of it. A NaN stays. */
static inline vector pool(const vector *window, long row_apart, long pixel_apart, vector shift, long relu, ints *where) {
    vector most = *window;
    *where = (ints){0};
    for (int pixel = 1; pixel < 4; pixel++) {
        vector other = window[pixel / 2 * row_apart + pixel % 2 * pixel_apart];
        ints more = (ints)(other > most) | (ints)(other != other);
        most = blend(more, other, most);
        *where = (more & pixel) | (~more & *where);
    }
    most += shift;
    if (relu) {
        ints kept = (ints)(most > 0);
        *where = (kept & *where) | (~kept & 4);
        most = blend((ints)(most < 0), (vector){0}, most);
    }
    return most;
}
