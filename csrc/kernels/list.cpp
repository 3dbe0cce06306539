// The sets of kernels of this build: those of its architecture, the best first. This file is
// compiled for the baseline CPU, so what a set needs is known before any of its code runs.
#include "../kernels.h"

namespace pellucid {

std::span<const KernelSet> kernel_sets() {
    static constexpr KernelSet sets[] = {
#if defined(__x86_64__)
        {"avx512", "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni", kernels_avx512},
        {"amx", "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni amx_tile amx_int8",
         kernels_amx},
        {"avx2", "avx2 fma f16c", kernels_avx2},
#elif defined(__aarch64__)
        {"neon", "neon fp16 dotprod", kernels_neon},
#endif
        {"portable", "", kernels_portable},
    };
    return sets;
}

}  // namespace pellucid
