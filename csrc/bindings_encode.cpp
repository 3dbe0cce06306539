// The encoders as Python sees them: rows of float32 become rows of blocks, in one call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "encode.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace pellucid {
namespace {

using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Columns = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kRowsAtOnce = 16;  // of a share, so that threads that are late have less left

void require(bool condition, const char *what) {
    if (!condition) throw std::invalid_argument(what);
}

bool encode(ThreadPool &pool, const std::string &isa, int ggml_type, Values values,
            std::optional<Columns> importance, Bytes out) {
    const Encoder *encoder = nullptr;
    for (const Encoder &known : encoders())
        if (known.isa == isa) encoder = &known;
    require(encoder, "there is no such encoder on this CPU");
    const BlockSize block = encoded_block(ggml_type);
    require(block.bytes, "this type cannot be encoded");
    const size_t rows = values.shape(0), columns = values.shape(1);
    require(columns && columns % block.values == 0, "a row does not fill whole blocks");
    const size_t row_bytes = columns / block.values * block.bytes;
    require(out.shape(0) == rows && out.shape(1) == row_bytes, "the blocks have a wrong shape");
    require(!importance || importance->shape(0) == columns, "the importance has a wrong length");
    const size_t stages = (rows + pool.size() * kRowsAtOnce - 1) / (pool.size() * kRowsAtOnce);
    const float *x = values.data(), *weights = importance ? importance->data() : nullptr;
    uint8_t *bytes = out.data();
    std::atomic<bool> held{true};
    nb::gil_scoped_release release;
    pool.run([&] { return stages; },
             [&](size_t stage, size_t share) {
                 const size_t first = (stage * pool.size() + share) * kRowsAtOnce;
                 if (first >= rows || !held.load(std::memory_order_relaxed)) return;
                 const EncodeArgs args{ggml_type, std::min(kRowsAtOnce, rows - first),
                                       columns,   x + first * columns,
                                       weights,   bytes + first * row_bytes};
                 if (!encoder->encode(args)) held.store(false, std::memory_order_relaxed);
             });
    return held.load(std::memory_order_relaxed);
}

}  // namespace

void bind_encode(nb::module_ &m) {
    m.def("encoders", [] {
        std::vector<std::string> names;
        for (const Encoder &encoder : encoders()) names.push_back(encoder.isa);
        return names;
    });
    m.def("encode", &encode, nb::arg("pool"), nb::arg("isa"), nb::arg("ggml_type"),
          nb::arg("values"), nb::arg("importance").none(), nb::arg("out"));
}

}  // namespace pellucid
