/* Matrix products of units: in vectors, or, of bfloat16 on a processor with AMX, in its tiles. */

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

static inline void product(long columns, const float *a, long a_row, long a_k, const float *b, long b_k, long depth, float *c,
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

/* `products` multiplies GROUP rows at a time and takes DEEP units in a step: operands have room for whole groups, and zeros up to
   whole steps. Each thread is to `begin_products` before and to `end_products` after. */
#if defined(BFLOAT16) && defined(__AMX_BF16__) && !defined(NO_TILES)
#define TILES
#define GROUP 16
#define DEEP 16
#else
#define GROUP ROWS
#define DEEP 1
#endif

/* So many elements, rounded up to whole vectors and to whole steps. */
static inline long whole_steps(long elements) { return round_up(round_up(elements, LANES), DEEP * PAIR); }

/* Matrix product, of either kind below: c (rows, columns x LANES) = or += sum over k of a[row, k] * b[k, :]; a[row, k] lies at
   row * a_row + k * a_k. Units side by side are those of a row (a_k is 1) or those that meet the same unit of b (a_row is 1); these
   tiles want turned, in squares: in their place, or as one square behind the other (a_row and a_k are 16). Of `next`, what is
   multiplied after it, it asks for a part while it multiplies. */
#ifndef TILES
typedef int tile_shapes; /* none */
static inline tile_shapes begin_products(void) { return 0; }
static inline void end_products(tile_shapes former) { (void)former; }

static inline void products(long rows, long columns, const float *a, long a_row, long a_k, const float *b, long b_k, long depth,
                            float *c, long c_row, int add, const float *next) {
    for (long row = 0; row < rows; row += ROWS)
        product(columns, a + row * a_row, a_row, a_k, b, b_k, depth, c + row * c_row, c_row, add,
                next + row / ROWS % COLUMNS * depth * LANES);
}

#else
/* Of what shape a thread's tiles are, as the processor reads it; here all have 16 rows of 16 units, or sums. */
typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Returns the former shapes: another library may have set them, and is to find them as they were. */
static inline tile_shapes begin_products(void) {
    tile_shapes former, ours = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) ours.bytes[tile] = 64, ours.rows[tile] = 16;
    /* Not by intrinsics, which do not tell every compiler that all 64 bytes are written and read. */
    __asm__ volatile("sttilecfg %0" : "=m"(former));
    __asm__ volatile("ldtilecfg %0" : : "m"(ours));
    return former;
}

static inline void end_products(tile_shapes former) {
    if (former.palette) __asm__ volatile("ldtilecfg %0" : : "m"(former));
    else _tile_release();
}

/* `down` x `across` tiles of a product; strides in bytes. A step asks for so many `lines` of what is `next`. Addresses are in
   brackets because GCC 11's macros have none of their own. */
static inline __attribute__((always_inline)) void product_of_tiles(const int down, const int across, const float *a, long a_down,
                                                                   long a_k, long a_stride, const float *b, long b_k, long depth,
                                                                   float *c, long c_stride, int add, const char *next, long lines) {
    float *below = c + 4 * c_stride; /* 16 rows */
    if (add) {
        _tile_loadd(0, c, c_stride);
        if (across > 1) _tile_loadd(1, (c + 16), c_stride);
        if (down > 1) _tile_loadd(2, below, c_stride);
        if (down > 1 && across > 1) _tile_loadd(3, (below + 16), c_stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < depth; k += DEEP) {
        for (long line = 0; line < lines; line++, next += 64) __builtin_prefetch(next, 0, 2);
        _tile_loadd(4, (a + k * a_k), a_stride);
        _tile_loadd(6, (b + k * b_k), (4 * b_k));
        _tile_dpbf16ps(0, 4, 6);
        if (across > 1) {
            _tile_loadd(7, (b + k * b_k + 16), (4 * b_k));
            _tile_dpbf16ps(1, 4, 7);
        }
        if (down > 1) {
            _tile_loadd(5, (a + k * a_k + a_down), a_stride);
            _tile_dpbf16ps(2, 5, 6);
            if (across > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_stride);
    if (across > 1) _tile_stored(1, (c + 16), c_stride);
    if (down > 1) _tile_stored(2, below, c_stride);
    if (down > 1 && across > 1) _tile_stored(3, (below + 16), c_stride);
}

static inline void products(long rows, long columns, const float *a, long a_row, long a_k, const float *b, long b_k, long depth,
                            float *c, long c_row, int add, const float *next) {
    const long a_stride = 4 * (a_row > 1 ? a_row : a_k), times = (rows + 31) / 32 * ((columns + 1) / 2);
    const long lines = times > 0 ? (16 * columns + times - 1) / times : 0;
    const char *soon = (const char *)next;
    __asm__ volatile("" ::: "memory"); /* compilers do not know that tiles are loaded from memory */
    for (long column = 0; column < columns; column += 2)
        for (long row = 0; row < rows; row += 32, soon += lines * 64 * (depth / DEEP)) {
            const float *from = a + row * a_row, *with = b + column * LANES;
            float *to = c + row * c_row + column * LANES;
#define PRODUCT(down, across) \
    product_of_tiles(down, across, from, 16 * a_row, a_k, a_stride, with, b_k, depth, to, 4 * c_row, add, soon, lines)
            if (rows - row > 16 && columns - column > 1) PRODUCT(2, 2);
            else if (rows - row > 16) PRODUCT(2, 1);
            else if (columns - column > 1) PRODUCT(1, 2);
            else PRODUCT(1, 1);
#undef PRODUCT
        }
    __asm__ volatile("" ::: "memory");
}

/* Turn a square of 16 x 16 units, whose rows lie so many floats apart; `to` may be where it is. */
static inline void turn(const float *square, long apart, float *to, long to_apart) {
    vector rows[LANES];
    for (long row = 0; row < LANES; row++) rows[row] = *(const loose *)(square + row * apart);
    transpose(rows);
    for (long row = 0; row < LANES; row++) *(loose *)(to + row * to_apart) = rows[row];
}
#endif
