// Any other architecture or compiler: nothing is known, so the portable kernels run.
#include "cpu_features.h"

#if !defined(__aarch64__) && !(defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)))

namespace pellucid {

const char *cpu_architecture() { return "unknown"; }

std::string cpu_name() { return ""; }

std::vector<CpuFeature> detect_cpu_features() { return {}; }

}  // namespace pellucid

#endif
