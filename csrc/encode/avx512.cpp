// The encoder for AVX-512.
#define ISA avx512
#define LANES 16
#define NEEDS "avx2 fma f16c avx512f avx512bw avx512vl avx512dq"
#define TABLE encoder_avx512
#include "isa.inc"
