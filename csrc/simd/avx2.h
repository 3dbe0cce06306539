// Vectors of 8 float32 or int32 lanes, or of 32 bytes, on AVX2 with FMA and F16C (Haswell, Zen and
// later). The names of simd/avx512.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace pellucid::avx2 {

constexpr int kLanes = 8;
constexpr bool kSignedDot = true;  // dot4 takes 8-bit codes as code - 128
// 16 registers: two strips of 4 rows have 8 sums of pairs; codes and accumulators lie in L1
constexpr int kRowsAtOnce = 4;
constexpr bool kPacks = true;  // see simd/avx512.h
constexpr int kSumsAtOnce = 1;
constexpr int kStripsAtOnce = 2;  // each quad of activations is used twice (linear_strips.inc)
// the largest code, times the quads in a run, whose products with 8-bit activations fit 16 bits
constexpr int kLargestPairSum = 32767 / (2 * 127);
// each sum of dot4_run has one of pairs beside it
constexpr int kDotSums = 4, kFmaSums = 10;

using F32 = __m256;
using I32 = __m256i;
using Bytes = __m256i;

inline F32 f32_zero() { return _mm256_setzero_ps(); }
inline F32 f32_set(float x) { return _mm256_set1_ps(x); }
inline F32 f32_load(const float *p) { return _mm256_loadu_ps(p); }
inline void f32_store(float *p, F32 x) { _mm256_storeu_ps(p, x); }
inline F32 f32_add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 f32_sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 f32_mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 f32_div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 f32_max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 f32_min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 f32_if_less(F32 a, F32 b, F32 then, F32 otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline F32 f32_abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F32 f32_fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline float f32_largest(F32 a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
// The larger of two vectors without sign bits, compared as integers: NaN is larger than infinity.
inline F32 f32_max_or_nan(F32 a, F32 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline float f32_largest_or_nan(F32 a) {
    const __m256i bits = _mm256_castps_si256(a);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return std::bit_cast<float>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}
inline F32 f32_round(F32 a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 f32_from_i32(I32 a) { return _mm256_cvtepi32_ps(a); }
inline I32 i32_from_f32(F32 a) { return _mm256_cvtps_epi32(a); }

// a · 2^n: two steps, so that 2^n need not be a normal number
inline F32 f32_scale2(F32 a, F32 n) {
    __m256i half = _mm256_srai_epi32(_mm256_cvtps_epi32(n), 1);
    __m256i rest = _mm256_sub_epi32(_mm256_cvtps_epi32(n), half);
    const __m256i bias = _mm256_set1_epi32(127);
    a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(a,
                         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

inline F32 f32_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline F32 f32_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32 f32_load_u8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
inline F32 f32_load_s8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
inline void store_s8(int8_t *p, I32 a) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packs_epi16(words, words));
}
inline int32_t i32_sum(I32 a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline I32 i32_set(int32_t x) { return _mm256_set1_epi32(x); }
inline I32 i32_add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }

inline Bytes bytes_load(const uint8_t *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}
inline void bytes_store(uint8_t *p, Bytes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a);
}
inline Bytes bytes_and(Bytes a, uint8_t mask) {
    return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask)));
}
inline Bytes bytes_or(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
template <int N>
inline Bytes bytes_shift_right(Bytes a) {
    return _mm256_srli_epi16(a, N);
}
template <int N>
inline Bytes bytes_shift_left(Bytes a) {
    return _mm256_slli_epi16(a, N);
}
inline Bytes bytes_lookup(const uint8_t *table16, Bytes index) {
    __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table16));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
}

// vpmaddubsw adds two products of unsigned and signed bytes in 16 bits, and saturates. Codes of up
// to 6 bits cannot reach that (2 · 63 · 127 = 16,002). Codes of 8 bits are made signed, and their
// sign is moved to x: 2 · 128 · 127 = 32,512 still fits.
template <bool Full>
inline I32 dot4(I32 acc, Bytes codes, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    __m256i xs = _mm256_set1_epi32(four), pairs;
    if constexpr (Full) {
        __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xs, w));
    } else {
        pairs = _mm256_maddubs_epi16(codes, xs);
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// dot4 of kRun quads, for kStrips strips of codes and kTokens tokens: sums[strip · kTokens +
// token]. codes(strip, i) is a quad of codes, x(token, i) points to a quad of activations. The sums
// of pairs stay in 16 bits, so each quad but the last saves a multiplication and an addition.
template <int kRun, int kStrips, int kTokens, class Codes, class Activations>
[[gnu::always_inline]] inline void dot4_run(I32 *sums, Codes codes, Activations x) {
    __m256i pairs[kStrips * kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kRun; i++) {
        __m256i own[kStrips];
#pragma GCC unroll 8
        for (int s = 0; s < kStrips; s++) own[s] = codes(s, i);
#pragma GCC unroll 8
        for (int m = 0; m < kTokens; m++) {
            int32_t four;
            std::memcpy(&four, x(m, i), 4);
            const __m256i all = _mm256_set1_epi32(four);
#pragma GCC unroll 8
            for (int s = 0; s < kStrips; s++) {
                const __m256i two = _mm256_maddubs_epi16(own[s], all);
                __m256i &to = pairs[s * kTokens + m];
                to = i == 0 ? two : _mm256_add_epi16(to, two);
                __asm__("" : "+x"(to));  // or gcc makes all products first, and spills them
            }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kStrips * kTokens; j++)
        sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(pairs[j], _mm256_set1_epi16(1)));
}

// Prefetch into L2. A prefetch into L1 occupies a fill buffer that loads need (on Zen 4 this costs
// up to a third of the bandwidth).
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }

}  // namespace pellucid::avx2
