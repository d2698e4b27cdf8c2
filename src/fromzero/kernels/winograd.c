/* 3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3): 36 multiplications where 16 outputs of a
   channel pair take 144. Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, "Fast Algorithms for
   Convolutional Neural Networks" (2016, arXiv:1509.09308), whose names are used here:

       Y = A^T [ (G g G^T) . (B^T d B) ] A

   d is a 6x6 tile of the input, g a filter, Y a 4x4 tile of the output. For each of the 36 positions of the
   transformed tiles, the sum over channels is a matrix product. Tiles overlap by two pixels.

   The interpolation points are 0, +-3/4, +-3/2 and infinity: in bfloat16 their error is about half of that of the usual
   0, +-1, +-2 (docs/log.md). Transforms are computed in float32; only what goes into the matrix products is rounded to
   `element`, and products are summed in float32.

   Compiled with -DSMALL these are convolutions of maps of 2x2 pixels, padded by one. Padding is zero, so in one dimension
   two outputs see two pixels, y0 = g1 d0 + g2 d1 and y1 = g0 d0 + g1 d1, by three multiplications:
   g1 (d0 + d1), (g2 - g1) d1 and (g0 - g1) d0. In two dimensions nine for sixteen; in the form above, with 3x3 tiles.

   Images are (N, H, W, C), filters (O, 3, 3, C) in float32. Every sum is taken in an order that depends on shapes alone,
   so the results do not depend on the number of threads. */

#include "convolution.h"

#include <stddef.h>

/* A tile's pixels in a row, of the input and of the output; its positions in a row and in all. */
#ifdef SMALL
#define NAME(function) function##_small
#define SEEN 2
#define MADE 2
#define POINTS 3
#else
#define NAME(function) function
#define SEEN 6
#define MADE 4
#define POINTS 6
#endif
#define POSITIONS (POINTS * POINTS)

/* The one-dimensional transforms: B^T, SEEN pixels of an input tile; A^T, POINTS products to MADE pixels of an output tile; A, as
   many of an output's gradient; G, three weights of a filter; G^T, products to the gradient of three weights. `from` and `to`
   walk in strides of vectors. */
#ifdef SMALL
static inline void input_transform(const vector *d, long from, vector *v, long to) {
    v[0] = d[0], v[to] = d[0] + d[from], v[2 * to] = d[from];
}

static inline void output_transform(const vector *m, long from, vector *y, long to) {
    y[0] = m[from] + m[2 * from], y[to] = m[from] + m[0];
}

static inline void gradient_transform(const vector *y, long from, vector *e, long to) {
    e[0] = y[from], e[to] = y[0] + y[from], e[2 * to] = y[0];
}

static inline void filter_transform(const vector *g, long from, vector *u, long to) {
    u[0] = g[0] - g[from], u[to] = g[from], u[2 * to] = g[2 * from] - g[from];
}

static inline void filter_gradient_transform(const vector *u, long from, vector *g, long to) {
    g[0] = u[0], g[to] = u[from] - u[0] - u[2 * from], g[2 * to] = u[2 * from];
}
#else
/* `a` and `b` are the points. */
static const float a1 = 0.75f, a2 = 0.5625f, a3 = 0.421875f, b1 = 1.5f, b2 = 2.25f, b3 = 3.375f;
static const float a2b2 = 1.265625f, a2_b2 = 2.8125f;                       /* a^2 b^2, a^2 + b^2 */
static const float s0 = 0.790123456790f, sa = -0.526748971193f, sb = 0.131687242798f; /* 1/(a^2 b^2), 1/(2a^2(a^2-b^2)), 1/(2b^2(b^2-a^2)) */

static inline void input_transform(const vector *d, long from, vector *v, long to) {
    vector even_a = d[4 * from] - b2 * d[2 * from], odd_a = a1 * (d[3 * from] - b2 * d[from]);
    vector even_b = d[4 * from] - a2 * d[2 * from], odd_b = b1 * (d[3 * from] - a2 * d[from]);
    v[0] = a2b2 * d[0] - a2_b2 * d[2 * from] + d[4 * from];
    v[to] = even_a + odd_a, v[2 * to] = even_a - odd_a;
    v[3 * to] = even_b + odd_b, v[4 * to] = even_b - odd_b;
    v[5 * to] = a2b2 * d[from] - a2_b2 * d[3 * from] + d[5 * from];
}

static inline void output_transform(const vector *m, long from, vector *y, long to) {
    vector sum_a = m[from] + m[2 * from], difference_a = m[from] - m[2 * from];
    vector sum_b = m[3 * from] + m[4 * from], difference_b = m[3 * from] - m[4 * from];
    y[0] = m[0] + sum_a + sum_b;
    y[to] = a1 * difference_a + b1 * difference_b;
    y[2 * to] = a2 * sum_a + b2 * sum_b;
    y[3 * to] = a3 * difference_a + b3 * difference_b + m[5 * from];
}

static inline void gradient_transform(const vector *y, long from, vector *e, long to) {
    vector even_a = y[0] + a2 * y[2 * from], odd_a = a1 * y[from] + a3 * y[3 * from];
    vector even_b = y[0] + b2 * y[2 * from], odd_b = b1 * y[from] + b3 * y[3 * from];
    e[0] = y[0];
    e[to] = even_a + odd_a, e[2 * to] = even_a - odd_a;
    e[3 * to] = even_b + odd_b, e[4 * to] = even_b - odd_b;
    e[5 * to] = y[3 * from];
}

static inline void filter_transform(const vector *g, long from, vector *u, long to) {
    vector even_a = g[0] + a2 * g[2 * from], odd_a = a1 * g[from];
    vector even_b = g[0] + b2 * g[2 * from], odd_b = b1 * g[from];
    u[0] = s0 * g[0];
    u[to] = sa * (even_a + odd_a), u[2 * to] = sa * (even_a - odd_a);
    u[3 * to] = sb * (even_b + odd_b), u[4 * to] = sb * (even_b - odd_b);
    u[5 * to] = g[2 * from];
}

static inline void filter_gradient_transform(const vector *u, long from, vector *g, long to) {
    vector sum_a = sa * (u[from] + u[2 * from]), sum_b = sb * (u[3 * from] + u[4 * from]);
    g[0] = s0 * u[0] + sum_a + sum_b;
    g[to] = sa * a1 * (u[from] - u[2 * from]) + sb * b1 * (u[3 * from] - u[4 * from]);
    g[2 * to] = a2 * sum_a + b2 * sum_b + u[5 * from];
}
#endif

/* From one of the positions to the next lie so many floats: a cache line more than a position holds, since strides that
   are powers of two would put all positions into the same few sets of the cache. */
static inline long apart(long floats) { return round_up(floats, 16) + 16; }

/* Where a tile meets an image (N, H, W, C): its first element, and which of its rows and columns lie inside. */
typedef struct {
    long offset, top, bottom, left, right, row_apart, pixel_apart;
} place;

/* The tile of `side` x `side` pixels that begins `pad` pixels above and to the left of a tile of the output; of these there
   are `down` x `across` in an image, `stride` pixels from one to the next. */
static inline place place_of(long tile, long down, long across, long h, long w, long c, long stride, long side, long pad) {
    long row = tile / across % down * stride - pad, column = tile % across * stride - pad;
    long image = tile / (down * across);
    return (place){((image * h + row) * w + column) * c,
                   row < 0 ? -row : 0,
                   min(side, h - row),
                   column < 0 ? -column : 0,
                   min(side, w - column),
                   w * c,
                   c};
}

/* Where a tile's input is, and where its output; `pooled`: of a map behind its pooling. */
static inline place input_place(long tile, long down, long across, long h, long w, long c, long pad, int pooled) {
    if (SEEN == MADE) pad = 0; /* no tile sees another's pixels */
    return pooled ? place_of(tile, down, across, h / 2, w / 2, c, MADE / 2, SEEN / 2 + pad % 2, (pad + 1) / 2)
                  : place_of(tile, down, across, h, w, c, MADE, SEEN, pad);
}

static inline place output_place(long tile, long down, long across, long height, long width, long o, int pooled) {
    return pooled ? place_of(tile, down, across, height / 2, width / 2, o, MADE / 2, MADE / 2, 0)
                  : place_of(tile, down, across, height, width, o, MADE, MADE, 0);
}

/* How many tiles there are for so many pixels of the output. */
static inline long tiles_of(long pixels) { return (pixels + MADE - 1) / MADE; }

#define SOON 4   /* tiles: so early it is asked for one where they are multiplied in blocks */
#define AHEAD 12 /* and where the gradient of the filters walks through them */

/* Ask for `side` x `side` pixels, so many channels each, before they are needed: tiles lie too far apart for the processor to foresee
   them. Memory that is not there is not touched. `nearest`: so soon that it is to be in the nearest cache. */
static inline __attribute__((always_inline)) void prefetch(const element *pixels, long side, place at, long channels,
                                                           const int to_write, const int nearest) {
    for (long i = 0; i < side; i++)
        for (long j = 0; j < side; j++)
            for (long channel = 0; channel < channels; channel += 64 / sizeof(element)) {
                const element *pixel = pixels + i * at.row_apart + j * at.pixel_apart + channel;
                if (to_write) __builtin_prefetch(pixel, 1, 2);
                else if (nearest) __builtin_prefetch(pixel, 0, 3);
                else __builtin_prefetch(pixel, 0, 2);
            }
}

/* What a tile sees that its neighbours do not: of a map that is not pooled, or of a pooled one with what has been `picked`. */
static inline __attribute__((always_inline)) void prefetch_input(const element *x, const uint8_t *picked, place at, long c,
                                                                 const int nearest) {
    if (!picked) {
        long first = (SEEN - MADE) / 2;
        prefetch(x + at.offset + first * (at.row_apart + at.pixel_apart), MADE, at, c, 0, nearest);
        return;
    }
    prefetch(x + at.offset, SEEN / 2, at, c, 0, nearest);
    for (long i = 0; i < SEEN / 2; i++)
        for (long j = 0; j < SEEN / 2; j++)
            __builtin_prefetch(picked + at.offset + i * at.row_apart + j * at.pixel_apart, 0, 3);
}

/* The pixels of a tile, `which` of LANES channels, zero outside of the image. */
static inline __attribute__((always_inline)) void load_tile(const element *x, place at, lanes which, int side,
                                                            vector *d) {
    lanes inside[SEEN];
    for (int j = 0; j < side; j++) inside[j] = j >= at.left && j < at.right ? which : lanes_of(0);
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            lanes here = i >= at.top && i < at.bottom ? inside[j] : lanes_of(0);
            d[side * i + j] = load(x + at.offset + i * at.row_apart + j * at.pixel_apart, here);
        }
}

/* The same of a gradient that reaches a map through the 2x2 max pooling behind it: `dy` is that of the pooled map, `picked`
   says to which pixel of its window a value goes (0 to 3, or none), and `at` where the tile's windows are. With `second` the
   tile begins with the second row and column of a window. */
static inline __attribute__((always_inline)) void load_unpooled_tile(const element *dy, const uint8_t *picked, place at,
                                                                     lanes which, int side, int second, vector *d) {
    for (int down = 0; 2 * down < side + second; down++)
        for (int across = 0; 2 * across < side + second; across++) {
            lanes here = down >= at.top && down < at.bottom && across >= at.left && across < at.right ? which : lanes_of(0);
            long offset = at.offset + down * at.row_apart + across * at.pixel_apart;
            ints gradient = (ints)load(dy + offset, here), pick = load_bytes(picked + offset, here);
            for (int pixel = 0; pixel < 4; pixel++) {
                int i = 2 * down + pixel / 2 - second, j = 2 * across + pixel % 2 - second;
                if (i >= 0 && i < side && j >= 0 && j < side) d[side * i + j] = (vector)((pick == pixel) & gradient);
            }
        }
}

/* B^T d: POINTS x SEEN vectors; B is left to whoever stores the rows, as they come out of the registers. `picked`: as of
   `load_unpooled_tile`, where x is such a gradient, else NULL. */
static inline __attribute__((always_inline)) void half_input(const element *x, const uint8_t *picked, int second, place at,
                                                             lanes which, vector *half) {
    vector d[SEEN * SEEN];
    if (!picked) load_tile(x, at, which, SEEN, d);
    else if (second && SEEN > MADE) load_unpooled_tile(x, picked, at, which, SEEN, 1, d);
    else load_unpooled_tile(x, picked, at, which, SEEN, 0, d);
#pragma GCC unroll 6
    for (int j = 0; j < SEEN; j++) input_transform(d + j, SEEN, half + j, SEEN);
}

/* A dy: POINTS x MADE vectors; A^T is left to whoever stores the rows. */
static inline __attribute__((always_inline)) void half_gradient(const element *dy, const uint8_t *picked, place at, lanes which,
                                                                vector *half) {
    vector pixels[MADE * MADE];
    if (picked) load_unpooled_tile(dy, picked, at, which, MADE, 0, pixels);
    else load_tile(dy, at, which, MADE, pixels);
#pragma GCC unroll 4
    for (int j = 0; j < MADE; j++) gradient_transform(pixels + j, MADE, half + j, MADE);
}

/* Tiles are transformed and multiplied in blocks that stay in a core's cache, groups of GROUP tiles each, so many that all
   threads have as much to do. */
typedef struct {
    long groups, blocks, most; /* of all tiles; of these groups; tiles in a block */
} division;

static division division_of(long c, long o, long tiles, long threads) {
    long of_tile = POSITIONS * (c > 16 ? c : 16) * (long)sizeof(element);
    /* Small filters are soon read again, so what they are multiplied by may be so little that it stays in the nearest cache. */
#ifdef TILES /* whoever has them has a cache of 2 MB, but multiplies faster than filters come */
    long fitting = 1600000 / (of_tile + POSITIONS * WIDE * (long)sizeof(float)), wished = c * o > 16384 ? 64 : 32;
#else
    long fitting = 600000 / of_tile, wished = c * o > 4096 ? 24 : 12;
#endif
    wished = wished * 36 / POSITIONS;
    long most = fitting < 2 * GROUP ? 2 * GROUP : min(fitting, wished), groups = (tiles + GROUP - 1) / GROUP;
    long blocks = (tiles + most * threads - 1) / (most * threads) * threads;
    return (division){groups, blocks, (groups + blocks - 1) / blocks * GROUP};
}

static inline long start_of(long block, division d) { return d.groups * block / d.blocks * GROUP; }

/* y (N, H', W', O) = x (N, H, W, C) convolved, H' = H + 2 pad - 2, plus `bias` (O) where there is one.

   y_picked: where it is not NULL, y is pooled, (N, H'/2, W'/2, O), as `pool` says, which also says what goes here. draws: where it
   is not NULL, the pooled map's dropout follows, as `drop` has it; what it drops is picked from none.
   x_picked: where it is not NULL, x is the gradient (N, H/2, W/2, C) of a map so pooled.
   u: filters from `transform_filters`. own: `each` floats for every thread, at least `convolve_scratch`. */
void NAME(convolve)(const element *x, const uint8_t *x_picked, const float *u, const float *bias, element *y, uint8_t *y_picked,
              const uint8_t *draws, float *own, long each, long n, long h, long w, long c, long o, long pad, long relu,
              long threshold, long threads) {
    long height = h + 2 * pad - 2, width = w + 2 * pad - 2;
    long down = tiles_of(height), across = tiles_of(width), tiles = n * down * across;
    division d = division_of(c, o, tiles, threads);
    long c_units = whole_steps(c) / PAIR, o_lanes = round_up(o, LANES);
    long v_apart = apart(d.most * c_units), m_apart = apart(d.most * WIDE), u_apart = apart(o_lanes * c_units);
#pragma omp parallel num_threads(threads)
    {
        float *v = own + omp_get_thread_num() * each, *m = v + POSITIONS * v_apart;
        tile_shapes former = begin_products();
        if (c_units * PAIR > round_up(c, LANES)) memset(v, 0, POSITIONS * v_apart * sizeof(float)); /* a step's last channels */
#pragma omp for schedule(dynamic, FEW_OF(d.blocks, threads))
        for (long block = 0; block < d.blocks; block++) {
            long start = start_of(block, d), count = min(start_of(block + 1, d), tiles) - start;
            for (long t = 0; t < count; t++) {
                place at = input_place(start + t, down, across, h, w, c, pad, x_picked != NULL);
                place soon = input_place(start + t + SOON, down, across, h, w, c, pad, x_picked != NULL);
                for (long channel = 0; channel < c; channel += LANES) {
                    if (channel * sizeof(element) % 64 == 0)
                        prefetch_input(x + channel, x_picked ? x_picked + channel : NULL, soon, 1, 1);
                    vector half[POINTS * SEEN];
                    element *to = (element *)(v + t * c_units) + channel;
                    half_input(x + channel, x_picked ? x_picked + channel : NULL, pad % 2, at, lanes_of(c - channel), half);
                    for (long i = 0; i < POINTS; i++) {
                        vector row[POINTS];
                        input_transform(half + SEEN * i, 1, row, 1);
                        for (long j = 0; j < POINTS; j++)
                            store(to + (POINTS * i + j) * v_apart * PAIR, row[j], lanes_of(LANES));
                    }
                }
            }
            for (long out = 0; out < o; out += WIDE) {
                long wide = min(WIDE, o_lanes - out);
                for (long position = 0; position < POSITIONS; position++) {
                    /* Meanwhile what comes next: this block's output, the next position's filters. */
                    for (long t = start + count * position / POSITIONS; t < start + count * (position + 1) / POSITIONS; t++) {
                        place to = output_place(t, down, across, height, width, o, y_picked != NULL);
                        if (y_picked) prefetch(y + to.offset + out, MADE / 2, to, wide, 1, 0);
                        else prefetch(y + to.offset + out, MADE, to, wide, 1, 0);
                    }
                    const float *next = u + (position + 1) * u_apart + out * c_units;
                    if (position + 1 == POSITIONS) next = u + (out + WIDE) * c_units;
                    products(count, wide / LANES, v + position * v_apart, c_units, 1, u + position * u_apart + out * c_units, wide,
                             c_units, m + position * m_apart, WIDE, 0, next);
                }
                for (long t = 0; t < count; t++) {
                    place at = output_place(start + t, down, across, height, width, o, y_picked != NULL);
                    for (long lane = out; lane < min(out + wide, o); lane += LANES) {
                        vector half[MADE * POINTS], pixels[MADE * MADE], shift = {0};
                        const vector *products = (const vector *)(m + t * WIDE + lane - out);
                        long step = m_apart / LANES;
                        lanes which = lanes_of(o - lane);
                        for (int j = 0; j < POINTS; j++)
                            output_transform(products + j * step, POINTS * step, half + j, POINTS);
                        for (int i = 0; i < MADE; i++) output_transform(half + POINTS * i, 1, pixels + MADE * i, 1);
                        if (bias) memcpy(&shift, bias + lane, 4 * min(o - lane, LANES));
                        if (!y_picked) {
                            for (long i = 0; i < at.bottom; i++)
                                for (long j = 0; j < at.right; j++)
                                    store(y + at.offset + i * at.row_apart + j * o + lane, pixels[MADE * i + j] + shift, which);
                            continue;
                        }
                        for (long i = 0; i < at.bottom; i++)
                            for (long j = 0; j < at.right; j++) {
                                long to = at.offset + i * at.row_apart + j * o + lane;
                                ints where;
                                vector most = pool(pixels + 2 * MADE * i + 2 * j, MADE, 1, shift, relu, &where);
                                if (draws) {
                                    ints kept = load_bytes(draws + to, which) >= (int32_t)threshold;
                                    most = blend(kept, most * kept_scale(threshold), (vector){0});
                                    where = (kept & where) | (~kept & 4);
                                }
                                store(y + to, most, which);
                                store_bytes(y_picked + to, where, which);
                            }
                    }
                }
            }
        }
        end_products(former);
    }
}

/* Floats of its own that a thread needs in `convolve`. */
long NAME(convolve_scratch)(long n, long h, long w, long c, long o, long pad, long threads) {
    division d = division_of(c, o, n * tiles_of(h + 2 * pad - 2) * tiles_of(w + 2 * pad - 2), threads);
    return POSITIONS * (apart(d.most * whole_steps(c) / PAIR) + apart(d.most * WIDE));
}

/* G g G^T of LANES filters side by side; `g` are their nine weights, turned by 180 degrees for the gradient of the input. */
static inline void transformed_filter(const vector g[9], vector u[POSITIONS]) {
    vector half[POINTS * 3];
    for (long j = 0; j < 3; j++) filter_transform(g + j, 3, half + j, 3);
    for (long i = 0; i < POINTS; i++) filter_transform(half + 3 * i, 1, u + POINTS * i, 1);
}

/* Floats of the transformed filters from `c` to `o` channels. */
long NAME(filters_size)(long c, long o) { return POSITIONS * apart(round_up(o, LANES) * whole_steps(c) / PAIR); }

/* Filters (O, 3, 3, C) as `convolve` wants them: a matrix of units for each position, (C, O) in blocks of WIDE columns. */
void NAME(transform_filters)(const float *weights, float *u, long c, long o, long threads) {
    long c_lanes = whole_steps(c), c_units = c_lanes / PAIR, o_lanes = round_up(o, LANES);
    long u_apart = apart(o_lanes * c_units);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long out = 0; out < o_lanes; out += LANES) {
        long start = out / WIDE * WIDE, wide = min(WIDE, o_lanes - start);
        for (long channel = 0; channel < c_lanes; channel += LANES) {
            vector g[LANES][9]; /* channel, weight, filter */
            for (long i = 0; i < 9; i++) {
                vector square[LANES] = {{0}};
                for (long each = 0; each < min(LANES, o - out); each++) {
                    const float *from = weights + ((out + each) * 9 + i) * c + channel;
                    square[each] = load_floats(from, lanes_of(c - channel));
                    __builtin_prefetch(from + LANES, 0, 2);
                }
                transpose(square);
                for (long lane = 0; lane < LANES; lane++) g[lane][i] = square[lane];
            }
            for (long lane = 0; lane < LANES; lane += PAIR) {
                vector tiles[PAIR][POSITIONS];
                for (long each = 0; each < PAIR; each++) transformed_filter(g[lane + each], tiles[each]);
                for (long position = 0; position < POSITIONS; position++) {
                    float *to = u + position * u_apart + start * c_units + (channel + lane) / PAIR * wide + out - start;
                    store_units(to, tiles[0][position], tiles[PAIR - 1][position]);
                    __builtin_prefetch(to + 2 * wide, 1, 2);
                }
            }
        }
    }
}

/* The filters of the gradient of the input: matrices of units, (O, C) in blocks of WIDE columns. `threshold`: of the dropout
   behind the convolution, or zero. */
void NAME(transform_turned_filters)(const float *weights, float *u, long c, long o, long threshold, long threads) {
    long c_lanes = round_up(c, LANES), o_units = whole_steps(o) / PAIR, u_apart = apart(c_lanes * o_units);
    float scale = kept_scale(threshold);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long unit = 0; unit < o_units; unit++)
        for (long channel = 0; channel < c_lanes; channel += LANES) {
            long start = channel / WIDE * WIDE, wide = min(WIDE, c_lanes - start);
            vector tiles[PAIR][POSITIONS];
            for (long each = 0; each < PAIR; each++) {
                long out = unit * PAIR + each;
                vector g[9] = {{0}};
                for (long i = 0; i < 9 && out < o; i++) {
                    const float *from = weights + (out * 9 + 8 - i) * c + channel;
                    g[i] = load_floats(from, lanes_of(c - channel)) * scale;
                    __builtin_prefetch(from + 4 * LANES, 0, 2);
                }
                transformed_filter(g, tiles[each]);
            }
            for (long position = 0; position < POSITIONS; position++) {
                float *to = u + position * u_apart + start * o_units + unit * wide + channel - start;
                store_units(to, tiles[0][position], tiles[PAIR - 1][position]);
                __builtin_prefetch(to + wide, 1, 2);
            }
        }
}

/* The gradient of the filters is a sum over tiles, in so many `parts` as shapes say, and in each of them over units. A part is cut by
   output channels into `shares`, so many that all threads have as much to do. Whoever has a share transforms the tiles that it needs
   itself, a chunk at a time: tiles that go from one core to another can take longer than all the rest (docs/log.md).
   Sums are taken for a piece of at most OUT x WIDE channels at a time, over DEPTH units, so that they stay in a core's cache.

   Of many channels, sums of all positions are too much for it, and go through it once a chunk. With tiles, which multiply faster than
   sums come and go, the chunk is then STAGED units, which all threads transform into memory that they share, past their caches, and
   multiply position by position: those sums fit. (Measured on two threads; more than there are positions have nothing to multiply.) */
#define OUT (8 * GROUP)
#define DEPTH 64
#define PARTED (1 << 14) /* sums of a position, of all parts, at most */
#define FITTING (83000 / POSITIONS) /* floats of a position in a chunk: with a piece's sums they leave room in a megabyte */
#if defined(TILES) && !defined(SMALL)
#define STAGED 512
#define ROOM (1 << 19)              /* floats of a position in a staged chunk, at most */
#define STEPS 256                   /* units of it whose products are summed in registers */
#define MANY (1 << 14)              /* channel pairs from which on a chunk is staged */
#endif

typedef struct {
    long down, across, tiles, units, parts, depth, chunk;  /* depth: units in a part; chunk: that are transformed at a time */
    long groups, pieces, shares, blocks;                   /* of output channels, each of GROUP, then of these; of input channels */
    long c_lanes, e_lanes, v_apart, e_apart, kept;         /* kept: pieces' sums outlast a chunk, each in a place of its own */
    long staged;                                           /* floats of a chunk that all threads share; none: each has its own */
} plan;

static plan plan_of(long n, long h, long w, long c, long o, long pad, long threads) {
    plan p;
    p.down = tiles_of(h + 2 * pad - 2), p.across = tiles_of(w + 2 * pad - 2), p.tiles = n * p.down * p.across;
    p.units = (p.tiles + PAIR - 1) / PAIR, p.parts = 1, p.shares = 1;
    while (p.parts < 8 && 2 * p.parts * c * o <= PARTED && 4 * DEPTH * p.parts <= p.units) p.parts *= 2;
    p.depth = round_up((p.units + p.parts - 1) / p.parts, DEEP), p.parts = (p.units + p.depth - 1) / p.depth;
    p.groups = (o + GROUP - 1) / GROUP, p.blocks = (c + WIDE - 1) / WIDE;
    while (p.parts * p.shares % threads != 0 && p.shares < p.groups) p.shares++;
    p.pieces = (o + OUT - 1) / OUT;
    while (p.pieces % p.shares != 0) p.pieces++;
    p.c_lanes = round_up(c, LANES), p.e_lanes = round_up((p.groups / p.shares + p.pieces / p.shares) * GROUP, LANES);
    long fitting = FITTING / (p.c_lanes + p.e_lanes), half = DEPTH / 2;
    p.chunk = min(p.depth, fitting < half / 2 ? DEPTH : fitting < half ? half : fitting / half * half);
    p.staged = 0;
#ifdef STAGED
    if (c * o >= MANY && p.units > 2 * DEPTH) {
        p.shares = 1, p.pieces = (o + OUT - 1) / OUT, p.e_lanes = round_up(o, LANES);
        long most = min(STAGED, ROOM / (p.c_lanes + p.e_lanes) + 1), chunks = (p.units + most - 1) / most;
        p.chunk = round_up((p.units + chunks - 1) / chunks, DEEP);
        p.staged = POSITIONS * (apart(p.chunk * p.c_lanes) + apart(p.chunk * p.e_lanes));
    }
#endif
    p.v_apart = apart(p.chunk * p.c_lanes), p.e_apart = apart(p.chunk * p.e_lanes);
    p.kept = p.parts > 1 || p.chunk < p.depth || p.staged;
    return p;
}

/* The first output channel of a piece. */
static inline long first_of(long piece, const plan *p) { return p->groups * piece / p->pieces * GROUP; }

/* Floats of the sums of a piece and a block. */
#define SUMS (POSITIONS * apart(OUT * WIDE))

/* Floats of its own that a thread needs in `filter_gradient`, and those that all share. */
long NAME(filter_gradient_scratch)(long n, long h, long w, long c, long o, long pad, long threads) {
    plan p = plan_of(n, h, w, c, o, pad, threads);
#ifdef STAGED
    if (p.staged) return STEPS * p.e_lanes;
#endif
    return POSITIONS * (p.v_apart + p.e_apart) + SUMS;
}

long NAME(filter_gradient_sums)(long n, long h, long w, long c, long o, long pad, long threads) {
    plan p = plan_of(n, h, w, c, o, pad, threads);
    return (p.kept ? p.parts * p.pieces * p.blocks * SUMS : 0) + p.staged;
}

/* `store_units`, or, where a whole line of memory is stored, past the caches: what is too much for them. */
static inline __attribute__((always_inline)) void put_units(float *to, vector low, vector high, const int past) {
#ifdef STAGED
    if (past) {
        vector units;
        store_units((float *)&units, low, high);
        _mm512_stream_ps(to, (__m512)units);
        return;
    }
#endif
    (void)past;
    store_units(to, low, high);
}

/* Transform one unit of tiles, the input's and, of the channels from `out` on, `rows` of them, those of the output's gradient. `past`:
   as of `put_units`. */
static inline __attribute__((always_inline)) void transform_unit(const element *x, const element *dy, const uint8_t *picked,
                                                                 float *v, float *e, long h, long w, long c, long o, long pad,
                                                                 const plan *p, long unit, long k, long out, long rows,
                                                                 const int past) {
    const long v_apart = p->v_apart, e_apart = p->e_apart; /* for all that compilers know, what is stored could change p */
    vector halves[PAIR][POSITIONS];
    place of_x[PAIR], of_dy[PAIR];
    for (int each = 0; each < PAIR; each++) {
        long tile = unit * PAIR + each, height = h + 2 * pad - 2, width = w + 2 * pad - 2;
        of_x[each] = input_place(tile, p->down, p->across, h, w, c, pad, 0);
        of_dy[each] = output_place(tile, p->down, p->across, height, width, o, picked != NULL);
        place next = input_place(tile + AHEAD, p->down, p->across, h, w, c, pad, 0);
        prefetch_input(x, NULL, next, c, 0);
        next = output_place(tile + AHEAD, p->down, p->across, height, width, o, picked != NULL);
        prefetch(dy + next.offset + out, picked ? MADE / 2 : MADE, next, rows, 0, 0);
        if (tile >= p->tiles) of_x[each].bottom = of_dy[each].bottom = 0; /* the last unit may be half empty */
    }
    for (long channel = 0; channel < c; channel += LANES) {
        long start = channel / WIDE * WIDE, wide = min(WIDE, p->c_lanes - start);
        for (int each = 0; each < PAIR; each++)
            half_input(x + channel, NULL, 0, of_x[each], lanes_of(c - channel), halves[each]);
        float *to = v + start * p->chunk + k * wide + channel - start;
        for (long i = 0; i < POINTS; i++) {
            vector lines[PAIR][POINTS];
            for (int each = 0; each < PAIR; each++) input_transform(halves[each] + SEEN * i, 1, lines[each], 1);
            for (long j = 0; j < POINTS; j++)
                put_units(to + (POINTS * i + j) * v_apart, lines[0][j], lines[PAIR - 1][j], past);
        }
    }
    for (long row = 0; row < rows; row += LANES) {
        for (int each = 0; each < PAIR; each++)
            half_gradient(dy + out + row, picked ? picked + out + row : NULL, of_dy[each], lanes_of(o - out - row),
                          halves[each]);
        float *to = e + k * p->e_lanes + row;
        for (long i = 0; i < POINTS; i++) {
            vector lines[PAIR][POINTS];
            for (int each = 0; each < PAIR; each++) gradient_transform(halves[each] + MADE * i, 1, lines[each], 1);
            for (long j = 0; j < POINTS; j++)
                put_units(to + (POINTS * i + j) * e_apart, lines[0][j], lines[PAIR - 1][j], past);
        }
    }
}

/* The gradient of a piece of the filters, from `out`, of channels from `start`: G^T sums G, the sums those of all parts. */
static void finish_piece(const float *sums, float *gradient, long c, long o, long piece, long start, float scale, const plan *p) {
    long wide = min(WIDE, p->c_lanes - start), out = first_of(piece, p), rows = min(first_of(piece + 1, p), o) - out;
    for (long row = 0; row < rows; row++)
        for (long lane = 0; lane < min(wide, c - start); lane += LANES) {
            vector products[POSITIONS], half[3 * POINTS], g[9];
            for (long position = 0; position < POSITIONS; position++) {
                const float *at = sums + position * apart(OUT * WIDE) + row * wide + lane;
                products[position] = *(const loose *)at;
                for (long part = 1; part < p->parts; part++)
                    products[position] += *(const loose *)(at + part * p->pieces * p->blocks * SUMS);
            }
            for (long j = 0; j < POINTS; j++) filter_gradient_transform(products + j, POINTS, half + j, POINTS);
            for (long i = 0; i < 3; i++) filter_gradient_transform(half + POINTS * i, 1, g + 3 * i, 1);
            for (long i = 0; i < 9; i++)
                store_floats(gradient + ((out + row) * 9 + i) * c + start + lane, g[i] * scale, lanes_of(c - start - lane));
        }
}

#ifdef STAGED
/* The sums of all pieces from chunks that are staged behind them. To be called by all threads; turned: STEPS x e_lanes floats. */
static void sum_staged(const element *x, const element *dy, const uint8_t *picked, float *kept, float *turned, long h, long w, long c,
                       long o, long pad, const plan *p) {
    float *v = kept + p->pieces * p->blocks * SUMS, *e = v + POSITIONS * p->v_apart;
    for (long done = 0; done < p->units; done += p->chunk) {
        long chunk = round_up(min(p->chunk, p->units - done), DEEP);
#pragma omp for schedule(static) nowait
        for (long k = 0; k < chunk; k++) transform_unit(x, dy, picked, v, e, h, w, c, o, pad, p, done + k, k, 0, o, 1);
        _mm_sfence();
#pragma omp barrier
#pragma omp for schedule(static)
        for (long position = 0; position < POSITIONS; position++)
            for (long k = 0; k < chunk; k += STEPS) {
                long depth = min(STEPS, chunk - k);
                for (long unit = 0; unit < depth; unit += DEEP)
                    for (long row = 0; row < p->e_lanes; row += LANES)
                        turn(e + position * p->e_apart + (k + unit) * p->e_lanes + row, p->e_lanes, turned + unit * p->e_lanes + row,
                             p->e_lanes);
                for (long start = 0; start < p->c_lanes; start += WIDE)
                    for (long piece = 0; piece < p->pieces; piece++) {
                        long wide = min(WIDE, p->c_lanes - start), row = first_of(piece, p);
                        const float *units = v + position * p->v_apart + start * p->chunk + k * wide;
                        float *sums = kept + (piece * p->blocks + start / WIDE) * SUMS + position * apart(OUT * WIDE);
                        products(first_of(piece + 1, p) - row, wide / LANES, turned + row, 1, p->e_lanes, units, wide, depth, sums, wide,
                                 done + k > 0, piece > 0 ? units : units + p->chunk * wide);
                    }
            }
    }
}
#endif

/* gradient (O, 3, 3, C) of the filters from that of the output, dy (N, H', W', O), or, where `picked` is not NULL, from that of
   the pooled output; `threshold`: of the dropout behind it, or zero. kept, own: floats as the functions above say, `each` of the latter
   for every thread, all at multiples of 64 bytes.
   G^T [ sum over tiles of (A dy A^T) (B^T d B) ] G. */
void NAME(filter_gradient)(const element *x, const element *dy, const uint8_t *picked, float *gradient, float *kept, float *own,
                     long each, long n, long h, long w, long c, long o, long pad, long threshold, long threads) {
    plan p = plan_of(n, h, w, c, o, pad, threads);
    float scale = kept_scale(threshold);
#pragma omp parallel num_threads(threads)
    {
        float *v = own + omp_get_thread_num() * each, *e = v + POSITIONS * p.v_apart;
        tile_shapes former = begin_products();
#ifdef STAGED
        if (p.staged) sum_staged(x, dy, picked, kept, v, h, w, c, o, pad, &p);
#endif
#pragma omp for schedule(dynamic)
        for (long job = 0; job < (p.staged ? 0 : p.parts * p.shares); job++) {
            long part = job / p.shares, share = job % p.shares, first = part * p.depth, depth = min(p.depth, p.units - first);
            long from = p.pieces * share / p.shares, to = p.pieces * (share + 1) / p.shares;
            long out = first_of(from, &p), width = min(first_of(to, &p), o) - out;
            for (long done = 0; done < depth; done += p.chunk) {
                long chunk = round_up(min(p.chunk, depth - done), DEEP);
                for (long k = 0; k < chunk; k++)
                    transform_unit(x, dy, picked, v, e, h, w, c, o, pad, &p, first + done + k, k, out, width, 0);
#ifdef TILES
                for (long position = 0; position < POSITIONS; position++)
                    for (long k = 0; k < chunk; k += DEEP)
                        for (long row = 0; row < width; row += LANES) {
                            float *square = e + position * p.e_apart + k * p.e_lanes + row;
                            turn(square, p.e_lanes, square, p.e_lanes);
                        }
#endif
                for (long task = from * p.blocks; task < to * p.blocks; task++) {
                    long piece = task / p.blocks, start = task % p.blocks * WIDE, wide = min(WIDE, p.c_lanes - start);
                    long row = first_of(piece, &p) - out, end = min(first_of(piece + 1, &p) - out, width);
                    float *sums = p.kept ? kept + (part * p.pieces * p.blocks + task) * SUMS : e + POSITIONS * p.e_apart;
                    for (long position = 0; position < POSITIONS; position++)
                        for (long k = 0; k < chunk; k += DEPTH) {
                            const float *units = v + position * p.v_apart + start * p.chunk + k * wide;
                            products(end - row, wide / LANES, e + position * p.e_apart + k * p.e_lanes + row, 1, p.e_lanes, units,
                                     wide, min(DEPTH, chunk - k), sums + position * apart(OUT * WIDE), wide, done + k > 0,
                                     units + p.v_apart);
                        }
                    if (p.parts == 1 && done + chunk >= depth) finish_piece(sums, gradient, c, o, piece, start, scale, &p);
                }
            }
        }
        end_products(former);
        if (p.parts > 1 || p.staged) {
#pragma omp for schedule(static)
            for (long task = 0; task < p.pieces * p.blocks; task++)
                finish_piece(kept + task * SUMS, gradient, c, o, task / p.blocks, task % p.blocks * WIDE, scale, &p);
        }
    }
}
