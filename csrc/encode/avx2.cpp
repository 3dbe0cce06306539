// The encoder for AVX2.
#define ISA avx2
#define LANES 8
#define ENCODE encode_avx2
#include "isa.inc"
