// The kernels for AVX2 with FMA and F16C.
#include "../simd/avx2.h"

#define ISA avx2
#define NEEDS "avx2 fma f16c"
#define TABLE kernels_avx2
#include "isa.inc"
