// The headers that every kernels/*.inc needs, beside the vectors of its instruction set.
//
// An .inc file is compiled inside a namespace of kernels/isa.inc. An editor that opens one alone
// has no such namespace. Then the file includes this header, with the portable vectors, and the
// files before it in isa.inc.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "../float16.h"
#include "../kernels.h"

#define UNROLL _Pragma("GCC unroll 16")

// For functions inside the loop over a row tile: a call would pass its vectors through memory.
#define INLINE [[gnu::always_inline]] inline

#ifndef ISA
#include "../simd/portable.h"
using namespace pellucid;
using namespace pellucid::portable;
#endif
