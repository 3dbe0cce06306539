// Vectors of 16 float32 or int32 lanes, or of 64 bytes, on AVX-512 with VNNI (Ice Lake, Zen 4 and
// later).
//
// Every simd/*.h offers the same names for its own width, so that a kernel is written once
// (kernels/*.inc) and compiled for each. A lane is one output row of a weight tile; a byte vector
// holds 4 consecutive inputs for each lane.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace pellucid::avx512 {

constexpr int kLanes = 16;
constexpr bool kSignedDot = false;  // dot4 takes 8-bit codes as code - 128
constexpr int kRowsAtOnce =
    8;  // 8 accumulators, 8 code vectors, 4 sums, scales and temporaries of the 32 registers
constexpr int kSumsAtOnce = 8;  // one takes 4 or 5 cycles: none waits for another
constexpr int kStripsAtOnce = 1;
constexpr int kLargestPairSum = 0;  // dot4 sums in 32 bits (simd/avx2.h)
constexpr bool kPacks = true;       // the activations of several tokens (kernels/linear_packed.inc)
constexpr int kDotSums = 12,
              kFmaSums = 12;  // sums of the loops that measure peaks (kernels/ceilings.inc)

using F32 = __m512;
using I32 = __m512i;
using Bytes = __m512i;

inline F32 f32_zero() { return _mm512_setzero_ps(); }
inline F32 f32_set(float x) { return _mm512_set1_ps(x); }
inline F32 f32_load(const float *p) { return _mm512_loadu_ps(p); }
inline void f32_store(float *p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 f32_add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 f32_sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 f32_mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 f32_div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 f32_max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 f32_min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 f32_if_less(F32 a, F32 b, F32 then, F32 otherwise) {  // a < b ? then : otherwise
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
inline F32 f32_abs(F32 a) { return _mm512_abs_ps(a); }
inline F32 f32_fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline float f32_largest(F32 a) { return _mm512_reduce_max_ps(a); }
// The larger of two vectors without sign bits, compared as integers: NaN is larger than infinity,
// which is larger than any number. (f32_max returns its second operand if either is NaN.)
inline F32 f32_max_or_nan(F32 a, F32 b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline float f32_largest_or_nan(F32 a) {
    return std::bit_cast<float>(_mm512_reduce_max_epi32(_mm512_castps_si512(a)));
}
inline F32 f32_round(F32 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 f32_from_i32(I32 a) { return _mm512_cvtepi32_ps(a); }
inline I32 i32_from_f32(F32 a) { return _mm512_cvtps_epi32(a); }  // to the nearest, ties to even

// a · 2^n for integral n within the exponent's range
inline F32 f32_scale2(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }

inline F32 f32_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline F32 f32_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F32 f32_load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
inline F32 f32_load_s8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
inline void store_s8(int8_t *p, I32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtsepi32_epi8(a));
}
inline int32_t i32_sum(I32 a) { return _mm512_reduce_add_epi32(a); }

inline I32 i32_load(const int32_t *p) { return _mm512_loadu_si512(p); }
inline I32 i32_set(int32_t x) { return _mm512_set1_epi32(x); }
inline I32 i32_add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }

inline Bytes bytes_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline void bytes_store(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes bytes_and(Bytes a, uint8_t mask) {
    return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask)));
}
inline Bytes bytes_or(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
template <int N>
inline Bytes bytes_shift_right(Bytes a) {
    return _mm512_srli_epi16(a, N);
}  // bits cross bytes: mask afterwards
template <int N>
inline Bytes bytes_shift_left(Bytes a) {
    return _mm512_slli_epi16(a, N);
}
inline Bytes bytes_lookup(const uint8_t *table16, Bytes index) {
    __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table16));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), index);
}

// Each lane of acc += Σ over 4 bytes of code · x, x signed and the same for all lanes. `Full`:
// codes use all 8 bits.
//
// The product broadcasts x from memory itself. GCC 12 makes two instructions of the intrinsics; a
// sanitizer needs them, because it does not see what assembly reads.
template <bool Full>
inline I32 dot4(I32 acc, Bytes codes, const int8_t *x) {
#if defined(__clang__) || defined(__SANITIZE_ADDRESS__)
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(four));
#else
    struct Four {
        int8_t bytes[4];
    };
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(acc)
        : "v"(codes), "m"(*reinterpret_cast<const Four *>(x)));
    return acc;
#endif
}

// Prefetch into L2. A prefetch into L1 occupies a fill buffer that loads need (on Zen 4 this costs
// up to a third of the bandwidth).
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }

}  // namespace pellucid::avx512
