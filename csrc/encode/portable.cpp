// The encoder for any CPU: what the compiler makes of the vectors.
#define ISA portable
#define LANES 4
#define ENCODE encode_portable
#include "isa.inc"
