// Shared by the checks in this folder: a count of failures, random numbers from a fixed seed, and
// the kernels that this CPU can run.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "../cpu_features.h"
#include "../kernels.h"

namespace pellucid {

const Kernels *kernels_amx_model();  // amx_model.cpp: on x86-64

inline int failures = 0;

inline void check(bool good, const std::string &what) {
    if (good) return;
    failures++;
    std::printf("  FAILED: %s\n", what.c_str());
}

inline uint64_t state = 1;
inline uint32_t random_bits() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>(z >> 32);
}
inline int random_int(int low, int high) {
    return low + static_cast<int>(random_bits() % static_cast<uint32_t>(high - low + 1));
}
inline float random_float(float size) {
    return (static_cast<float>(random_bits()) * 0x1p-31f - 1.0f) * size;
}

// Check each table in turn, and print the results. Returns main's exit code.
template <class F>
int for_usable_kernels(F checks) {
    for (const KernelSet &set : kernel_sets()) {
        const Kernels *k = cpu_has(set.needs) ? set.table() : nullptr;
        if (k == nullptr || (k->request && !k->request())) {
            std::printf("%s: skipped, this CPU cannot run it\n", set.name);
            continue;
        }
        const int before = failures;
        checks(k);
        std::printf("%s: %s\n", set.name, failures == before ? "as it must be" : "wrong");
    }
    return failures == 0 ? 0 : 1;
}

}  // namespace pellucid
