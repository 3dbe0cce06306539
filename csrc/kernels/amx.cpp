// The kernels of AVX-512, with linear layers for many tokens on AMX. Whole models have not run on
// AMX hardware yet, so these kernels run only if requested (docs/decisions.md, 15).
//
// Tiles are used by inline assembly, in order and with memory clobbered. The intrinsics of gcc 12
// do not tell the compiler which memory they read, and it drops the stores to that memory. Tile
// data must be requested once per process (Linux Documentation/arch/x86/xstate.rst).
#include <algorithm>
#include <iterator>
#include <utility>

#include "../simd/avx512.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define ISA avx512
#include "common.h"

namespace pellucid {
namespace avx512 {
namespace {
// clang-format off: in this order
#include "linear_codes.inc"
#include "linear_scratch.inc"
#include "linear_amx.inc"
// clang-format on

struct Tiles {
    // Registers 0–3 are 16 × 16 int32, 4 and 5 are 16 tokens × `quads` quads, 6 and 7 `quads` quads
    // × 16 rows.
    static void configure(int quads) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
        } shapes;
        static_assert(sizeof(shapes) == 64);
        shapes.row_bytes[4] = shapes.row_bytes[5] = static_cast<uint16_t>(4 * quads);
        shapes.row_bytes[6] = shapes.row_bytes[7] = 64;
        shapes.rows[6] = shapes.rows[7] = static_cast<uint8_t>(quads);
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    }
    static void release() { __asm__ volatile("tilerelease" : : : "memory"); }
    template <int t>
    static void zero() {
        __asm__ volatile("tilezero %%tmm%c0" : : "n"(t));
    }
    template <int t>
    static void load(const void *p, size_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                         :
                         : "r"(p), "r"(stride), "n"(t)
                         : "memory");
    }
    template <int t>
    static void store(void *p, size_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                         :
                         : "r"(p), "r"(stride), "n"(t)
                         : "memory");
    }
    // Register `sums` += `x` (signed) · `codes` (unsigned).
    template <int sums, int x, int codes>
    static void multiply() {
        __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(sums), "n"(x), "n"(codes));
    }
};

bool request_tiles() {
#if defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace
}  // namespace avx512

const Kernels *kernels_amx() {
    static const Kernels table = [] {
        Kernels t = avx512::with_tiles<avx512::Tiles>();
        t.request = avx512::request_tiles;
        return t;
    }();
    return &table;
}

}  // namespace pellucid
