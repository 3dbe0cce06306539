// The kernels compiled for one instruction set; CMakeLists.txt gives this file the flags that it
// needs. Everything that they define has internal linkage: a function compiled for this set must
// not be the copy that the linker keeps for another file.
#include "../simd/avx512.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../float16.h"
#include "../kernels.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace pellucid {
namespace avx512 {
namespace {
// clang-format off: in this order
#include "elementwise.inc"
#include "linear_codes.inc"
#include "linear_direct.inc"
#include "linear_scratch.inc"
#include "linear.inc"
#include "kv_write.inc"
#include "attend.inc"
#include "attention.inc"
#include "ceilings.inc"
// clang-format on
}  // namespace
}  // namespace avx512

const Kernels *kernels_avx512() {
    using namespace avx512;
    static constexpr Kernels table = {"avx512",
                                      quantize,
                                      linear,
                                      rms_norm,
                                      layer_norm,
                                      add,
                                      silu_mul,
                                      gelu_mul,
                                      softcap,
                                      rope,
                                      kv_write,
                                      attention,
                                      attention_scratch,
                                      attention_partials_size,
                                      attention_partials,
                                      attention_merge,
                                      read_bytes,
                                      multiply_bytes,
                                      multiply_floats};
    return &table;
}

}  // namespace pellucid
