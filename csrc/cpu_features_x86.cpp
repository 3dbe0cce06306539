// x86-64: CPUID for the instructions, XCR0 for the registers, arch_prctl for AMX's tiles.
//
// Reference: Intel SDM vol. 1 §13.2-13.3 (XCR0, XGETBV), §14.3 and §15.2 (how to detect AVX and
// AVX-512), vol. 2A (CPUID); Linux Documentation/arch/x86/xstate.rst (dynamically enabled
// features).
//
// macOS on Intel enables AVX-512 state at first use, so XCR0 does not show it there. AVX-512 is
// then not reported, though it could be used.
#include "cpu_features.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pellucid {
namespace {

enum Register { EAX, EBX, ECX, EDX };

// The parts of the register state that must be saved for a feature (bits of XCR0).
constexpr uint64_t NOTHING = 0;
constexpr uint64_t YMM = 1u << 1 | 1u << 2;  // SSE, AVX
constexpr uint64_t ZMM =
    YMM | 1u << 5 | 1u << 6 | 1u << 7;           // opmask, upper halves of zmm0-15, zmm16-31
constexpr uint64_t TILES = 1u << 17 | 1u << 18;  // tile configuration, tile data

struct Bit {
    const char *name;
    uint32_t leaf, subleaf;
    Register reg;
    int bit;
    uint64_t state;
};

// clang-format off
constexpr Bit BITS[] = {
    {"sse4_2", 1, 0, ECX, 20, NOTHING},
    {"avx", 1, 0, ECX, 28, YMM},
    {"f16c", 1, 0, ECX, 29, YMM},
    {"fma", 1, 0, ECX, 12, YMM},
    {"avx2", 7, 0, EBX, 5, YMM},
    {"avx_vnni", 7, 1, EAX, 4, YMM},
    {"avx512f", 7, 0, EBX, 16, ZMM},
    {"avx512dq", 7, 0, EBX, 17, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},
    {"avx512vl", 7, 0, EBX, 31, ZMM},
    {"avx512vbmi", 7, 0, ECX, 1, ZMM},
    {"avx512_vnni", 7, 0, ECX, 11, ZMM},
    {"avx512_bf16", 7, 1, EAX, 5, ZMM},
    {"avx512_fp16", 7, 0, EDX, 23, ZMM},
    {"amx_tile", 7, 0, EDX, 24, TILES},
    {"amx_int8", 7, 0, EDX, 25, TILES},
    {"amx_bf16", 7, 0, EDX, 22, TILES},
};
// clang-format on

struct Registers {
    uint32_t value[4] = {0, 0, 0, 0};  // all zero where the CPU has no such leaf: no feature
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    // Leaf 7's EAX is its highest subleaf; __get_cpuid_count itself checks the highest leaf.
    if (leaf == 7 && subleaf > 0 && subleaf > cpuid(7, 0).value[EAX]) return r;
    __get_cpuid_count(leaf, subleaf, &r.value[EAX], &r.value[EBX], &r.value[ECX], &r.value[EDX]);
    return r;
}

// The register state that the operating system saves: XCR0, or 0 if it has not enabled XSAVE.
uint64_t saved_state() {
    constexpr int OSXSAVE = 27;
    if (!(cpuid(1, 0).value[ECX] >> OSXSAVE & 1)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv"
                     : "=a"(low), "=d"(high)
                     : "c"(0));  // the intrinsic would need -mxsave
    return static_cast<uint64_t>(high) << 32 | low;
}

// XCR0 shows tile data on every system that supports AMX, but a process must still request it
// (ARCH_REQ_XCOMP_PERM) and may be refused. This query has no side effects: it asks whether a
// request would succeed. The request itself is made when AMX's kernels are chosen.
bool tiles_can_be_had() {
#if defined(__linux__)
    constexpr int ARCH_GET_XCOMP_SUPP = 0x1021;
    constexpr int TILE_DATA = 18;
    uint64_t supported = 0;
    return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &supported) == 0 &&
           (supported >> TILE_DATA & 1);
#else
    return false;
#endif
}

}  // namespace

const char *cpu_architecture() { return "x86_64"; }

std::string cpu_name() {
    constexpr uint32_t FIRST = 0x80000002,
                       LAST = 0x80000004;  // the brand string: 16 characters in each leaf
    std::string name;
    for (uint32_t leaf = FIRST; leaf <= LAST; ++leaf) {
        for (uint32_t word : cpuid(leaf, 0).value) {
            for (int shift = 0; shift < 32; shift += 8) {
                char c = static_cast<char>(word >> shift & 0xff);
                if (c != '\0') name += c;
            }
        }
    }
    size_t begin = name.find_first_not_of(' '), end = name.find_last_not_of(' ');
    return begin == std::string::npos ? "" : name.substr(begin, end - begin + 1);
}

std::vector<CpuFeature> detect_cpu_features() {
    uint64_t saved = saved_state();
    if (!tiles_can_be_had()) saved &= ~TILES;
    std::vector<CpuFeature> features;
    for (const Bit &b : BITS) {
        bool exists = cpuid(b.leaf, b.subleaf).value[b.reg] >> b.bit & 1;
        features.push_back({b.name, exists && (saved & b.state) == b.state});
    }
    return features;
}

}  // namespace pellucid

#endif
