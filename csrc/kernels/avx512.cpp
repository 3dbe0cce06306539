// The kernels for AVX-512 with VNNI.
#include "../simd/avx512.h"

#define ISA avx512
#define TABLE kernels_avx512
#include "isa.inc"
