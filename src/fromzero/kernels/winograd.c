/* 3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3): 36 multiplications where 16 outputs of a
   channel pair take 144. Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, "Fast Algorithms for
   Convolutional Neural Networks" (2016, arXiv:1509.09308), whose names are used here:

       Y = A^T [ (G g G^T) . (B^T d B) ] A

   d is a 6x6 tile of the input, g a filter, Y a 4x4 tile of the output. For each of the 36 positions of the
   transformed tiles, the sum over channels is a matrix product. Tiles overlap by two pixels.

   The interpolation points are 0, +-3/4, +-3/2 and infinity: in bfloat16 their error is about half of that of the usual
   0, +-1, +-2 (docs/log.md). Transforms are computed in float32; only what goes into the matrix products is rounded to
   `element`, and products are summed in float32.

   Images are (N, H, W, C), filters (O, 3, 3, C) in float32. Every sum is taken in an order that depends on shapes alone,
   so the results do not depend on the number of threads. */

#include "convolution.h"

#include <stddef.h>

/* The one-dimensional transforms. `a` and `b` are the points, `from` and `to` walk in strides of vectors. */
static const float a1 = 0.75f, a2 = 0.5625f, a3 = 0.421875f, b1 = 1.5f, b2 = 2.25f, b3 = 3.375f;
static const float a2b2 = 1.265625f, a2_b2 = 2.8125f;                       /* a^2 b^2, a^2 + b^2 */
static const float s0 = 0.790123456790f, sa = -0.526748971193f, sb = 0.131687242798f; /* 1/(a^2 b^2), 1/(2a^2(a^2-b^2)), 1/(2b^2(b^2-a^2)) */

/* B^T: six pixels of an input tile. */
static inline void input_transform(const vector *d, long from, vector *v, long to) {
    vector even_a = d[4 * from] - b2 * d[2 * from], odd_a = a1 * (d[3 * from] - b2 * d[from]);
    vector even_b = d[4 * from] - a2 * d[2 * from], odd_b = b1 * (d[3 * from] - a2 * d[from]);
    v[0] = a2b2 * d[0] - a2_b2 * d[2 * from] + d[4 * from];
    v[to] = even_a + odd_a, v[2 * to] = even_a - odd_a;
    v[3 * to] = even_b + odd_b, v[4 * to] = even_b - odd_b;
    v[5 * to] = a2b2 * d[from] - a2_b2 * d[3 * from] + d[5 * from];
}

/* A^T: six products to four pixels of an output tile. */
static inline void output_transform(const vector *m, long from, vector *y, long to) {
    vector sum_a = m[from] + m[2 * from], difference_a = m[from] - m[2 * from];
    vector sum_b = m[3 * from] + m[4 * from], difference_b = m[3 * from] - m[4 * from];
    y[0] = m[0] + sum_a + sum_b;
    y[to] = a1 * difference_a + b1 * difference_b;
    y[2 * to] = a2 * sum_a + b2 * sum_b;
    y[3 * to] = a3 * difference_a + b3 * difference_b + m[5 * from];
}

/* A: four pixels of an output's gradient. */
static inline void gradient_transform(const vector *y, long from, vector *e, long to) {
    vector even_a = y[0] + a2 * y[2 * from], odd_a = a1 * y[from] + a3 * y[3 * from];
    vector even_b = y[0] + b2 * y[2 * from], odd_b = b1 * y[from] + b3 * y[3 * from];
    e[0] = y[0];
    e[to] = even_a + odd_a, e[2 * to] = even_a - odd_a;
    e[3 * to] = even_b + odd_b, e[4 * to] = even_b - odd_b;
    e[5 * to] = y[3 * from];
}

/* G: three weights of a filter. */
static inline void filter_transform(const vector *g, long from, vector *u, long to) {
    vector even_a = g[0] + a2 * g[2 * from], odd_a = a1 * g[from];
    vector even_b = g[0] + b2 * g[2 * from], odd_b = b1 * g[from];
    u[0] = s0 * g[0];
    u[to] = sa * (even_a + odd_a), u[2 * to] = sa * (even_a - odd_a);
    u[3 * to] = sb * (even_b + odd_b), u[4 * to] = sb * (even_b - odd_b);
    u[5 * to] = g[2 * from];
}

/* G^T: six products to the gradient of three weights. */
static inline void filter_gradient_transform(const vector *u, long from, vector *g, long to) {
    vector sum_a = sa * (u[from] + u[2 * from]), sum_b = sb * (u[3 * from] + u[4 * from]);
    g[0] = s0 * u[0] + sum_a + sum_b;
    g[to] = sa * a1 * (u[from] - u[2 * from]) + sb * b1 * (u[3 * from] - u[4 * from]);
    g[2 * to] = a2 * sum_a + b2 * sum_b + u[5 * from];
}

/* From one of the 36 positions to the next lie so many floats: a cache line more than a position holds, since strides that
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
    return pooled ? place_of(tile, down, across, h / 2, w / 2, c, 2, 3 + pad % 2, (pad + 1) / 2)
                  : place_of(tile, down, across, h, w, c, 4, 6, pad);
}

static inline place output_place(long tile, long down, long across, long height, long width, long o, int pooled) {
    return pooled ? place_of(tile, down, across, height / 2, width / 2, o, 2, 2, 0)
                  : place_of(tile, down, across, height, width, o, 4, 4, 0);
}

/* Ask for `side` x `side` pixels, so many channels each, before they are needed: tiles lie too far apart for the processor to foresee
   them. Memory that is not there is not touched. */
static inline __attribute__((always_inline)) void prefetch(const element *pixels, long side, place at, long channels,
                                                           const int to_write) {
    for (long i = 0; i < side; i++)
        for (long j = 0; j < side; j++)
            for (long channel = 0; channel < channels; channel += 64 / sizeof(element))
                if (to_write) __builtin_prefetch(pixels + i * at.row_apart + j * at.pixel_apart + channel, 1, 2);
                else __builtin_prefetch(pixels + i * at.row_apart + j * at.pixel_apart + channel, 0, 2);
}

/* What a tile sees that its neighbours do not, of a map that is not pooled. */
static inline void prefetch_input(const element *x, place at, long c) {
    prefetch(x + at.offset + at.row_apart + at.pixel_apart, 4, at, c, 0);
}

/* The pixels of a tile, `which` of LANES channels, zero outside of the image. */
static inline __attribute__((always_inline)) void load_tile(const element *x, place at, lanes which, int side,
                                                            vector *d) {
    lanes inside[6];
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
            whole gradient = (whole)load(dy + offset, here), pick = load_bytes(picked + offset, here);
            for (int pixel = 0; pixel < 4; pixel++) {
                int i = 2 * down + pixel / 2 - second, j = 2 * across + pixel % 2 - second;
                if (i >= 0 && i < side && j >= 0 && j < side) d[side * i + j] = (vector)((pick == pixel) & gradient);
            }
        }
}

/* B^T d: 36 vectors; B is left to whoever stores the rows, as they come out of the registers. `picked`: as of
   `load_unpooled_tile`, where x is such a gradient, else NULL. */
static inline __attribute__((always_inline)) void half_input(const element *x, const uint8_t *picked, int second, place at,
                                                             lanes which, vector half[36]) {
    vector d[36];
    if (!picked) load_tile(x, at, which, 6, d);
    else if (second) load_unpooled_tile(x, picked, at, which, 6, 1, d);
    else load_unpooled_tile(x, picked, at, which, 6, 0, d);
#pragma GCC unroll 6
    for (int j = 0; j < 6; j++) input_transform(d + j, 6, half + j, 6);
}

/* A dy: 24 vectors; A^T is left to whoever stores the rows. */
static inline __attribute__((always_inline)) void half_gradient(const element *dy, const uint8_t *picked, place at, lanes which,
                                                                vector half[24]) {
    vector pixels[16];
    if (picked) load_unpooled_tile(dy, picked, at, which, 4, 0, pixels);
    else load_tile(dy, at, which, 4, pixels);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) gradient_transform(pixels + j, 4, half + j, 4);
}

/* Tiles are transformed and multiplied in blocks that stay in a core's cache, groups of ROWS tiles each, so many that all
   threads have as much to do. */
typedef struct {
    long groups, blocks, most; /* of all tiles; of these groups; tiles in a block */
} division;

static division division_of(long c, long tiles, long threads) {
    long fitting = 600000 / (36 * (c > 16 ? c : 16) * (long)sizeof(element));
    long most = fitting < 12 ? 12 : min(fitting, 24), groups = (tiles + ROWS - 1) / ROWS;
    long blocks = (tiles + most * threads - 1) / (most * threads) * threads;
    return (division){groups, blocks, (groups + blocks - 1) / blocks * ROWS};
}

static inline long start_of(long block, division d) { return d.groups * block / d.blocks * ROWS; }

/* y (N, H', W', O) = x (N, H, W, C) convolved, H' = H + 2 pad - 2, plus `bias` (O) where there is one.

   y_picked: where it is not NULL, y is pooled, (N, H'/2, W'/2, O), as `pool` says, which also says what goes here. draws: where it
   is not NULL, the pooled map's dropout follows, as `drop` has it; what it drops is picked from none.
   x_picked: where it is not NULL, x is the gradient (N, H/2, W/2, C) of a map so pooled.
   u: filters from `transform_filters`. scratch: so many floats as `convolve_scratch` says. */
void convolve(const element *x, const uint8_t *x_picked, const float *u, const float *bias, element *y, uint8_t *y_picked,
              const uint8_t *draws, float *scratch, long n, long h, long w, long c, long o, long pad, long relu, long threshold,
              long threads) {
    long height = h + 2 * pad - 2, width = w + 2 * pad - 2;
    long down = (height + 3) / 4, across = (width + 3) / 4, tiles = n * down * across;
    division d = division_of(c, tiles, threads);
    long c_units = round_up(c, LANES) / PAIR, o_lanes = round_up(o, LANES);
    long v_apart = apart(d.most * c_units), m_apart = apart(d.most * WIDE), u_apart = apart(o_lanes * c_units);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < d.blocks; block++) {
        float *v = scratch + omp_get_thread_num() * 36 * (v_apart + m_apart), *m = v + 36 * v_apart;
        long start = start_of(block, d), count = min(start_of(block + 1, d), tiles) - start;
        for (long t = 0; t < count; t++) {
            place at = input_place(start + t, down, across, h, w, c, pad, x_picked != NULL);
            for (long channel = 0; channel < c; channel += LANES) {
                vector half[36];
                element *to = (element *)(v + t * c_units) + channel;
                half_input(x + channel, x_picked ? x_picked + channel : NULL, pad % 2, at, lanes_of(c - channel), half);
                for (long i = 0; i < 6; i++) {
                    vector row[6];
                    input_transform(half + 6 * i, 1, row, 1);
                    for (long j = 0; j < 6; j++) store(to + (6 * i + j) * v_apart * PAIR, row[j], lanes_of(LANES));
                }
            }
        }
        for (long out = 0; out < o; out += WIDE) {
            long wide = min(WIDE, o_lanes - out);
            for (long position = 0; position < 36; position++) {
                /* Meanwhile what comes next: this block's output, the next one's input. */
                for (long t = start + count * position / 36; t < start + count * (position + 1) / 36; t++) {
                    place to = output_place(t, down, across, height, width, o, y_picked != NULL);
                    if (y_picked) prefetch(y + to.offset + out, 2, to, wide, 1);
                    else prefetch(y + to.offset + out, 4, to, wide, 1);
                    if (out == 0 && !x_picked)
                        prefetch_input(x, input_place(t + count, down, across, h, w, c, pad, 0), c);
                }
                for (long row = 0; row < count; row += ROWS)
                    product(wide / LANES, v + position * v_apart + row * c_units, c_units, 1,
                            u + position * u_apart + out * c_units, wide, c_units, m + position * m_apart + row * WIDE,
                            WIDE, 0);
            }
            for (long t = 0; t < count; t++) {
                place at = output_place(start + t, down, across, height, width, o, y_picked != NULL);
                for (long lane = out; lane < min(out + wide, o); lane += LANES) {
                    vector half[24], pixels[16], shift = {0};
                    const vector *products = (const vector *)(m + t * WIDE + lane - out);
                    long step = m_apart / LANES;
                    lanes which = lanes_of(o - lane);
                    for (int j = 0; j < 6; j++) output_transform(products + j * step, 6 * step, half + j, 6);
                    for (int i = 0; i < 4; i++) output_transform(half + 6 * i, 1, pixels + 4 * i, 1);
                    if (bias) memcpy(&shift, bias + lane, 4 * min(o - lane, LANES));
                    if (!y_picked) {
                        for (long i = 0; i < at.bottom; i++)
                            for (long j = 0; j < at.right; j++)
                                store(y + at.offset + i * at.row_apart + j * o + lane, pixels[4 * i + j] + shift, which);
                        continue;
                    }
                    for (long i = 0; i < at.bottom; i++)
                        for (long j = 0; j < at.right; j++) {
                            long to = at.offset + i * at.row_apart + j * o + lane;
                            whole where;
                            vector most = pool(pixels + 8 * i + 2 * j, 4, 1, shift, relu, &where);
                            if (draws) {
                                whole kept = load_bytes(draws + to, which) >= (int32_t)threshold;
                                most = choose(kept, most * kept_scale(threshold), (vector){0});
                                where = (kept & where) | (~kept & 4);
                            }
                            store(y + to, most, which);
                            store_bytes(y_picked + to, where, which);
                        }
                }
            }
        }
    }
}

/* Floats of scratch that `convolve` needs. */
long convolve_scratch(long n, long h, long w, long c, long pad, long threads) {
    division d = division_of(c, n * ((h + 2 * pad + 1) / 4) * ((w + 2 * pad + 1) / 4), threads);
    return threads * 36 * (apart(d.most * (round_up(c, LANES) / PAIR)) + apart(d.most * WIDE));
}

/* G g G^T of LANES filters side by side; `g` are their nine weights, turned by 180 degrees for the gradient of the input. */
static inline void transformed_filter(const vector g[9], vector u[36]) {
    vector half[18];
    for (long j = 0; j < 3; j++) filter_transform(g + j, 3, half + j, 3);
    for (long i = 0; i < 6; i++) filter_transform(half + 3 * i, 1, u + 6 * i, 1);
}

/* Floats of the transformed filters from `c` to `o` channels. */
long filters_size(long c, long o) { return 36 * apart(round_up(o, LANES) * (round_up(c, LANES) / PAIR)); }

/* Filters (O, 3, 3, C) as `convolve` wants them: 36 matrices of units, (C, O) in blocks of WIDE columns. */
void transform_filters(const float *weights, float *u, long c, long o, long threads) {
    long c_lanes = round_up(c, LANES), c_units = c_lanes / PAIR, o_lanes = round_up(o, LANES);
    long u_apart = apart(o_lanes * c_units);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long out = 0; out < o_lanes; out += LANES) {
        long start = out / WIDE * WIDE, wide = min(WIDE, o_lanes - start);
        for (long channel = 0; channel < c_lanes; channel += LANES) {
            vector g[LANES][9] = {{{0}}}; /* channel, weight, filter */
            for (long each = 0; each < min(LANES, o - out); each++)
                for (long i = 0; i < 9; i++)
                    for (long lane = 0; lane < min(LANES, c - channel); lane++)
                        g[lane][i][each] = weights[((out + each) * 9 + i) * c + channel + lane];
            for (long lane = 0; lane < LANES; lane += PAIR) {
                vector tiles[PAIR][36];
                for (long each = 0; each < PAIR; each++) transformed_filter(g[lane + each], tiles[each]);
                for (long position = 0; position < 36; position++)
                    store_units(u + position * u_apart + start * c_units + (channel + lane) / PAIR * wide + out - start,
                                tiles[0][position], tiles[PAIR - 1][position]);
            }
        }
    }
}

/* The filters of the gradient of the input: 36 matrices of units, (O, C) in blocks of WIDE columns. `threshold`: of the dropout
   behind the convolution, or zero. */
void transform_turned_filters(const float *weights, float *u, long c, long o, long threshold, long threads) {
    long c_lanes = round_up(c, LANES), o_units = round_up(o, LANES) / PAIR, u_apart = apart(c_lanes * o_units);
    float scale = kept_scale(threshold);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long unit = 0; unit < o_units; unit++)
        for (long channel = 0; channel < c_lanes; channel += LANES) {
            long start = channel / WIDE * WIDE, wide = min(WIDE, c_lanes - start);
            vector tiles[PAIR][36];
            for (long each = 0; each < PAIR; each++) {
                long out = unit * PAIR + each;
                vector g[9] = {{0}};
                for (long i = 0; i < 9 && out < o; i++)
                    g[i] = load_floats(weights + (out * 9 + 8 - i) * c + channel, lanes_of(c - channel)) * scale;
                transformed_filter(g, tiles[each]);
            }
            for (long position = 0; position < 36; position++)
                store_units(u + position * u_apart + start * o_units + unit * wide + channel - start,
                            tiles[0][position], tiles[PAIR - 1][position]);
        }
}

/* The gradient of the filters is summed for at most OUT x WIDE channels at a time, a task, over DEPTH units, and over CHUNK units in all
   before the next tiles are transformed: so sums stay in a core's cache, transformed tiles in that of all cores. */
#define OUT (8 * ROWS)
#define DEPTH 128
#define AHEAD 12 /* tiles: so early it is asked for one */

typedef struct {
    long down, across, tiles, depth, chunk, c_lanes, o_lanes, v_apart, e_apart, blocks, groups, parts, tasks;
} plan;

static plan plan_of(long n, long h, long w, long c, long o, long pad, long threads) {
    plan p;
    p.down = (h + 2 * pad + 1) / 4, p.across = (w + 2 * pad + 1) / 4, p.tiles = n * p.down * p.across;
    p.c_lanes = round_up(c, LANES), p.o_lanes = round_up(o, LANES), p.depth = (p.tiles + PAIR - 1) / PAIR;
    long units = (1 << 14) / (p.c_lanes + p.o_lanes); /* about 2^14 floats a position */
    p.chunk = min(p.depth, round_up(units > 0 ? units : 1, DEPTH));
    p.v_apart = apart(p.chunk * p.c_lanes), p.e_apart = apart(p.chunk * p.o_lanes + OUT);
    p.blocks = (p.c_lanes + WIDE - 1) / WIDE, p.groups = (o + ROWS - 1) / ROWS, p.parts = (o + OUT - 1) / OUT;
    while (p.blocks * p.parts % threads != 0 && p.parts < p.groups) p.parts++; /* as much for every thread */
    p.tasks = p.blocks * p.parts;
    return p;
}

/* Floats of scratch that `filter_gradient` needs. */
long filter_gradient_scratch(long n, long h, long w, long c, long o, long pad, long threads) {
    plan p = plan_of(n, h, w, c, o, pad, threads);
    long slots = p.chunk < p.depth ? p.tasks : threads;
    return 36 * (p.v_apart + p.e_apart) + slots * 36 * apart(OUT * WIDE);
}

/* Transform the input and the output's gradient of one unit of tiles. */
static void transform_unit(const element *x, const element *dy, const uint8_t *picked, float *v, float *e, long h, long w,
                           long c, long o, long pad, const plan *p, long unit, long k) {
    vector halves[PAIR][36];
    place of_x[PAIR], of_dy[PAIR];
    for (int each = 0; each < PAIR; each++) {
        long tile = unit * PAIR + each, height = h + 2 * pad - 2, width = w + 2 * pad - 2;
        of_x[each] = input_place(tile, p->down, p->across, h, w, c, pad, 0);
        of_dy[each] = output_place(tile, p->down, p->across, height, width, o, picked != NULL);
        place next = input_place(tile + AHEAD, p->down, p->across, h, w, c, pad, 0);
        prefetch_input(x, next, c);
        next = output_place(tile + AHEAD, p->down, p->across, height, width, o, picked != NULL);
        prefetch(dy + next.offset, picked ? 2 : 4, next, o, 0);
        if (tile >= p->tiles) of_x[each].bottom = of_dy[each].bottom = 0; /* the last unit may be half empty */
    }
    for (long channel = 0; channel < c; channel += LANES) {
        long start = channel / WIDE * WIDE, wide = min(WIDE, p->c_lanes - start);
        for (int each = 0; each < PAIR; each++)
            half_input(x + channel, NULL, 0, of_x[each], lanes_of(c - channel), halves[each]);
        float *to = v + start * p->chunk + k * wide + channel - start;
        for (long i = 0; i < 6; i++) {
            vector rows[PAIR][6];
            for (int each = 0; each < PAIR; each++) input_transform(halves[each] + 6 * i, 1, rows[each], 1);
            for (long j = 0; j < 6; j++) store_units(to + (6 * i + j) * p->v_apart, rows[0][j], rows[PAIR - 1][j]);
        }
    }
    for (long out = 0; out < o; out += LANES) {
        for (int each = 0; each < PAIR; each++)
            half_gradient(dy + out, picked ? picked + out : NULL, of_dy[each], lanes_of(o - out), halves[each]);
        float *to = e + k * p->o_lanes + out;
        for (long i = 0; i < 6; i++) {
            vector rows[PAIR][6];
            for (int each = 0; each < PAIR; each++) gradient_transform(halves[each] + 4 * i, 1, rows[each], 1);
            for (long j = 0; j < 6; j++) store_units(to + (6 * i + j) * p->e_apart, rows[0][j], rows[PAIR - 1][j]);
        }
    }
}

/* gradient (O, 3, 3, C) of the filters from that of the output, dy (N, H', W', O), or, where `picked` is not NULL, from that of
   the pooled output; `threshold`: of the dropout behind it, or zero.
   G^T [ sum over tiles of (A dy A^T) (B^T d B) ] G. */
void filter_gradient(const element *x, const element *dy, const uint8_t *picked, float *gradient, float *scratch, long n,
                     long h, long w, long c, long o, long pad, long threshold, long threads) {
    plan p = plan_of(n, h, w, c, o, pad, threads);
    float scale = kept_scale(threshold);
    float *v = scratch, *e = v + 36 * p.v_apart, *all_sums = e + 36 * p.e_apart;
    long sums_apart = apart(OUT * WIDE), step = sums_apart / LANES;
    for (long done = 0; done < p.depth; done += p.chunk) {
        long depth = min(p.chunk, p.depth - done), last = done + depth == p.depth;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long k = 0; k < depth; k++) transform_unit(x, dy, picked, v, e, h, w, c, o, pad, &p, done + k, k);
#pragma omp for schedule(static)
            for (long task = 0; task < p.tasks; task++) {
                long start = task % p.blocks * WIDE, wide = min(WIDE, p.c_lanes - start), part = task / p.blocks;
                long out = p.groups * part / p.parts * ROWS, rows = min(p.groups * (part + 1) / p.parts * ROWS, o) - out;
                float *sums = all_sums + (p.chunk < p.depth ? task : omp_get_thread_num()) * 36 * sums_apart;
                for (long position = 0; position < 36; position++)
                    for (long k = 0; k < depth; k += DEPTH)
                        for (long row = 0; row < rows; row += ROWS)
                            product(wide / LANES, e + position * p.e_apart + k * p.o_lanes + out + row, 1, p.o_lanes,
                                    v + position * p.v_apart + start * p.chunk + k * wide, wide, min(DEPTH, depth - k),
                                    sums + position * sums_apart + row * WIDE, WIDE, done + k > 0);
                for (long row = 0; last && row < rows; row++)
                    for (long lane = 0; lane < min(wide, c - start); lane += LANES) {
                        vector half[18], g[9];
                        const vector *products = (const vector *)(sums + row * WIDE + lane);
                        for (long j = 0; j < 6; j++)
                            filter_gradient_transform(products + j * step, 6 * step, half + j, 6);
                        for (long i = 0; i < 3; i++) filter_gradient_transform(half + 6 * i, 1, g + 3 * i, 1);
                        for (long i = 0; i < 9; i++)
                            store_floats(gradient + ((out + row) * 9 + i) * c + start + lane, g[i] * scale,
                                         lanes_of(c - start - lane));
                    }
            }
        }
    }
}
