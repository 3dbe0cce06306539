// The kernels for AVX2 with FMA and F16C.
#include "../simd/avx2.h"

#define ISA avx2
#define TABLE kernels_avx2
#include "isa.inc"
