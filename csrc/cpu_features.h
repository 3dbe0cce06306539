// What the CPU can do, and what the operating system lets a process use of it.
//
// A kernel may run only where the instruction exists AND the operating system saves its
// registers at a context switch. CPUID reports the first, XCR0 the second. They may differ (old
// kernels, some hypervisors).
//
// This code is compiled for the baseline CPU, so it runs everywhere. It changes no state of the
// process.
#pragma once

#include <string>
#include <vector>

namespace pellucid {

struct CpuFeature {
    const char *name;  // as Linux spells it in /proc/cpuinfo on x86; the usual short word on Arm
    bool usable;
};

// "x86_64", "aarch64" or "unknown": what this file was compiled for.
const char *cpu_architecture();

// The vendor's name of the model, or "" if the machine does not report it.
std::string cpu_name();

// Every feature that kernels may need, usable or not, in a fixed order; empty on an unknown
// architecture.
std::vector<CpuFeature> detect_cpu_features();

// Whether every one of `features`, names with spaces between them, is usable.
bool cpu_has(const char *features);

}  // namespace pellucid
