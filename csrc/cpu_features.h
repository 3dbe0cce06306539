// What the CPU can do, and what the operating system lets a process use of it.
//
// A kernel may run only where the instruction exists AND the operating system saves its
// registers at a context switch. CPUID tells the first, XCR0 the second; a machine can say yes to
// one and no to the other (old kernels, some hypervisors).
//
// Nothing here is compiled for a newer CPU than the baseline, so it runs everywhere. It reads; it
// changes no state of the process.
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

// The maker's name of the model, or "" where the machine does not tell.
std::string cpu_name();

// Every feature that a kernel may one day ask for, usable or not, in a fixed order; empty on an
// unknown architecture.
std::vector<CpuFeature> detect_cpu_features();

}  // namespace pellucid
