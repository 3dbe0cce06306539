// The parts of the module pellucid._native; bindings.cpp puts them together.
#pragma once

#include <nanobind/nanobind.h>

namespace pellucid {

void bind_native(nanobind::module_ &m);

}  // namespace pellucid
