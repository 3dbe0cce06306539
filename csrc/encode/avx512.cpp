// The encoder for AVX-512.
#define ISA avx512
#define LANES 16
#define ENCODE encode_avx512
#include "isa.inc"
