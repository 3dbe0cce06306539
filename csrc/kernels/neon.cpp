// The kernels for Arm with the dot product.
#include "../simd/neon.h"

#define ISA neon
#define TABLE kernels_neon
#include "isa.inc"
