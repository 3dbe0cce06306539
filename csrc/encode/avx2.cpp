// The encoder for AVX2.
#define ISA avx2
#define LANES 8
#define NEEDS "avx2 fma f16c"
#define TABLE encoder_avx2
#include "isa.inc"
