// The Python module pellucid._native. It only converts arguments and results; its types are in
// src/pellucid/_native.pyi.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "cpu_features.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.doc() = "Pellucid's compiled part.";
    pellucid::bind_native(m);
    pellucid::bind_encode(m);
    m.def("cpu_architecture", &pellucid::cpu_architecture,
          "What this module was compiled for: x86_64, aarch64 or unknown.");
    m.def("cpu_name", &pellucid::cpu_name, "The maker's name of the CPU, or an empty string.");
    m.def(
        "cpu_features",
        [] {
            nb::dict features;
            for (const pellucid::CpuFeature &f : pellucid::detect_cpu_features())
                features[f.name] = f.usable;
            return features;
        },
        "Every known instruction set extension -> whether this process may use it.");
}
