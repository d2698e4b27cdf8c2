/* Pooling, normalisation and sums over images (N, H, W, C): work that is limited by memory, done in as few passes over it as
   can be. */

#include "vectors.h"

#define AT_ONCE 64 /* rows whose channels stay in a core's cache */

/* The greater one; a NaN stays. */
static inline vector greater(vector a, vector b) { return blend((ints)(b > a) | (ints)(b != b), b, a); }

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
                if (relu) most = blend((ints)(most < 0), (vector){0}, most);
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
                if (relu) left = blend((ints)(most > 0), left, zero);
                for (int pixel = 0; pixel < 4; pixel++) {
                    long at = (corner + pixel / 2 * w + 2 * column + pixel % 2) * c + channel;
                    ints here = (ints)(load(x + at, which) == most);
                    store(dx + at, blend(here, left, zero), which);
                    left = blend(here, zero, left);
                }
            }
        /* What no window covers: an odd column, an odd row. */
        for (long down = 0; w % 2 && down < 2; down++)
            memset(dx + (corner + down * w + w - 1) * c, 0, c * sizeof(element));
        if (h % 2 && row % height == height - 1) memset(dx + (corner + 2 * w) * c, 0, w * c * sizeof(element));
    }
}

/* sums (C) over all rows of x (rows, C), or, where `picked` (rows, C) is not NULL, over those elements of which it is below 4;
   `threshold`: of the dropout behind them, or zero. `parts`: so many floats as `sums_scratch` says. */
long sums_scratch(long c) { return 3 * PARTS * c; }

void channel_sums(const element *x, const uint8_t *picked, float *sums, float *parts, long rows, long c, long threshold,
                  long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < PARTS; part++) {
        long begin = rows * part / PARTS, end = rows * (part + 1) / PARTS;
        memset(parts + part * c, 0, c * sizeof(float));
        for (long block = begin; block < end; block += AT_ONCE)
            for (long channel = 0; channel < c; channel += LANES) {
                lanes which = lanes_of(c - channel);
                vector sum = load_floats(parts + part * c + channel, which);
                for (long row = block; row < min(block + AT_ONCE, end); row++) {
                    vector value = load(x + row * c + channel, which);
                    prefetch_ahead(x + row * c + channel, AT_ONCE * c);
                    if (picked) value = (vector)((ints)value & (load_bytes(picked + row * c + channel, which) < 4));
                    sum += value;
                }
                store_floats(parts + part * c + channel, sum, which);
            }
    }
    for (long channel = 0; channel < c; channel++) {
        float sum = 0;
        for (long part = 0; part < PARTS; part++) sum += parts[part * c + channel];
        sums[channel] = sum * kept_scale(threshold);
    }
}

/* Random bits of (key, a, b) in place of a and b: Threefry-2x32 of 20 rounds, Salmon et al., "Parallel Random Numbers: As Easy
   as 1, 2, 3" (2011). */
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

static inline void threefry(const uint32_t *key, bits *a, bits *b) {
    static const int turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    const uint32_t keys[3] = {key[0], key[1], 0x1BD11BDA ^ key[0] ^ key[1]};
    *a += keys[0], *b += keys[1];
#pragma GCC unroll 5
    for (int four = 0; four < 5; four++) {
#pragma GCC unroll 4
        for (int round = 0; round < 4; round++) {
            int turn = turns[four % 2 * 4 + round];
            *a += *b;
            *b = (*b << turn | *b >> (32 - turn)) ^ *a;
        }
        *a += keys[(four + 1) % 3], *b += keys[(four + 2) % 3] + four + 1;
    }
}

/* The bytes of `rng.random_bytes`, functions of (key, stream, place) alone: of 8 x WORDS elements from `start` on, 16 i + j has byte
   i of pair j, of which the words of LANES pairs from `first` on come at a time. */
#define WORDS 16
static inline void draw(const uint32_t *key, long stream, long start, long first, bits words[2]) {
    for (int lane = 0; lane < LANES; lane++) words[0][lane] = (uint32_t)(start / 8 + first + lane);
    words[1] = (bits){0} + (uint32_t)stream;
    threefry(key, &words[0], &words[1]);
}

static inline ints byte_of(const bits words[2], long byte) {
    return (ints)(words[byte / 4] >> (uint32_t)(byte % 4 * 8) & 255);
}

void random_bytes(uint8_t *bytes, long count, long low_key, long high_key, long stream, long threads) {
    const uint32_t key[2] = {low_key, high_key};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long start = 0; start < count; start += 8 * WORDS)
        for (long first = 0; first < WORDS; first += LANES) {
            bits words[2];
            draw(key, stream, start, first, words);
            for (long byte = 0; byte < 8; byte++) {
                long i = start + byte * WORDS + first;
                store_bytes(bytes + i, byte_of(words, byte), lanes_of(count - i));
            }
        }
}

/* y = x / (1 - threshold / 256) where a random byte is at least `threshold`, else zero: dropout, and its gradient. */
void drop(const element *x, element *y, long count, long threshold, long low_key, long high_key, long stream, long threads) {
    const uint32_t key[2] = {low_key, high_key};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long start = 0; start < count; start += 8 * WORDS)
        for (long first = 0; first < WORDS; first += LANES) {
            bits words[2];
            draw(key, stream, start, first, words);
            for (long byte = 0; byte < 8; byte++) {
                long i = start + byte * WORDS + first;
                lanes which = lanes_of(count - i);
                ints kept = byte_of(words, byte) >= (int32_t)threshold;
                store(y + i, blend(kept, load(x + i, which) * kept_scale(threshold), (vector){0}), which);
            }
        }
}

/* The sum, or with `squares` the sum of squares, of rows of x less `origin`. */
static inline vector sum_from(const element *x, vector origin, lanes which, long begin, long end, long c, int squares) {
    vector sum = {0};
    for (long row = begin; row < end; row++) {
        vector away = load(x + row * c, which) - origin;
        if (!squares) prefetch_ahead(x + row * c, AT_ONCE * c);
        sum += squares ? away * away : away;
    }
    return sum;
}

/* For each channel of x (rows, C) its mean and variance (C). Parts of the rows are summed apart, each as differences from the
   mean of its first rows, so that a mean far from zero costs no digits, and then joined (Chan, Golub and LeVeque, 1983).
   `parts`: as of `channel_sums`. */
void moments(const element *x, float *mean, float *variance, float *parts, long rows, long c, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < PARTS; part++) {
        long begin = rows * part / PARTS, end = rows * (part + 1) / PARTS;
        float *origins = parts + 3 * part * c, *sums = origins + c, *squares = sums + c;
        memset(origins, 0, 3 * c * sizeof(float));
        for (long block = begin; block < end; block += AT_ONCE)
            for (long channel = 0; channel < c; channel += LANES) {
                lanes which = lanes_of(c - channel);
                long stop = min(block + AT_ONCE, end);
                if (block == begin) {
                    vector first = sum_from(x + channel, (vector){0}, which, begin, stop, c, 0) * (1.0f / (stop - begin));
                    store_floats(origins + channel, first, which);
                }
                vector origin = load_floats(origins + channel, which);
                vector sum = sum_from(x + channel, origin, which, block, stop, c, 0);
                vector square = sum_from(x + channel, origin, which, block, stop, c, 1);
                store_floats(sums + channel, load_floats(sums + channel, which) + sum, which);
                store_floats(squares + channel, load_floats(squares + channel, which) + square, which);
            }
    }
    for (long channel = 0; channel < c; channel++) {
        double middle = 0, squares = 0, count = 0;
        for (long part = 0; part < PARTS; part++) {
            long n = rows * (part + 1) / PARTS - rows * part / PARTS;
            if (n == 0) continue;
            const float *found = parts + 3 * part * c + channel;
            double sum = found[c], square = found[2 * c], away = found[0] + sum / n - middle;
            squares += square - sum * sum / n + away * away * count * n / (count + n);
            middle += away * n / (count + n);
            count += n;
        }
        mean[channel] = middle, variance[channel] = squares > 0 ? squares / rows : squares * 0;
    }
}

/* e^x for x <= 0, to about a float's precision: 2^n e^r, where r lies within half of ln 2 of zero. */
static inline vector exponential(vector x) {
    x = blend((ints)(x < -87), (vector){0} - 87, x);
    vector shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: n stands in its low bits */
    vector n = shifted - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector power = 1 + r * (1 + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    return (vector)((ints)power + ((ints)shifted << 23));
}

/* The standard normal distribution at z, and its density: Abramowitz and Stegun (1964), 7.1.26, error below 1e-7. */
static inline vector normal(vector z, vector *density) {
    vector far = (vector)((ints)z & 0x7FFFFFFF), bell = exponential(-0.5f * z * z);
    vector t = 1 / (1 + 0.231641888f * far);
    vector tail = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    *density = 0.398942280f * bell;
    return blend((ints)(z > 0), 1 - tail, tail);
}

enum { LINEAR, RELU, GELU };

/* What is the same for z and -z, but for a sign, in GELU and in its slope: beside a ReLU, and above 1/2. */
static inline vector gelu_beside_relu(vector far) {
    vector density;
    return far * normal(-far, &density);
}

static inline vector gelu_slope_above_half(vector far) {
    vector density, below = normal(far, &density);
    return below - 0.5f + far * density;
}

#ifdef BFLOAT16
/* A function of what is at least zero, as parabolas side by side up to LAST, each through three of its points: off by less than
   5e-5, where rounding to bfloat16 costs 2e-3 below one. Behind LAST it stays as it ends: 1.4e-6 for the first of those above,
   1/2 + 7e-6 for the second. */
#define PIECES (2 * LANES)
#define LAST 5.0f
typedef struct {
    vector terms[3][2]; /* constant, linear and quadratic in far * PIECES / LAST: two vectors hold those of all pieces */
} curve;

static inline curve tabulated(vector function(vector)) {
    curve table;
    for (int half = 0; half < 2; half++) {
        vector start;
        for (int lane = 0; lane < LANES; lane++) start[lane] = half * LANES + lane;
        vector left = function(start * (LAST / PIECES)), middle = function((start + 0.5f) * (LAST / PIECES));
        vector right = function((start + 1) * (LAST / PIECES));
        vector bend = 2 * (left - 2 * middle + right), rise = right - left - bend;
        table.terms[0][half] = left - start * (rise - start * bend);
        table.terms[1][half] = rise - 2 * start * bend;
        table.terms[2][half] = bend;
    }
    return table;
}

static inline vector looked_up(const curve *table, vector z) {
    vector far = (vector)((ints)z & 0x7FFFFFFF);
    /* In this order: of a NaN and a number the second is taken, so a NaN stays. */
    __m512 place = _mm512_min_ps(_mm512_set1_ps(PIECES - 1e-5f), (__m512)far * (PIECES / LAST));
    __m512i piece = _mm512_cvttps_epi32(place);
    __m512 terms[3];
    for (int i = 0; i < 3; i++)
        terms[i] = _mm512_permutex2var_ps((__m512)table->terms[i][0], piece, (__m512)table->terms[i][1]);
    return (vector)(terms[0] + place * (terms[1] + place * terms[2]));
}

static inline vector gelu(vector z, const curve *beside_relu) {
    /* What is beyond the table is its last value: the product keeps an infinity from becoming a number. */
    return blend((ints)(z < 0), (vector){0}, z) - looked_up(beside_relu, z) + z * 0;
}

static inline vector gelu_slope(vector z, const curve *above_half) {
    return 0.5f + (vector)((ints)looked_up(above_half, z) ^ ((ints)z & INT32_MIN));
}
#else
typedef int curve; /* none */
static inline curve tabulated(vector function(vector)) { return (void)function, 0; }

static inline vector gelu(vector z, const curve *none) {
    vector density;
    return (void)none, z * normal(z, &density);
}

static inline vector gelu_slope(vector z, const curve *none) {
    vector density, below = normal(z, &density);
    return (void)none, below + z * density;
}
#endif

/* `table`: for GELU that of gelu_beside_relu. */
static inline vector activated(vector z, long activation, const curve *table) {
    if (activation == GELU) return gelu(z, table);
    return activation == RELU ? blend((ints)(z < 0), (vector){0}, z) : z;
}

/* `table`: for GELU that of gelu_slope_above_half. */
static inline vector slope(vector z, long activation, const curve *table) {
    if (activation == GELU) return gelu_slope(z, table);
    return activation == RELU ? blend((ints)(z > 0), (vector){0} + 1, (vector){0}) : (vector){0} + 1;
}

/* y (rows, C) = activation((x - mean) * scale + shift + other), the middle three (C); `other` (rows, C) is NULL where nothing is
   added. */
static inline __attribute__((always_inline)) void normalise_as(const int activation, const element *x, const element *other,
                                                               element *y, const float *mean, const float *scale,
                                                               const float *shift, long rows, long c, long threads) {
    const curve table = tabulated(gelu_beside_relu);
#pragma omp parallel for schedule(static) num_threads(threads) firstprivate(table)
    for (long row = 0; row < rows; row++)
        for (long channel = 0; channel < c; channel += LANES) {
            lanes which = lanes_of(c - channel);
            prefetch_ahead(x + row * c + channel, FURTHER), prefetch_ahead_to_write(y + row * c + channel, FURTHER);
            vector centred = load(x + row * c + channel, which) - load_floats(mean + channel, which);
            vector z = centred * load_floats(scale + channel, which) + load_floats(shift + channel, which);
            if (other) {
                prefetch_ahead(other + row * c + channel, FURTHER);
                z += load(other + row * c + channel, which);
            }
            store(y + row * c + channel, activated(z, activation, &table), which);
        }
}

void normalise(const element *x, const element *other, element *y, const float *mean, const float *scale, const float *shift,
               long rows, long c, long activation, long threads) {
    switch (activation) {
        case LINEAR: normalise_as(LINEAR, x, other, y, mean, scale, shift, rows, c, threads); break;
        case RELU: normalise_as(RELU, x, other, y, mean, scale, shift, rows, c, threads); break;
        case GELU: normalise_as(GELU, x, other, y, mean, scale, shift, rows, c, threads); break;
    }
}

/* dx (rows, C), the gradient of `shift` (C) and, where there is one, that of `other` (rows, C), from dy, where mean and scale are
   those of the rows themselves: Ioffe and Szegedy (2015). The first pass leaves the gradient before the activation, which is that of
   `other`, in of_other or, where there is none, in dx. `parts`: as of `channel_sums`. */
static inline __attribute__((always_inline)) void normalise_gradient_as(
    const int activation, const element *x, const element *other, const element *dy, element *dx, element *of_other, const float *mean,
    const float *scale, const float *shift, float *of_shift, float *parts, long rows, long c, long threads) {
    element *before = other ? of_other : dx;
    const curve table = tabulated(gelu_slope_above_half);
#pragma omp parallel for schedule(static) num_threads(threads) firstprivate(table)
    for (long part = 0; part < PARTS; part++) {
        long begin = rows * part / PARTS, end = rows * (part + 1) / PARTS;
        float *sums = parts + 2 * part * c, *products = sums + c;
        memset(sums, 0, 2 * c * sizeof(float));
        for (long block = begin; block < end; block += AT_ONCE)
            for (long channel = 0; channel < c; channel += LANES) {
                lanes which = lanes_of(c - channel);
                vector middle = load_floats(mean + channel, which), by = load_floats(scale + channel, which);
                vector up = load_floats(shift + channel, which);
                vector sum = load_floats(sums + channel, which), product = load_floats(products + channel, which);
                for (long row = block; row < min(block + AT_ONCE, end); row++) {
                    vector normal = (load(x + row * c + channel, which) - middle) * by;
                    vector z = normal + up;
                    if (other) {
                        prefetch_ahead(other + row * c + channel, AT_ONCE * c);
                        z += load(other + row * c + channel, which);
                    }
                    vector gradient = load(dy + row * c + channel, which) * slope(z, activation, &table);
                    sum += gradient, product += gradient * normal;
                    store(before + row * c + channel, gradient, which);
                    prefetch_ahead(x + row * c + channel, AT_ONCE * c), prefetch_ahead(dy + row * c + channel, AT_ONCE * c);
                    prefetch_ahead_to_write(before + row * c + channel, AT_ONCE * c);
                }
                store_floats(sums + channel, sum, which), store_floats(products + channel, product, which);
            }
    }
    for (long part = 1; part < PARTS; part++)
        for (long each = 0; each < 2 * c; each++) parts[each] += parts[2 * part * c + each];
    memcpy(of_shift, parts, c * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; row++)
        for (long channel = 0; channel < c; channel += LANES) {
            lanes which = lanes_of(c - channel);
            vector by = load_floats(scale + channel, which);
            vector normal = (load(x + row * c + channel, which) - load_floats(mean + channel, which)) * by;
            vector sum = load_floats(parts + channel, which), product = load_floats(parts + c + channel, which);
            vector gradient = load(before + row * c + channel, which) - (sum + normal * product) * (1.0f / rows);
            store(dx + row * c + channel, gradient * by, which);
            prefetch_ahead(x + row * c + channel, FURTHER), prefetch_ahead_to_write(dx + row * c + channel, FURTHER);
            if (other) prefetch_ahead(before + row * c + channel, FURTHER);
        }
}

void normalise_gradient(const element *x, const element *other, const element *dy, element *dx, element *of_other, const float *mean,
                        const float *scale, const float *shift, float *of_shift, float *parts, long rows, long c, long activation,
                        long threads) {
#define GRADIENT(of) normalise_gradient_as(of, x, other, dy, dx, of_other, mean, scale, shift, of_shift, parts, rows, c, threads)
    switch (activation) {
        case LINEAR: GRADIENT(LINEAR); break;
        case RELU: GRADIENT(RELU); break;
        case GELU: GRADIENT(GELU); break;
    }
#undef GRADIENT
}

/* z (columns, O): a row of the convolution of a map of floats (., W, C) with filters (side, side, C, O), `rows` pixels at a
   time. What a row of the filters sees lies side by side in the map. */
static inline __attribute__((always_inline)) void convolve_row(const int rows, const float *x, const float *filters, float *z,
                                                               long width, long w, long c, long o, long side) {
    for (long out = 0; out < o; out += LANES) {
        lanes which = lanes_of(o - out);
        for (long column = 0; column < width; column += rows) {
            long first = min(column, width - rows); /* the last ones perhaps twice */
            vector sums[ROWS];
            for (int i = 0; i < rows; i++) sums[i] = (vector){0};
            for (long down = 0; down < side; down++)
                for (long tap = 0; tap < side * c; tap++) {
                    const float *seen = x + (down * w + first) * c + tap;
                    vector weight = load_floats(filters + (down * side * c + tap) * o + out, which);
                    for (int i = 0; i < rows; i++) sums[i] += seen[i * c] * weight;
                }
            for (int i = 0; i < rows; i++) store_floats(z + (first + i) * o + out, sums[i], which);
        }
    }
}

/* y (N, H - side + 1, W - side + 1, O): `activation` of the convolution of images x, floats (N, H, W, C), with filters
   (side, side, C, O). `own`: (W - side + 1) O floats or more for each thread, `each` apart. */
void convolve_pixels(const float *x, const float *filters, element *y, float *own, long each, long n, long h, long w, long c, long o,
                     long side, long activation, long threads) {
    long height = h - side + 1, width = w - side + 1;
    const curve table = tabulated(gelu_beside_relu);
#pragma omp parallel for schedule(static) num_threads(threads) firstprivate(table)
    for (long row = 0; row < n * height; row++) {
        float *z = own + omp_get_thread_num() * each;
        const float *from = x + (row / height * h + row % height) * w * c;
        element *to = y + row * width * o;
        if (width < ROWS) convolve_row(1, from, filters, z, width, w, c, o, side);
        else convolve_row(ROWS, from, filters, z, width, w, c, o, side);
        for (long i = 0; i < width * o; i += LANES) {
            lanes which = lanes_of(width * o - i);
            prefetch_ahead_to_write(to + i, FURTHER);
            store(to + i, activated(load_floats(z + i, which), activation, &table), which);
        }
    }
}

/* y (pixels, C) = (x - shift) * scale of bytes x, the last two (C), which vectors of LANES repeat every C. */
void normalise_pixels(const uint8_t *x, float *y, const float *shift, const float *scale, long pixels, long c, long threads) {
    vector low[c], by[c];
    for (long i = 0; i < c * LANES; i++) low[i / LANES][i % LANES] = shift[i % c], by[i / LANES][i % LANES] = scale[i % c];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long start = 0; start < pixels; start += LANES)
        for (long channel = 0; channel < c; channel++) {
            long i = start * c + channel * LANES;
            lanes which = lanes_of(pixels * c - i);
            vector pixel = __builtin_convertvector(load_bytes(x + i, which), vector);
            store_floats(y + i, (pixel - low[channel]) * by[channel], which);
        }
}

_Static_assert(AT_ONCE * 255 * 255 < 1 << 24, "a float holds the squares of so many bytes in sum");

/* sums (2, C): over all bytes of each channel of x (rows, W, C) their sum, and that of their squares, exactly: in floats over so
   few rows that they hold every whole number there. `parts`: so many of the same as `sums_scratch` says. */
void byte_sums(const uint8_t *x, int64_t *sums, int64_t *parts, long rows, long w, long c, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < PARTS; part++) {
        int64_t *to = parts + 2 * part * c;
        long each = w * c, end = rows * (part + 1) / PARTS;
        memset(to, 0, 2 * c * sizeof(int64_t));
        for (long block = rows * part / PARTS; block < end; block += AT_ONCE)
            for (long i = 0, channel = 0; i < each; i += LANES) {
                lanes which = lanes_of(each - i);
                vector sum = {0}, square = {0};
                for (long row = block; row < min(block + AT_ONCE, end); row++) {
                    vector pixel = __builtin_convertvector(load_bytes(x + row * each + i, which), vector);
                    sum += pixel, square += pixel * pixel;
                    prefetch_ahead(x + row * each + i, AT_ONCE * each);
                }
                for (long lane = 0; lane < min(LANES, each - i); lane++) {
                    to[channel] += (int64_t)sum[lane], to[c + channel] += (int64_t)square[lane];
                    if (++channel == c) channel = 0;
                }
            }
    }
    memset(sums, 0, 2 * c * sizeof(int64_t));
    for (long i = 0; i < 2 * PARTS * c; i++) sums[i % (2 * c)] += parts[i];
}

/* How many of so many floats, or elements where there are no floats, are NaN or larger than `limit` on either side. */
#define FEW 4096
long count_beyond(const float *floats, const element *elements, const float *limit, long count, long threads) {
    const vector most = (vector){0} + *limit;
    long found = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : found) if (count > 4 * FEW)
    for (long start = 0; start < count; start += FEW) {
        ints here = {0};
        for (long i = start; i < min(start + FEW, count); i += LANES) {
            lanes which = lanes_of(count - i);
            vector value = floats ? load_floats(floats + i, which) : load(elements + i, which);
            here -= ~((ints)(value <= most) & (ints)(value >= -most));
            if (floats) prefetch_ahead(floats + i, FURTHER);
            else prefetch_ahead(elements + i, FURTHER);
        }
        for (long lane = 0; lane < LANES; lane++) found += here[lane];
    }
    return found;
}

/* Stochastic gradient descent with momentum (Sutskever et al., 2013): weights and momenta in float, from a gradient in floats, or in
   elements where there are no floats. settings: the rate, the momentum and the weight decay; `momenta` is NULL where there is no
   momentum. With AVX512 the operations, and so the bits, are those of torch's fused SGD of floats. */
void sgd_step(float *weights, const float *floats, const element *elements, float *momenta, const float *settings, long count,
             long nesterov, long threads) {
    const float down = -settings[0], momentum = settings[1], decay = settings[2];
#pragma omp parallel for schedule(static) num_threads(threads) if (count > FEW)
    for (long i = 0; i < count; i += LANES) {
        lanes which = lanes_of(count - i);
        vector weight = load_floats(weights + i, which);
        vector step = floats ? load_floats(floats + i, which) : load(elements + i, which);
        prefetch_ahead_to_write(weights + i, FURTHER);
        if (floats) prefetch_ahead(floats + i, FURTHER);
        else prefetch_ahead(elements + i, FURTHER);
        if (decay != 0) step += weight * decay;
        if (momenta) {
            vector before = load_floats(momenta + i, which);
            prefetch_ahead_to_write(momenta + i, FURTHER);
            vector kept = rounded_product(before, (vector){0} + momentum) + step, fused = before * momentum + step;
            /* Torch takes what fills no vector by eights and the rest singly, and rounds the latter once. */
            for (long lane = (count - i) / 8 * 8; lane < min(LANES, count - i); lane++) kept[lane] = fused[lane];
            store_floats(momenta + i, kept, which);
            step = nesterov ? step + kept * momentum : kept;
        }
        store_floats(weights + i, weight + step * down, which);
    }
}

/* Adam (Kingma and Ba, 2015): weights and their gradients' running means and squares, all in floats, from a gradient as `sgd_step` takes
   it. settings: the rate over the means' correction, how much of the means and of the squares is new and of the latter stays, the
   root of their correction, what is added to their root, the decay in the gradient, what of the weights stays. With AVX512 the
   operations, and so the bits, are those of torch's fused Adam of floats. */
void adam_step(float *weights, const float *floats, const element *elements, float *means, float *squares, const float *settings,
           long count, long threads) {
    const float down = -settings[0], new = settings[1], new_square = settings[2], stays = settings[3], root = settings[4];
    const float added = settings[5], decay = settings[6], kept = settings[7];
#pragma omp parallel for schedule(static) num_threads(threads) if (count > FEW)
    for (long i = 0; i < count; i += LANES) {
        lanes which = lanes_of(count - i);
        vector weight = load_floats(weights + i, which), mean = load_floats(means + i, which);
        vector square = load_floats(squares + i, which);
        vector gradient = floats ? load_floats(floats + i, which) : load(elements + i, which);
        prefetch_ahead_to_write(weights + i, FURTHER);
        prefetch_ahead_to_write(means + i, FURTHER);
        prefetch_ahead_to_write(squares + i, FURTHER);
        if (floats) prefetch_ahead(floats + i, FURTHER);
        else prefetch_ahead(elements + i, FURTHER);
        if (decay != 0) gradient += weight * decay;
        if (kept != 1) weight *= kept;
        mean = new < 0.5f ? mean + new * (gradient - mean) : gradient + (new - 1) * (gradient - mean);
        vector part = gradient * new_square, fused = square * stays + rounded_product(part, gradient);
        square = rounded_product(square, (vector){0} + stays) + part * gradient;
        for (long lane = (count - i) / 8 * 8; lane < min(LANES, count - i); lane++) square[lane] = fused[lane]; /* as in sgd_step */
        store_floats(means + i, mean, which);
        store_floats(squares + i, square, which);
        store_floats(weights + i, weight + mean * down / (square_root(square) / root + added), which);
    }
}

/* A pixel of so many bytes; the compiler spells the usual three out. */
static inline void copy_pixel(const uint8_t *from, uint8_t *to, long c) {
    if (c == 3) memcpy(to, from, 3);
    else memcpy(to, from, c);
}

/* y (B, H', W', C) of bytes: image i of it has the pixels of the image indices[i] of x (N, H, W, C) that are in its rows rows[i] and
   columns columns[i], (B, H') and (B, W'). */
void gather(const uint8_t *x, uint8_t *y, const int64_t *indices, const int64_t *rows, const int64_t *columns, long count, long h,
            long w, long c, long height, long width, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long image = 0; image < count; image++)
        for (long row = 0; row < height; row++) {
            const uint8_t *from = x + (indices[image] * h + rows[image * height + row]) * w * c;
            uint8_t *to = y + (image * height + row) * width * c;
            const int64_t *at = columns + image * width;
            if (image + 1 < count) { /* images lie anywhere: the next one's row is asked for */
                const uint8_t *next = x + (indices[image + 1] * h + rows[(image + 1) * height + row]) * w * c;
                for (long byte = 0; byte < w * c; byte += 64) __builtin_prefetch(next + byte, 0, 3);
            }
            for (long column = 0, run; column < width; column += run) { /* of neighbours in both, copied at once */
                for (run = 1; column + run < width && at[column + run] == at[column] + run;) run++;
                if (run == 1) copy_pixel(from + at[column] * c, to + column * c, c);
                else memcpy(to + column * c, from + at[column] * c, run * c);
            }
        }
}
