// The encoder for any CPU: what the compiler makes of the vectors.
#define ISA portable
#define LANES 4
#define NEEDS ""
#define TABLE encoder_portable
#include "isa.inc"
