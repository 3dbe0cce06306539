// The encoders of this build that this CPU can run, and the sizes of their blocks.
#include "encode.h"

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "tile.h"

namespace pellucid {

#if defined(__x86_64__)
const Encoder *encoder_avx512();
const Encoder *encoder_avx2();
#endif
const Encoder *encoder_portable();

std::span<const Encoder *const> encoders() {
    static const std::vector<const Encoder *> usable = [] {
        const std::vector<CpuFeature> features = detect_cpu_features();
        std::vector<const Encoder *> found;
        for (const Encoder *encoder : {
#if defined(__x86_64__)
                 encoder_avx512(),
                 encoder_avx2(),
#endif
                 encoder_portable(),
             }) {
            std::istringstream needs(encoder->needs);
            bool can_run = true;
            for (std::string need; needs >> need;)
                can_run &= std::any_of(features.begin(), features.end(), [&](const CpuFeature &f) {
                    return f.usable && f.name == need;
                });
            if (can_run) found.push_back(encoder);
        }
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
