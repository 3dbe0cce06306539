// Which tables this build has: those of its architecture, the best first. What the CPU at hand can
// run of them is asked elsewhere.
#include "../kernels.h"

namespace pellucid {

std::span<const Kernels *const> kernel_tables() {
    static const Kernels *const tables[] = {
#if defined(__x86_64__)
        kernels_avx512(),
        kernels_amx(),
        kernels_avx2(),
#elif defined(__aarch64__)
        kernels_neon(),
#endif
        kernels_portable(),
    };
    return tables;
}

}  // namespace pellucid
