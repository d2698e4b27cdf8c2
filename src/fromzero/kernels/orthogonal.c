/* Newton-Schulz steps, by which Muon makes a matrix orthogonal (Jordan et al., 2024): matrix products of a few hundred rows, many
   of them, whose calls cost a library more than their arithmetic. Products are of `element`, sums and all else in float. */

#include "products.h"

#include <stddef.h>

/* Two operands of a product as units: `rows` of pairs side by side; and `columns`, pairs one above the other, in blocks of WIDE
   columns. A matrix is padded with zeros to whole groups of rows, whole vectors and whole steps. */
typedef struct {
    float *rows, *columns;
} operand;

static inline long group_of(long m) { return round_up(m, GROUP * PAIR); }

/* How many pairs of rows either operand has. */
static inline long pairs_of(long m) { return (group_of(m) > whole_steps(m) ? group_of(m) : whole_steps(m)) / PAIR; }

/* The place of a unit, `pair` of `depth` from the top and in `column`, in blocks of WIDE columns of so many in all. */
static inline float *place(float *columns, long depth, long all, long pair, long column) {
    long start = column / WIDE * WIDE;
    return columns + start * depth + pair * min(WIDE, all - start) + column - start;
}

/* What `matrix` (M, M), padded, is as operands. To be called by all threads. */
static void convert(const float *matrix, operand to, long m, long lanes_m) {
    long depth = lanes_m / PAIR;
#pragma omp for schedule(static)
    for (long pair = 0; pair < pairs_of(m); pair++)
        for (long column = 0; column < lanes_m; column += LANES) {
            vector two[PAIR];
            for (long each = 0; each < PAIR; each++) {
                long row = pair * PAIR + each;
                two[each] = load_floats(matrix + row * lanes_m + column, lanes_of(row < m ? LANES : 0));
                if (row < group_of(m)) store((element *)(to.rows + row * depth) + column, two[each], lanes_of(LANES));
            }
            if (pair < depth) store_units(place(to.columns, depth, lanes_m, pair, column), two[0], two[PAIR - 1]);
        }
}

/* to (M, all) = a b, where `depth` pairs of a row of a meet; each row lies `to_row` floats from the next. To be called by all
   threads. */
static void multiply(const float *a, const float *b, float *to, long to_row, long m, long depth, long all) {
    for (long start = 0; start < all; start += WIDE) {
        long wide = min(WIDE, all - start);
        const float *panel = b + start * depth;
#pragma omp for schedule(static) nowait
        for (long row = 0; row < group_of(m); row += GROUP * PAIR)
            products(GROUP * PAIR, wide / LANES, a + row * depth, depth, 1, panel, wide, depth, to + row * to_row + start, to_row, 0, panel);
    }
#pragma omp barrier
}

/* Floats that `orthogonalise` needs: operands of x and their transpose, y padded, seven matrices (M, M). */
long orthogonalise_scratch(long m, long n) {
    long rows = group_of(m), lanes_m = whole_steps(m), lanes_n = whole_steps(n);
    return rows * lanes_n / PAIR + 2 * lanes_m * lanes_n / PAIR + rows * lanes_n + 3 * (rows + lanes_m) * lanes_m / PAIR +
           4 * rows * lanes_m + PARTS + 16 * 16;
}

static float *taken(float **scratch, long floats) {
    float *here = *scratch;
    *scratch += round_up(floats, 16);
    return here;
}

/* y (M, N) = U V^T, roughly, of x = U S V^T; M <= N. Each step multiplies x by a + b s + c s s, where s = x x^T. Such factors
   commute, so they are multiplied with each other and x is once. coefficients: a, b, c. */
void orthogonalise(const float *x, float *y, float *scratch, const float *coefficients, long m, long n, long steps, long threads) {
    long rows = group_of(m), lanes_m = whole_steps(m), lanes_n = whole_steps(n);
    long depth = lanes_m / PAIR, deep = lanes_n / PAIR, square = lanes_m * depth;
    float *parts = taken(&scratch, PARTS);
    operand of_x = {taken(&scratch, rows * deep), taken(&scratch, depth * lanes_n)};
    float *turned = taken(&scratch, deep * lanes_m), *padded = taken(&scratch, rows * lanes_n);
    operand of_s = {taken(&scratch, rows * depth), taken(&scratch, square)};
    operand of_factor = {taken(&scratch, rows * depth), taken(&scratch, square)};
    operand of_product = {taken(&scratch, rows * depth), taken(&scratch, square)};
    float *s = taken(&scratch, rows * lanes_m), *ss = taken(&scratch, rows * lanes_m);
    float *factor = taken(&scratch, rows * lanes_m), *factors = taken(&scratch, rows * lanes_m);
#pragma omp parallel num_threads(threads)
    {
        tile_shapes former = begin_products();
#pragma omp for schedule(static)
        for (long part = 0; part < PARTS; part++) {
            vector sum = {0};
            long end = m * n * (part + 1) / PARTS;
            for (long i = m * n * part / PARTS; i < end; i += LANES) {
                vector value = load_floats(x + i, lanes_of(end - i));
                sum += value * value;
            }
            parts[part] = 0;
            for (long lane = 0; lane < LANES; lane++) parts[part] += sum[lane];
        }
        double norm = 0;
        for (long part = 0; part < PARTS; part++) norm += parts[part];
        norm = __builtin_sqrt(norm);
        const float scale = 1 / (norm > 1e-7 ? norm : 1e-7);
        /* x by rows, by columns and turned, the last from the first. */
#pragma omp for schedule(static)
        for (long pair = 0; pair < pairs_of(m); pair++)
            for (long column = 0; column < lanes_n; column += LANES) {
                vector two[PAIR];
                for (long each = 0; each < PAIR; each++) {
                    long row = pair * PAIR + each;
                    two[each] = load_floats(x + row * n + column, lanes_of(row < m ? n - column : 0)) * scale;
                    if (row < rows) store((element *)(of_x.rows + row * deep) + column, two[each], lanes_of(LANES));
                }
                if (pair < depth) store_units(place(of_x.columns, depth, lanes_n, pair, column), two[0], two[PAIR - 1]);
            }
#pragma omp for schedule(static)
        for (long pair = 0; pair < deep; pair += LANES)
            for (long row = 0; row < lanes_m; row += LANES) {
                vector units[LANES];
                for (long lane = 0; lane < LANES; lane++)
                    units[lane] = load_floats(of_x.rows + (row + lane) * deep + pair, lanes_of(row + lane < rows ? deep - pair : 0));
                transpose(units);
                for (long lane = 0; lane < min(LANES, deep - pair); lane++)
                    *(loose *)place(turned, deep, lanes_m, pair + lane, row) = units[lane];
            }
        multiply(of_x.rows, turned, s, lanes_m, m, deep, lanes_m);
        for (long step = 0; step < steps; step++) {
            convert(s, of_s, m, lanes_m);
            multiply(of_s.rows, of_s.columns, ss, lanes_m, m, depth, lanes_m);
#pragma omp for schedule(static)
            for (long row = 0; row < m; row++) {
                for (long i = row * lanes_m; i < (row + 1) * lanes_m; i++) factor[i] = coefficients[1] * s[i] + coefficients[2] * ss[i];
                factor[row * lanes_m + row] += coefficients[0];
            }
            convert(factor, of_factor, m, lanes_m);
            if (step == 0) convert(factor, of_product, m, lanes_m);
            else {
                multiply(of_factor.rows, of_product.columns, factors, lanes_m, m, depth, lanes_m);
                convert(factors, of_product, m, lanes_m);
            }
            if (step + 1 == steps) break;
            multiply(of_factor.rows, of_s.columns, ss, lanes_m, m, depth, lanes_m);
            convert(ss, of_s, m, lanes_m);
            multiply(of_s.rows, of_factor.columns, s, lanes_m, m, depth, lanes_m);
        }
        multiply(of_product.rows, of_x.columns, padded, lanes_n, m, depth, lanes_n);
        end_products(former);
#pragma omp for schedule(static)
        for (long row = 0; row < m; row++) memcpy(y + row * n, padded + row * lanes_n, n * sizeof(float));
    }
}
