/* 3x3 convolutions of stride 1 from the few channels that an image has, straight from their definition: Winograd's transforms
   would fill a vector of LANES channels with zeros.

   Images are (N, H, W, C), filters (O, 3, 3, C) in float32, as in winograd.c; every sum is taken in an order that depends on
   shapes alone. */

#include "convolution.h"

#include <stddef.h>

#define MOST 4  /* channels: DIRECT_CHANNELS of interface.py */
#define STRIP 8 /* rows of the output at a time: even, so that no pooling window is cut */

/* A strip of the output's `height` x `width`, and the padded rows that it sees, `padded` pixels each, whole units. `depth`: units of a
   window. `taps`: elements that one row of a window sees, a multiple of GROUP. `size`: floats of all gradients. `pixels` of a
   strip, whole groups and steps; `line`: elements of its padded rows, with room to load LANES more (and the next pixel's, C <= LANES).
   `own`: floats that a thread needs. */
typedef struct {
    long height, width, padded, strips, pixels, o_lanes, depth, taps, size, line, own;
} plan;

static plan plan_of(long h, long w, long c, long o, long pad) {
    plan p;
    p.height = h + 2 * pad - 2, p.width = w + 2 * pad - 2, p.padded = round_up(w + 2 * pad, PAIR);
    p.strips = (p.height + STRIP - 1) / STRIP, p.pixels = round_up(round_up(STRIP * p.padded, GROUP), DEEP * PAIR);
    p.o_lanes = round_up(o, LANES), p.depth = round_up((9 * c + PAIR - 1) / PAIR, DEEP), p.taps = round_up(3 * c, GROUP);
    p.size = (3 * p.taps + 1) * p.o_lanes;
    p.line = round_up((p.pixels + 2 * p.padded) * c + p.taps, LANES) + LANES;
    long forward = p.pixels * (p.depth + WIDE) + 3 * MOST, backward = p.line + p.pixels / PAIR * (p.o_lanes + GROUP);
    p.own = p.line + round_up(forward > backward ? forward : backward, LANES);
    return p;
}

/* Floats of its own that a thread needs in either function below, and those that all share. */
long direct_scratch(long h, long w, long c, long o, long pad) { return plan_of(h, w, c, o, pad).own; }

long direct_sums(long h, long w, long c, long o, long pad) { return PARTS * plan_of(h, w, c, o, pad).size; }

/* The rows of one image that a strip of its output sees, padded with zeros, end to end. */
static void load_strip(const element *x, long first, long h, long w, long c, long pad, const plan *p, element *line) {
    memset(line, 0, p->line * sizeof(element));
    for (long row = 0; row < STRIP + 2; row++) {
        long from = first + row - pad;
        if (from >= 0 && from < h) memcpy(line + (row * p->padded + pad) * c, x + from * w * c, w * c * sizeof(element));
    }
}

/* Filters as a matrix of units, (9 C, O) in blocks of WIDE columns. */
static void load_filters(const float *filters, long c, long o, const plan *p, float *matrix) {
    for (long out = 0; out < p->o_lanes; out += LANES) {
        long start = out / WIDE * WIDE, wide = min(WIDE, p->o_lanes - start);
        for (long k = 0; k < p->depth; k++) {
            vector weights[PAIR] = {{0}};
            for (long each = 0; each < min(PAIR, 9 * c - k * PAIR); each++)
                for (long lane = 0; lane < min(LANES, o - out); lane++)
                    weights[each][lane] = filters[(out + lane) * 9 * c + k * PAIR + each];
            store_units(matrix + start * p->depth + k * wide + out - start, weights[0], weights[PAIR - 1]);
        }
    }
}

/* As `convolve` of winograd.c, from `filters` as they are; `relu`: at least zero, pooled or not. matrix: floats as `direct_sums` says. */
void convolve_directly(const element *x, const float *filters, const float *bias, element *y, uint8_t *y_picked,
                       float *matrix, float *own, long each, long n, long h, long w, long c, long o, long pad, long relu,
                       long threads) {
    plan p = plan_of(h, w, c, o, pad);
    load_filters(filters, c, o, &p, matrix);
#pragma omp parallel num_threads(threads) firstprivate(p)
    {
        float *sums = own + omp_get_thread_num() * each, *windows = sums + p.pixels * WIDE;
        element *line = (element *)(windows + p.pixels * p.depth + 3 * MOST);
        tile_shapes former = begin_products();
        if (DEEP > 1) memset(windows, 0, p.pixels * p.depth * sizeof(float)); /* they end with zeros, up to a whole step */
#pragma omp for schedule(dynamic, FEW_OF(n * p.strips, threads))
        for (long strip = 0; strip < n * p.strips; strip++) {
            long image = strip / p.strips, first = strip % p.strips * STRIP, rows = min(STRIP, p.height - first);
            load_strip(x + image * h * w * c, first, h, w, c, pad, &p, line);
            for (long i = 0; i < rows; i++)
                for (long j = 0; j < p.width; j++)
                    for (long row = 0; row < 3; row++)
                        memcpy((element *)(windows + (i * p.width + j) * p.depth) + row * 3 * c,
                               line + ((i + row) * p.padded + j) * c, 3 * MOST * sizeof(element)); /* what is too much, the next row or pixel writes over */
            for (long out = 0; out < o; out += WIDE) {
                long wide = min(WIDE, p.o_lanes - out);
                products(rows * p.width, wide / LANES, windows, p.depth, 1, matrix + out * p.depth, wide, p.depth, sums, WIDE, 0,
                         matrix + out * p.depth);
                for (long lane = out; lane < min(out + wide, o); lane += LANES) {
                    const vector *found = (const vector *)(sums + lane - out);
                    vector shift = {0};
                    lanes which = lanes_of(o - lane);
                    if (bias) memcpy(&shift, bias + lane, 4 * min(o - lane, LANES));
                    for (long pixel = 0; !y_picked && pixel < rows * p.width; pixel++) {
                        vector value = found[pixel * COLUMNS] + shift;
                        if (relu) value = blend((ints)(value < 0), (vector){0}, value);
                        long to = ((image * p.height + first) * p.width + pixel) * o + lane;
                        store(y + to, value, which);
                        prefetch_ahead_to_write(y + to, FURTHER);
                    }
                    for (long i = 0; y_picked && i < rows / 2; i++)
                        for (long j = 0; j < p.width / 2; j++) {
                            long to = ((image * (p.height / 2) + first / 2 + i) * (p.width / 2) + j) * o + lane;
                            ints where;
                            vector most = pool(found + (2 * i * p.width + 2 * j) * COLUMNS, p.width * COLUMNS, COLUMNS, shift,
                                               relu, &where);
                            store(y + to, most, which);
                            store_bytes(y_picked + to, where, which);
                            prefetch_ahead_to_write(y + to, FURTHER), prefetch_ahead_to_write(y_picked + to, FURTHER);
                        }
                }
            }
        }
        end_products(former);
    }
}

/* The gradient of a strip's outputs as units (pixels / PAIR, O) of two neighbours each, laid out as the padded rows are: zero
   where a window would reach from the end of one row into the next. Their sum is added to `sums` (O). `dy`, `y` and `picked` are
   those of one image. */
static void load_gradient(const element *dy, const element *y, const uint8_t *picked, long first, long o, const plan *p,
                          float *units, float *sums) {
    long height = picked ? p->height / 2 * 2 : p->height, width = picked ? p->width / 2 * 2 : p->width;
    for (long out = 0; out < o; out += LANES) {
        vector sum = *(loose *)(sums + out);
        for (long i = 0; i < STRIP; i++) {
            long row = picked ? (first + i) / 2 * (width / 2) : (first + i) * width;
            lanes in_row = first + i < height ? lanes_of(o - out) : lanes_of(0);
            for (long j = 0; j < p->padded; j += PAIR) {
                vector values[PAIR];
                for (long each = 0; each < PAIR; each++) {
                    long at = (row + (picked ? (j + each) / 2 : j + each)) * o + out;
                    lanes which = j + each < width ? in_row : lanes_of(0);
                    ints gradient = (ints)load(dy + at, which);
                    prefetch_ahead(dy + at, FURTHER);
                    if (picked) prefetch_ahead(picked + at, FURTHER);
                    if (y) prefetch_ahead(y + at, FURTHER);
                    if (picked) gradient &= load_bytes(picked + at, which) == (int32_t)(i % 2 * 2 + (j + each) % 2);
                    if (y) gradient &= (ints)(load(y + at, which) > 0);
                    sum += values[each] = (vector)gradient;
                }
                store_units(units + (i * p->padded + j) / PAIR * p->o_lanes + out, values[0], values[PAIR - 1]);
            }
        }
        *(loose *)(sums + out) = sum;
    }
}

/* The gradients of filters (O, 3, 3, C) and bias (O) from that of the output, dy (N, H', W', O), or, where `picked` is not NULL,
   from that of the pooled output. y: where it is not NULL, the output, made at least zero.

   In the padded rows, end to end, what the window of pixel q sees in a row of the filters begins at q C, and that of the next
   pixel C elements further: so the gradient of a row of the filters is a matrix product over all pixels of a strip. */
void gradients_directly(const element *x, const element *dy, const element *y, const uint8_t *picked, float *of_filters,
                        float *of_bias, float *parts, float *own, long each, long n, long h, long w, long c, long o, long pad,
                        long threads) {
    plan p = plan_of(h, w, c, o, pad);
    long strips = n * p.strips, of_image = picked ? (p.height / 2) * (p.width / 2) * o : p.height * p.width * o;
    long depth = round_up(STRIP * p.padded / PAIR, DEEP);
#pragma omp parallel num_threads(threads) firstprivate(p)
    {
        float *units = own + omp_get_thread_num() * each, *gradients = units + p.line;
        float *turned = gradients + p.pixels / PAIR * p.o_lanes;
        element *line = (element *)(turned + p.pixels / PAIR * GROUP);
        tile_shapes former = begin_products();
        if (DEEP > 1) memset(gradients, 0, depth * p.o_lanes * sizeof(float)); /* up to a whole step */
#pragma omp for schedule(dynamic)
        for (long part = 0; part < PARTS; part++) {
            float *sums = parts + part * p.size;
            memset(sums, 0, p.size * sizeof(float));
            for (long strip = strips * part / PARTS; strip < strips * (part + 1) / PARTS; strip++) {
                long image = strip / p.strips, first = strip % p.strips * STRIP, at = image * of_image;
                load_strip(x + image * h * w * c, first, h, w, c, pad, &p, line);
                for (long i = 0; i < p.line - LANES; i += LANES) /* each element and that of the next pixel */
                    store_units(units + i, load(line + i, lanes_of(LANES)), load(line + i + c, lanes_of(LANES)));
                load_gradient(dy + at, y ? y + at : NULL, picked ? picked + at : NULL, first, o, &p, gradients,
                              sums + 3 * p.taps * p.o_lanes);
                for (long row = 0; row < 3; row++) {
                    const float *seen = units + row * p.padded * c;
                    long tap_apart = 1, k_apart = PAIR * c;
#ifdef TILES
                    for (long k = 0; k < depth; k += DEEP) turn(seen + k * k_apart, k_apart, turned + k * LANES, LANES);
                    seen = turned, tap_apart = k_apart = LANES;
#endif
                    for (long out = 0; out < o; out += WIDE)
                        products(3 * c, min(WIDE, p.o_lanes - out) / LANES, seen, tap_apart, k_apart, gradients + out, p.o_lanes,
                                 depth, sums + row * p.taps * p.o_lanes + out, p.o_lanes, 1, gradients + out);
                }
            }
        }
        end_products(former);
    }
    for (long out = 0; out < o; out += LANES)
        for (long weight = 0; weight <= 9 * c; weight++) {
            const float *at = parts + (weight / (3 * c) * p.taps + weight % (3 * c)) * p.o_lanes + out;
            vector sum = {0};
            for (long part = 0; part < PARTS; part++) sum += *(const loose *)(at + part * p.size);
            for (long lane = 0; lane < min(LANES, o - out); lane++)
                *(weight < 9 * c ? of_filters + (out + lane) * 9 * c + weight : of_bias + out + lane) = sum[lane];
        }
}
