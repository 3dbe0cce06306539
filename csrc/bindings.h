// The parts of the module pellucid._native; bindings.cpp combines them.
#pragma once

#include <nanobind/nanobind.h>

namespace pellucid {

void bind_encode(nanobind::module_ &m);
void bind_native(nanobind::module_ &m);

}  // namespace pellucid
