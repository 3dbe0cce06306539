// The encoders of this build that this CPU can run, and the sizes of their blocks.
#include "encode.h"

#include <vector>

#include "cpu_features.h"
#include "tile.h"

namespace pellucid {

// Each is compiled for the CPU features that it needs.
bool encode_avx512(const EncodeArgs &);
bool encode_avx2(const EncodeArgs &);
bool encode_portable(const EncodeArgs &);

std::span<const Encoder> encoders() {
    static const std::vector<Encoder> usable = [] {
        std::vector<Encoder> found;
        for (const Encoder &encoder : {
#if defined(__x86_64__)
                 Encoder{"avx512", "avx2 fma f16c avx512f avx512bw avx512vl avx512dq",
                         encode_avx512},
                 Encoder{"avx2", "avx2 fma f16c", encode_avx2},
#endif
                 Encoder{"portable", "", encode_portable},
             })
            if (cpu_has(encoder.needs)) found.push_back(encoder);
        return found;
    }();
    return usable;
}

BlockSize encoded_block(int ggml_type) {
    switch (static_cast<Format>(ggml_type)) {
        case Format::Q4_0:
            return {32, 18};
        case Format::Q4_1:
            return {32, 20};
        case Format::Q5_0:
            return {32, 22};
        case Format::Q5_1:
            return {32, 24};
        case Format::Q8_0:
            return {32, 34};
        case Format::IQ4_NL:
            return {32, 18};
        case Format::Q2_K:
            return {256, 84};
        case Format::Q3_K:
            return {256, 110};
        case Format::Q4_K:
            return {256, 144};
        case Format::Q5_K:
            return {256, 176};
        case Format::Q6_K:
            return {256, 210};
        case Format::IQ4_XS:
            return {256, 136};
        default:
            return {0, 0};
    }
}

}  // namespace pellucid
