// A model of AMX's tile registers in plain C++, for the same kernel. So a machine without AMX can
// compare the kernel's bits with AVX-512's.
//
// Reference: the pseudocode of LDTILECFG, TILELOADD and TDPBSUD in Intel SDM vol. 2.
#include <algorithm>
#include <cassert>
#include <iterator>
#include <utility>

#include "../simd/avx512.h"

#define ISA avx512
#include "../kernels/common.h"
#include "support.h"

namespace pellucid {
namespace avx512 {
namespace {
// clang-format off: in this order
#include "../kernels/linear_codes.inc"
#include "../kernels/linear_scratch.inc"
#include "../kernels/linear_amx.inc"
// clang-format on

struct TileModel {
    struct Register {
        int rows, row_bytes;
        uint8_t bytes[16][64];
    };
    static inline Register tile[8];

    static void configure(int quads) {
        for (int t = 0; t < 8; t++)
            tile[t] = {t < 6 ? 16 : quads, t == 4 || t == 5 ? 4 * quads : 64, {}};
    }
    static void release() {
        for (Register &r : tile) r = {};  // without a size: reading it gives zeros
    }
    template <int t>
    static void zero() {
        std::memset(tile[t].bytes, 0, sizeof(tile[t].bytes));
    }
    template <int t>
    static void load(const void *p, size_t stride) {
        zero<t>();
        for (int r = 0; r < tile[t].rows; r++)
            std::memcpy(tile[t].bytes[r], static_cast<const uint8_t *>(p) + r * stride,
                        tile[t].row_bytes);
    }
    template <int t>
    static void store(void *p, size_t stride) {
        for (int r = 0; r < tile[t].rows; r++)
            std::memcpy(static_cast<uint8_t *>(p) + r * stride, tile[t].bytes[r],
                        tile[t].row_bytes);
    }
    template <int sums, int x, int codes>
    static void multiply() {
        for (int m = 0; m < tile[sums].rows; m++)
            for (int n = 0; n < tile[sums].row_bytes / 4; n++) {
                int32_t sum;
                std::memcpy(&sum, tile[sums].bytes[m] + 4 * n, 4);
                for (int k = 0; k < tile[x].row_bytes / 4 && k < tile[codes].rows; k++)
                    for (int i = 0; i < 4; i++)
                        sum += static_cast<int8_t>(tile[x].bytes[m][4 * k + i]) *
                               tile[codes].bytes[k][4 * n + i];
                std::memcpy(tile[sums].bytes[m] + 4 * n, &sum, 4);
            }
    }
};

}  // namespace
}  // namespace avx512

const Kernels *kernels_amx_model() {
    static const Kernels table = avx512::with_tiles<avx512::TileModel>();
    return &table;
}

}  // namespace pellucid
