/* What all kernels stand on: vectors of the processor's width, and elements, which are bfloat16 where this is compiled with
   -DBFLOAT16 (needs AVX512-BF16), else float32. Arithmetic is in float32. */

#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* OpenMP is the one that torch has loaded; its header is not everywhere where that is. */
extern int omp_get_thread_num(void);

/* Vectors as wide as the processor's registers. A matrix product of ROWS x COLUMNS vectors accumulates in 24 of 32
   registers, or in 12 of 16. */
#define ROWS 6
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 16
#define COLUMNS 4
#elif defined(__AVX__)
#define LANES 8
#define COLUMNS 2
#else
#define LANES 4
#define COLUMNS 4
#endif
#define WIDE (COLUMNS * LANES) /* channels that one product computes side by side */

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Sums over many rows are taken in so many parts, whatever the number of threads, and these added up. */
#define PARTS 64

/* Ask for what a walk through memory comes to, so many elements from here: processors do not always foresee it. Memory that is not
   there is not touched. */
#define prefetch_ahead(at, further) __builtin_prefetch((at) + (further), 0, 2)
#define prefetch_ahead_to_write(at, further) __builtin_prefetch((at) + (further), 1, 2)
#define FURTHER 1024

static inline long min(long a, long b) { return a < b ? a : b; }
/* What dropout multiplies by what it keeps: bytes of at least `threshold`. */
static inline float kept_scale(long threshold) { return 256.0f / (256 - threshold); }

/* Cores are not equally fast, least of all those that others use too. So threads take what comes next when they have done what they
   had, of many pieces a sixteenth of their part at a time, of few one: schedule(dynamic, FEW_OF(pieces, threads)). */
#define FEW_OF(pieces, threads) ((pieces) > 32 * (threads) ? (pieces) / (16 * (threads)) : 1)

static inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline vector blend(ints which, vector yes, vector no) {
    return (vector)((which & (ints)yes) | (~which & (ints)no));
}

/* Of `lanes` of a vector alone something is loaded or stored; zero is loaded into the others. */
#if LANES == 16
typedef __mmask16 lanes;
static inline lanes lanes_of(long count) { return count >= LANES ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0; }

static inline vector load_floats(const float *from, lanes which) { return (vector)_mm512_maskz_loadu_ps(which, from); }
static inline void store_floats(float *to, vector v, lanes which) { _mm512_mask_storeu_ps(to, which, (__m512)v); }

/* a * b, which is rounded before anything is added to it. */
static inline vector rounded_product(vector a, vector b) {
    return (vector)_mm512_mul_round_ps((__m512)a, (__m512)b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vector square_root(vector v) { return (vector)_mm512_sqrt_ps((__m512)v); }

static inline ints load_bytes(const uint8_t *from, lanes which) {
    return (ints)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(which, from));
}

static inline void store_bytes(uint8_t *to, ints v, lanes which) {
    _mm512_mask_cvtepi32_storeu_epi8(to, which, (__m512i)v);
}
static inline void transpose(vector square[LANES]) {
    __m512 *rows = (__m512 *)square, pairs[16], fours[16], eights[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            __m512d low = (__m512d)pairs[i + half], high = (__m512d)pairs[i + half + 2];
            fours[i + 2 * half] = (__m512)_mm512_unpacklo_pd(low, high);
            fours[i + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    /* fours[4 i + j] has, of the rows 4 i to 4 i + 3, the columns j, 4 + j, 8 + j, 12 + j. */
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            eights[i + j] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0x88);
            eights[i + j + 4] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        rows[j] = _mm512_shuffle_f32x4(eights[j], eights[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_f32x4(eights[j], eights[j + 8], 0xDD);
    }
}
#else
typedef long lanes;
static inline lanes lanes_of(long count) { return count >= LANES ? LANES : count > 0 ? count : 0; }

static inline vector load_floats(const float *from, lanes which) {
    if (which == LANES) return *(const loose *)from;
    vector v = {0};
    memcpy(&v, from, 4 * which);
    return v;
}

static inline void store_floats(float *to, vector v, lanes which) {
    if (which == LANES) *(loose *)to = v;
    else memcpy(to, &v, 4 * which);
}

static inline void transpose(vector square[LANES]) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            float other = square[i][j];
            square[i][j] = square[j][i], square[j][i] = other;
        }
}

static inline vector rounded_product(vector a, vector b) { return a * b; } /* but for the compiler's will */

static inline vector square_root(vector v) {
#ifdef __AVX__
    return (vector)_mm256_sqrt_ps((__m256)v);
#else
    for (long lane = 0; lane < LANES; lane++) v[lane] = __builtin_sqrtf(v[lane]);
    return v;
#endif
}

static inline ints load_bytes(const uint8_t *from, lanes which) {
#ifdef __AVX2__
    if (which == LANES) return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#endif
    ints v = {0};
    for (long lane = 0; lane < which; lane++) v[lane] = from[lane];
    return v;
}

static inline void store_bytes(uint8_t *to, ints v, lanes which) {
#ifdef __AVX__
    if (which == LANES) {
        __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extractf128_si256((__m256i)v, 1);
        __m128i halves = _mm_packs_epi32(low, high);
        _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(halves, halves));
        return;
    }
#endif
    for (long lane = 0; lane < which; lane++) to[lane] = v[lane];
}
#endif

/* A unit is what one lane of a matrix product takes at a time: four bytes, one float or two bfloat16. Of these, PAIR
   share a unit. `store_units` stores two vectors as one of units, their lanes side by side. */
#ifdef BFLOAT16
#define PAIR 2
typedef uint16_t element;

static inline vector load(const element *from, lanes which) {
    return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16);
}

static inline void store(element *to, vector v, lanes which) {
    _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

static inline void store_units(float *to, vector low, vector high) {
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                  6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(side_by_side, bits));
}

static inline vector multiply_add(vector sum, float unit, vector other) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(unit), (__m512bh)other);
}
#else
#define PAIR 1
typedef float element;

static inline vector load(const element *from, lanes which) { return load_floats(from, which); }
static inline void store(element *to, vector v, lanes which) { store_floats(to, v, which); }

static inline void store_units(float *to, vector low, vector high) {
    (void)high;
    *(loose *)to = low;
}

static inline vector multiply_add(vector sum, float unit, vector other) { return sum + unit * other; }
#endif
