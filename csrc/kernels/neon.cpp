// The kernels for Arm with the dot product.
#include "../simd/neon.h"

#define ISA neon
#define NEEDS "neon fp16 dotprod"
#define TABLE kernels_neon
#include "isa.inc"
