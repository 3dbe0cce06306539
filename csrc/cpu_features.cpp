// What is the same on every architecture.
#include "cpu_features.h"

#include <algorithm>
#include <sstream>

namespace pellucid {

bool cpu_has(const char *features) {
    // Detect once: on a virtual machine each CPUID is a call of the hypervisor.
    static const std::vector<CpuFeature> known = detect_cpu_features();
    std::istringstream names(features);
    for (std::string name; names >> name;)
        if (std::none_of(known.begin(), known.end(),
                         [&](const CpuFeature &f) { return f.usable && f.name == name; }))
            return false;
    return true;
}

}  // namespace pellucid
