/* Pooling and sums over images (N, H, W, C): work that is limited by memory, done in one pass over it. */

#include "vectors.h"

typedef int32_t whole __attribute__((vector_size(4 * LANES)));

static inline vector choose(whole which, vector yes, vector no) {
    return (vector)((which & (whole)yes) | (~which & (whole)no));
}

/* The greater one; a NaN stays. */
static inline vector greater(vector a, vector b) { return choose((whole)(b > a) | (whole)(b != b), b, a); }

/* y (N, H/2, W/2, C): the maximum of each 2x2 window of x, rounded down to whole windows; at least zero with `relu`. */
void max_pool(const element *x, element *y, long n, long h, long w, long c, long relu, long threads) {
    long height = h / 2, width = w / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < n * height; row++)
        for (long column = 0; column < width; column++) {
            const element *from = x + ((row / height * h + row % height * 2) * w + 2 * column) * c;
            element *to = y + (row * width + column) * c;
            for (long channel = 0; channel < c; channel += LANES) {
                lanes which = lanes_of(c - channel);
                const element *window = from + channel;
                vector most = greater(greater(load(window, which), load(window + c, which)),
                                      greater(load(window + w * c, which), load(window + w * c + c, which)));
                if (relu) most = choose((whole)(most < 0), (vector){0}, most);
                store(to + channel, most, which);
            }
        }
}

/* dx (N, H, W, C) from dy (N, H/2, W/2, C): to the first of each window's pixels that is its maximum, and none where `relu`
   has made a zero of it. */
void max_pool_gradient(const element *x, const element *y, const element *dy, element *dx, long n, long h, long w, long c,
                       long relu, long threads) {
    long height = h / 2, width = w / 2;
    const vector zero = {0};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < n * height; row++) {
        long corner = (row / height * h + row % height * 2) * w;
        for (long column = 0; column < width; column++)
            for (long channel = 0; channel < c; channel += LANES) {
                lanes which = lanes_of(c - channel);
                long pooled = (row * width + column) * c + channel;
                vector most = load(y + pooled, which), left = load(dy + pooled, which);
                if (relu) left = choose((whole)(most > 0), left, zero);
                for (int pixel = 0; pixel < 4; pixel++) {
                    long at = (corner + pixel / 2 * w + 2 * column + pixel % 2) * c + channel;
                    whole here = (whole)(load(x + at, which) == most);
                    store(dx + at, choose(here, left, zero), which);
                    left = choose(here, zero, left);
                }
            }
        /* What no window covers: an odd column, an odd row. */
        for (long down = 0; w % 2 && down < 2; down++)
            memset(dx + (corner + down * w + w - 1) * c, 0, c * sizeof(element));
        if (h % 2 && row % height == height - 1) memset(dx + (corner + 2 * w) * c, 0, w * c * sizeof(element));
    }
}

/* sums (C) over all rows of x (rows, C). `parts` are PARTS x C floats: rows are summed in as many parts, whatever the number
   of threads. */
#define PARTS 64
void channel_sums(const element *x, float *sums, float *parts, long rows, long c, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < PARTS; part++) {
        long begin = rows * part / PARTS, end = rows * (part + 1) / PARTS;
        for (long channel = 0; channel < c; channel += LANES) {
            lanes which = lanes_of(c - channel);
            vector sum = {0};
            for (long row = begin; row < end; row++) sum += load(x + row * c + channel, which);
            memcpy(parts + part * c + channel, &sum, 4 * min(c - channel, LANES));
        }
    }
    for (long channel = 0; channel < c; channel++) {
        float sum = 0;
        for (long part = 0; part < PARTS; part++) sum += parts[part * c + channel];
        sums[channel] = sum;
    }
}
