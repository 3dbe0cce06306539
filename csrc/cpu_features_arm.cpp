// AArch64: the operating system reports what a process may use, by the auxiliary vector (Linux) or
// sysctl (macOS).
//
// Reference: Linux Documentation/arch/arm64/elf_hwcaps.rst; Apple, "Determining instruction set
// characteristics".
#include "cpu_features.h"

#if defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace pellucid {

const char *cpu_architecture() { return "aarch64"; }

#if defined(__linux__)

std::string cpu_name() { return ""; }  // Linux gives numbers of maker and part, no name

std::vector<CpuFeature> detect_cpu_features() {
    // The bits are the kernel's ABI; older C libraries do not name the newer ones.
    unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    auto bit = [](unsigned long word, int i) { return (word >> i & 1) != 0; };
    return {
        {"neon", bit(hwcap, 1)},      // ASIMD
        {"fp16", bit(hwcap, 10)},     // ASIMDHP
        {"dotprod", bit(hwcap, 20)},  // ASIMDDP
        {"sve", bit(hwcap, 22)},      // SVE
        {"sve2", bit(hwcap2, 1)},     // SVE2
        {"i8mm", bit(hwcap2, 13)},    // I8MM
        {"bf16", bit(hwcap2, 14)},    // BF16
    };
}

#elif defined(__APPLE__)

std::string cpu_name() {
    char name[128] = "";
    size_t size = sizeof(name) - 1;
    return sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0 ? name : "";
}

std::vector<CpuFeature> detect_cpu_features() {
    auto has = [](const char *key) {
        int value = 0;
        size_t size = sizeof(value);
        return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    return {
        {"neon", true},  // part of the architecture there
        {"fp16", has("hw.optional.arm.FEAT_FP16")},
        {"dotprod", has("hw.optional.arm.FEAT_DotProd")},
        {"sve", false},
        {"sve2", false},
        {"i8mm", has("hw.optional.arm.FEAT_I8MM")},
        {"bf16", has("hw.optional.arm.FEAT_BF16")},
    };
}

#else

std::string cpu_name() { return ""; }

std::vector<CpuFeature> detect_cpu_features() {
    return {{"neon", true}};
}  // part of the architecture; nobody to ask for more

#endif

}  // namespace pellucid

#endif
