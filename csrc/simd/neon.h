// Vectors of 8 float32 or int32 lanes, or of 32 bytes, each a pair of registers: Armv8.2 with the
// dot product (Cortex-A76, Neoverse N1, Apple A13 and later). The names of simd/avx512.h.
//
// Why two registers: 4 bytes of the activation are repeated for all lanes by a load (ld1r), and one
// dot product per load would be bound by the loads. With 8 lanes each serves two. With 16 the codes
// of a tile alone (8 quads of 4 registers) would fill all 32 registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace pellucid::neon {

constexpr int kLanes = 8;
constexpr bool kSignedDot = true;  // dot4 takes 8-bit codes as code - 128
constexpr int kRowsAtOnce = 4;     // 8 registers of accumulators + 16 of codes + 2 of dot products
                                   // leave 6 for scales and the activation
constexpr bool kPacks = false;     // see simd/avx512.h
constexpr int kSumsAtOnce = 1;
constexpr int kStripsAtOnce = 1;
constexpr int kLargestPairSum = 0;         // dot4 sums in 32 bits (simd/avx2.h)
constexpr int kDotSums = 8, kFmaSums = 8;  // 16 registers of sums, 4 of operands

// Plain structs: gcc 12 moves arm_neon.h's own pairs (float32x4x2_t) through memory.
struct F32 {
    float32x4_t a, b;
};
struct I32 {
    int32x4_t a, b;
};
struct Bytes {
    uint8x16_t a, b;
};

inline F32 f32_set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F32 f32_zero() { return f32_set(0.0f); }
inline F32 f32_load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void f32_store(float *p, F32 x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
}
inline F32 f32_add(F32 x, F32 y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline F32 f32_sub(F32 x, F32 y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline F32 f32_mul(F32 x, F32 y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline F32 f32_div(F32 x, F32 y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
inline F32 f32_max(F32 x, F32 y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
inline F32 f32_min(F32 x, F32 y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
inline F32 f32_if_less(F32 x, F32 y, F32 then, F32 otherwise) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), then.a, otherwise.a),
            vbslq_f32(vcltq_f32(x.b, y.b), then.b, otherwise.b)};
}
inline F32 f32_abs(F32 x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
inline F32 f32_fma(F32 x, F32 y, F32 z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)};
}
inline float f32_largest(F32 x) { return vmaxvq_f32(vmaxq_f32(x.a, x.b)); }
// The larger of two vectors without sign bits; NaN if either is NaN, as vmaxq does.
inline F32 f32_max_or_nan(F32 x, F32 y) { return f32_max(x, y); }
inline float f32_largest_or_nan(F32 x) { return f32_largest(x); }
inline F32 f32_round(F32 x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
inline F32 f32_from_i32(I32 x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
inline I32 i32_from_f32(F32 x) { return {vcvtnq_s32_f32(x.a), vcvtnq_s32_f32(x.b)}; }

// a · 2^n: two steps, so that 2^n need not be a normal number
inline float32x4_t scale2(float32x4_t x, float32x4_t n) {
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1),
                    rest = vsubq_s32(whole, half), bias = vdupq_n_s32(127);
    x = vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
}
inline F32 f32_scale2(F32 x, F32 n) { return {scale2(x.a, n.a), scale2(x.b, n.b)}; }

inline F32 f32_load_f16(const uint16_t *p) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(p));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}
inline F32 f32_load_bf16(const uint16_t *p) {
    const uint16x8_t bits = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(bits)), 16)),
            vreinterpretq_f32_u32(vshlq_n_u32(vmovl_high_u16(bits), 16))};
}
inline F32 f32_load_u8(const uint8_t *p) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))};
}
inline F32 f32_load_s8(const uint8_t *p) {
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}
inline void store_s8(int8_t *p, I32 x) {
    vst1_s8(p, vqmovn_s16(vqmovn_high_s32(vqmovn_s32(x.a), x.b)));
}
inline int32_t i32_sum(I32 x) { return vaddvq_s32(vaddq_s32(x.a, x.b)); }

inline I32 i32_set(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline I32 i32_add(I32 x, I32 y) { return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b)}; }

inline Bytes bytes_load(const uint8_t *p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline void bytes_store(uint8_t *p, Bytes x) {
    vst1q_u8(p, x.a);
    vst1q_u8(p + 16, x.b);
}
inline Bytes bytes_and(Bytes x, uint8_t mask) {
    return {vandq_u8(x.a, vdupq_n_u8(mask)), vandq_u8(x.b, vdupq_n_u8(mask))};
}
inline Bytes bytes_or(Bytes x, Bytes y) { return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b)}; }
template <int N>
inline Bytes bytes_shift_right(Bytes x) {
    return {vshrq_n_u8(x.a, N), vshrq_n_u8(x.b, N)};
}
template <int N>
inline Bytes bytes_shift_left(Bytes x) {
    return {vshlq_n_u8(x.a, N), vshlq_n_u8(x.b, N)};
}
inline Bytes bytes_lookup(const uint8_t *table16, Bytes index) {
    const uint8x16_t table = vld1q_u8(table16);
    return {vqtbl1q_u8(table, index.a), vqtbl1q_u8(table, index.b)};
}

// sdot multiplies signed bytes. Codes of up to 6 bits are the same signed and unsigned. Codes of 8
// bits have the offset 128: flipping the highest bit subtracts it.
template <bool Full>
inline I32 dot4(I32 acc, Bytes codes, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
    if constexpr (Full)
        codes = {veorq_u8(codes.a, vdupq_n_u8(0x80)), veorq_u8(codes.b, vdupq_n_u8(0x80))};
    return {vdotq_s32(acc.a, vreinterpretq_s8_u8(codes.a), xs),
            vdotq_s32(acc.b, vreinterpretq_s8_u8(codes.b), xs)};
}

inline void prefetch(const void *p) { __builtin_prefetch(p); }

}  // namespace pellucid::neon
