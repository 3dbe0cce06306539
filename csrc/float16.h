// float16 and bfloat16 as bits <-> float, without any instruction set extension.
#pragma once

#include <bit>
#include <cstdint>

namespace pellucid {

inline float float_from_bf16(uint16_t h) {
    return std::bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

inline float float_from_f16(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31,
             mantissa = h & 1023;
    if (exponent == 31)
        return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);  // infinity, NaN
    if (exponent == 0) {  // zero, subnormal: mantissa · 2^-24
        float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Rounds to the nearest, ties to even; numbers beyond 65,504 become infinity.
inline uint16_t f16_from_float(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000,
             magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x7f800000)
        return static_cast<uint16_t>(sign | 0x7c00 | (magnitude > 0x7f800000 ? 0x200 : 0));
    if (magnitude <
        0x38800000) {  // below 2^-14: adding 0.5 aligns the mantissa to 2^-24, and rounds it
        float aligned = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000));
    }
    uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    uint32_t half = (rounded >> 13) - (112 << 10);
    return static_cast<uint16_t>(sign | (half >= 0x7c00 ? 0x7c00 : half));
}

}  // namespace pellucid
