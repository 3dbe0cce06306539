// The kernels in plain C++, for any machine.
#include "../simd/portable.h"

#define ISA portable
#define TABLE kernels_portable
#include "isa.inc"
