// Vectors of 16 lanes in plain C++: for any other CPU, and the plainest definition of what the
// other headers do. The names of simd/avx512.h. The loops are short and regular, so that a compiler
// can vectorize them for the baseline.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../float16.h"

namespace pellucid::portable {

constexpr int kLanes = 16;
constexpr bool kSignedDot = false;  // dot4 takes 8-bit codes as code - 128
constexpr int kRowsAtOnce = 4;
constexpr bool kPacks = false;  // see simd/avx512.h
constexpr int kSumsAtOnce = 1;
constexpr int kStripsAtOnce = 1;
constexpr int kLargestPairSum = 0;  // dot4 sums in 32 bits (simd/avx2.h)
constexpr int kDotSums = 2, kFmaSums = 2;

struct F32 {
    float v[kLanes];
};
struct I32 {
    int32_t v[kLanes];
};
struct Bytes {
    uint8_t v[kLanes * 4];
};

template <class V, class F>
inline V each(F f) {
    V out;
    for (int i = 0; i < static_cast<int>(sizeof(out.v) / sizeof(out.v[0])); i++) out.v[i] = f(i);
    return out;
}

inline F32 f32_set(float x) {
    return each<F32>([&](int) { return x; });
}
inline F32 f32_zero() { return f32_set(0.0f); }
inline F32 f32_load(const float *p) {
    return each<F32>([&](int i) { return p[i]; });
}
inline void f32_store(float *p, const F32 &x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline F32 f32_add(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32 f32_sub(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32 f32_mul(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32 f32_div(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32 f32_max(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 f32_min(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 f32_if_less(const F32 &a, const F32 &b, const F32 &then, const F32 &otherwise) {
    return each<F32>([&](int i) { return a.v[i] < b.v[i] ? then.v[i] : otherwise.v[i]; });
}
inline F32 f32_abs(const F32 &a) {
    return each<F32>([&](int i) { return std::fabs(a.v[i]); });
}
inline F32 f32_fma(const F32 &a, const F32 &b, const F32 &c) {
    return each<F32>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline float f32_largest(const F32 &a) { return *std::max_element(a.v, a.v + kLanes); }
// The larger of two vectors without sign bits, compared as integers: NaN is larger than infinity.
inline F32 f32_max_or_nan(const F32 &a, const F32 &b) {
    return each<F32>([&](int i) {
        return std::bit_cast<uint32_t>(a.v[i]) > std::bit_cast<uint32_t>(b.v[i]) ? a.v[i] : b.v[i];
    });
}
inline float f32_largest_or_nan(const F32 &a) {
    return *std::max_element(a.v, a.v + kLanes, [](float x, float y) {
        return std::bit_cast<uint32_t>(x) < std::bit_cast<uint32_t>(y);
    });
}
inline F32 f32_round(const F32 &a) {
    return each<F32>([&](int i) { return std::nearbyint(a.v[i]); });
}
inline F32 f32_from_i32(const I32 &a) {
    return each<F32>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I32 i32_from_f32(const F32 &a) {
    return each<I32>([&](int i) {
        return std::isnan(a.v[i]) ? 0 : static_cast<int32_t>(std::nearbyint(a.v[i]));
    });
}
inline F32 f32_scale2(const F32 &a, const F32 &n) {
    return each<F32>([&](int i) {
        return std::isnan(n.v[i]) ? n.v[i] : std::ldexp(a.v[i], static_cast<int>(n.v[i]));
    });
}

inline F32 f32_load_f16(const uint16_t *p) {
    return each<F32>([&](int i) { return float_from_f16(p[i]); });
}
inline F32 f32_load_bf16(const uint16_t *p) {
    return each<F32>([&](int i) { return float_from_bf16(p[i]); });
}
inline F32 f32_load_u8(const uint8_t *p) {
    return each<F32>([&](int i) { return static_cast<float>(p[i]); });
}
inline F32 f32_load_s8(const uint8_t *p) {
    return each<F32>([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
inline void store_s8(int8_t *p, const I32 &a) {
    for (int i = 0; i < kLanes; i++) p[i] = static_cast<int8_t>(a.v[i]);
}
inline int32_t i32_sum(const I32 &a) {
    int32_t sum = 0;
    for (int32_t x : a.v) sum += x;
    return sum;
}

inline I32 i32_set(int32_t x) {
    return each<I32>([&](int) { return x; });
}
inline I32 i32_add(const I32 &a, const I32 &b) {
    return each<I32>([&](int i) { return a.v[i] + b.v[i]; });
}

inline Bytes bytes_load(const uint8_t *p) {
    return each<Bytes>([&](int i) { return p[i]; });
}
inline void bytes_store(uint8_t *p, const Bytes &a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline Bytes bytes_and(const Bytes &a, uint8_t mask) {
    return each<Bytes>([&](int i) { return static_cast<uint8_t>(a.v[i] & mask); });
}
inline Bytes bytes_or(const Bytes &a, const Bytes &b) {
    return each<Bytes>([&](int i) { return static_cast<uint8_t>(a.v[i] | b.v[i]); });
}
template <int N>
inline Bytes bytes_shift_right(const Bytes &a) {
    return each<Bytes>([&](int i) { return static_cast<uint8_t>(a.v[i] >> N); });
}
template <int N>
inline Bytes bytes_shift_left(const Bytes &a) {
    return each<Bytes>([&](int i) { return static_cast<uint8_t>(a.v[i] << N); });
}
inline Bytes bytes_lookup(const uint8_t *table16, const Bytes &index) {
    return each<Bytes>([&](int i) { return table16[index.v[i] & 15]; });
}

template <bool Full>
inline I32 dot4(const I32 &acc, const Bytes &codes, const int8_t *x) {
    return each<I32>([&](int i) {
        const uint8_t *c = codes.v + 4 * i;
        return acc.v[i] + c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3];
    });
}

inline void prefetch(const void *) {}

}  // namespace pellucid::portable
