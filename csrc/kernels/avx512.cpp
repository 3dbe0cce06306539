// The kernels for AVX-512 with VNNI.
#include "../simd/avx512.h"

#define ISA avx512
#define NEEDS "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni"
#define TABLE kernels_avx512
#include "isa.inc"
