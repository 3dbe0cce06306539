// The tables of this build: those of its architecture, the best first; and which of them this CPU
// can run.
#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu_features.h"
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

bool can_run(const Kernels &kernels) {
    // Detect once: on a virtual machine each CPUID is a call of the hypervisor.
    static const std::vector<CpuFeature> features = detect_cpu_features();
    std::istringstream needs(kernels.needs);
    for (std::string need; needs >> need;)
        if (std::none_of(features.begin(), features.end(),
                         [&](const CpuFeature &f) { return f.usable && f.name == need; }))
            return false;
    return true;
}

}  // namespace pellucid
