// The native backend as Python sees it: weights, caches and programs are objects, and a step is one
// call. Conversions and checks only.
//
// Kernels do not check their arguments. This file checks shapes and formats of arrays.
// program_checks.cpp checks that the parts of a program fit together, and the indices of a batch. A
// wrong program or batch raises an exception and never reads beyond an array. The arrays of a batch
// must not change while it runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "bindings.h"
#include "cpu_features.h"
#include "machine.h"
#include "program.h"
#include "stored_weights.h"

namespace nb = nanobind;

namespace pellucid {
namespace {

using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tables = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Blocks = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>, nb::c_contig>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Results2D = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char *what) {
    if (!condition) throw std::invalid_argument(what);
}

std::shared_ptr<Weight> load_weight(ThreadPool &pool, WeightMemory &memory, int ggml_type,
                                    size_t inputs, Rows rows, std::optional<Ints> order) {
    const Format format = static_cast<Format>(ggml_type);
    const RowLayout row = row_layout(format, inputs);
    require(rows.shape(1) == row.file_bytes, "a row has the wrong number of bytes");
    const size_t outputs = rows.shape(0), row_tiles = (outputs + kTileRows - 1) / kTileRows;
    const size_t bytes = row_tiles * row.tile_bytes;
    auto weight = std::make_shared<Weight>(Weight{format, outputs, inputs, bytes, nullptr});
    if (order) {
        require(order->shape(0) == inputs, "the order has another length than the rows");
        require(dense_bytes(format) == 0, "only inputs of quantized weights have an order");
        std::vector<bool> seen(inputs);
        for (size_t i = 0; i < inputs; i++) {
            const size_t input = static_cast<size_t>(order->data()[i]);
            require(input < inputs && !seen[input], "the order is not one of all inputs");
            seen[input] = true;
        }
        weight->order.assign(order->data(), order->data() + inputs);
    }
    const uint8_t *file = rows.data();
    std::atomic<bool> finite{true};
    nb::gil_scoped_release release;
    const auto prepare = [&] {
        weight->tiles = memory.take(bytes);
        return size_t{1};
    };
    pool.run(prepare, [&](size_t, size_t share) {  // each thread writes what it will read
        const size_t first = row_tiles * share / pool.size(),
                     last = row_tiles * (share + 1) / pool.size();
        const auto put_in_tiles = dense_bytes(format) ? repack_dense : repack;
        if (!put_in_tiles(format, file, outputs, inputs, weight->tiles.get(), first, last))
            finite.store(false, std::memory_order_relaxed);
    });
    weight->finite = finite.load(std::memory_order_relaxed);
    return weight;
}

// A matrix as Python describes it: ggml's number of the format, outputs, inputs, file descriptor,
// offset, interleaved heads.
using PythonMatrix = std::tuple<int, size_t, size_t, int, size_t, size_t>;
// The matrix, the offset in the file, and the system's error.
using PythonUnread = std::tuple<size_t, size_t, int>;

std::tuple<std::vector<std::shared_ptr<Weight>>, std::optional<PythonUnread>> load_stored_weights(
    ThreadPool &pool, WeightMemory &memory, const std::vector<PythonMatrix> &from) {
    std::vector<StoredMatrix> matrices;
    for (const auto &[ggml_type, outputs, inputs, file, offset, heads] : from) {
        const StoredMatrix m{static_cast<Format>(ggml_type), outputs, inputs, file, offset, heads};
        const size_t row_bytes = row_layout(m.format, inputs).file_bytes;
        require(outputs > 0 && outputs <= kMostBytes / row_bytes && offset <= kMostBytes,
                "a matrix has no rows, or too many");
        require(heads == 0 || outputs % (2 * heads) == 0, "rows are not pairs of each head");
        matrices.push_back(m);
    }
    std::optional<Unread> unread;
    std::vector<std::shared_ptr<Weight>> weights;
    {
        nb::gil_scoped_release release;
        weights = load_stored(pool, memory, matrices, unread);
    }
    if (!unread) return {std::move(weights), std::nullopt};
    return {std::vector<std::shared_ptr<Weight>>{},
            PythonUnread{unread->matrix, unread->offset, unread->error}};
}

size_t kv_block_bytes(const KVStore &kv, KvType type) {
    return static_cast<size_t>(kv.chunks_per_block) * static_cast<size_t>(kv.kv_heads) *
           kv_chunk_bytes(type, kv.head_dim);
}

KvType kv_type_by_name(const std::string &name) {
    for (const KvTypeName &type : kKvTypes)
        if (name == type.name) return type.type;
    throw std::invalid_argument("no kernel knows this type of cache");
}

std::shared_ptr<KVStore> new_kv_store(size_t blocks, int kv_heads, int head_dim,
                                      int chunks_per_block, const std::string &k_type,
                                      const std::string &v_type) {
    require(blocks > 0 && kv_heads > 0 && head_dim > 0 && chunks_per_block > 0,
            "a cache has no size");
    require(kv_heads <= kMostKvHeads && head_dim <= kMostHeadDim && chunks_per_block <= kMostChunks,
            "a cache has too large heads or blocks");
    require(blocks <= kMostSlots / (static_cast<size_t>(chunks_per_block) * kChunk),
            "a cache has more slots than int32 can number");
    auto kv = std::make_shared<KVStore>();
    kv->chunks = blocks * static_cast<size_t>(chunks_per_block);
    kv->kv_heads = kv_heads, kv->head_dim = head_dim, kv->chunks_per_block = chunks_per_block;
    const auto new_memory = [&](const std::string &name, KvType &type, Memory &memory) {
        type = kv_type_by_name(name);
        require(type != KvType::Int4 || head_dim % kKvGroup == 0,
                "heads are not a whole number of groups of 4 bits");
        const size_t block_bytes = kv_block_bytes(*kv, type);
        require(blocks <= kMostBytes / block_bytes, "a cache is too large");
        memory = allocate(blocks * block_bytes);
    };
    new_memory(k_type, kv->k_type, kv->k);
    new_memory(v_type, kv->v_type, kv->v);
    return kv;
}

// Views of the memory of keys and of values, a row per block. They keep the cache alive.
std::vector<Blocks> block_bytes(std::shared_ptr<KVStore> kv) {
    const size_t blocks = kv->chunks / static_cast<size_t>(kv->chunks_per_block);
    const nb::object owner = nb::cast(kv);
    return {Blocks(kv->k.get(), {blocks, kv_block_bytes(*kv, kv->k_type)}, owner),
            Blocks(kv->v.get(), {blocks, kv_block_bytes(*kv, kv->v_type)}, owner)};
}

const Kernels *kernels_by_name(const std::string &isa) {
    for (const KernelSet &set : kernel_sets())
        if (isa == set.name) {
            require(cpu_has(set.needs), "this CPU cannot run these kernels");
            const Kernels *k = set.table();
            require(k->request == nullptr || k->request(),
                    "the operating system refuses the registers that these kernels need");
            return k;
        }
    throw std::invalid_argument("this build has no kernels of that name");
}

// An entry as Python writes it: op, inputs, output, weight, vectors, cache, barrier, attributes.
using PythonEntry =
    std::tuple<std::string, std::vector<int>, int, std::shared_ptr<Weight>,
               std::vector<std::shared_ptr<Vector>>, std::shared_ptr<KVStore>, bool, nb::dict>;

// The declaration of an op as Python sees it: its name, how it divides the rows, its attributes.
struct OpDeclaration {
    Op op;
    const char *name, *rows;
    std::vector<const char *> attributes;
};

const std::vector<OpDeclaration> &op_declarations() {
    constexpr const char *BY_ROWS = "by_rows", *WRITES_ROWS = "writes_rows", *ALL_ROWS = "all_rows";
#define ATTRIBUTE(type, name) constexpr const char *name = #name;
#include "ops.inc"
    static const std::vector<OpDeclaration> declarations = {
#define OP(Name, name, rows, ...) {Op::Name, #name, rows, {__VA_ARGS__}},
#include "ops.inc"
    };
    return declarations;
}

void set_attribute(Entry &entry, const std::string &name, nb::handle value) {
    bool known = false;
#define ATTRIBUTE(type, field) \
    if (name == #field) known = nb::try_cast<type>(value, entry.field);
#include "ops.inc"
    if (!known) throw std::invalid_argument("attribute " + name + " is not of its type");
}

Entry entry_from_python(const PythonEntry &from) {
    const auto &[name, in, out, weight, vectors, kv, barrier, attributes] = from;
    for (const OpDeclaration &declaration : op_declarations()) {
        if (name != declaration.name) continue;
        Entry entry{declaration.op, in, out, weight, vectors, kv, barrier};
        require(attributes.size() == declaration.attributes.size(),
                "an op has other attributes than it declares");
        for (const char *attribute : declaration.attributes) {
            require(attributes.contains(attribute), "an op lacks an attribute that it declares");
            set_attribute(entry, attribute, attributes[attribute]);
        }
        return entry;
    }
    throw std::invalid_argument("no op is called " + name);
}

// A program is complete when it is constructed: nothing is added while a thread runs it.
std::shared_ptr<Program> new_program(
    const std::string &isa, std::shared_ptr<ThreadPool> pool,
    const std::vector<std::tuple<size_t, size_t, bool, int>> &buffers, size_t bytes_per_token,
    int output, int hidden, const std::vector<PythonEntry> &entries) {
    std::vector<Buffer> planned;
    for (auto [offset, width, quantized, rows] : buffers) {
        require(rows >= 0 && rows <= static_cast<int>(RowsOf::Hidden), "no rows have this number");
        planned.push_back({offset, width, quantized, static_cast<RowsOf>(rows)});
    }
    auto program = std::make_shared<Program>(kernels_by_name(isa), std::move(pool),
                                             std::move(planned), bytes_per_token, output, hidden);
    for (const PythonEntry &entry : entries) program->add(entry_from_python(entry));
    return program;
}

void run(Program &program, Ints input_ids, Ints positions, Ints logits_indices, Ints hidden_indices,
         Ints cu_seqlens_q, Ints seq_lens, Tables block_tables, Table slot_mapping, Results2D out,
         std::optional<Results2D> hidden, std::optional<Floats> seconds) {
    const size_t tokens = input_ids.shape(0), requests = seq_lens.shape(0);
    require(tokens > 0 && positions.shape(0) == tokens && slot_mapping.shape(1) == tokens,
            "arrays of one batch differ in length");
    require(cu_seqlens_q.shape(0) == requests + 1 && block_tables.shape(1) == requests,
            "arrays of one batch differ in length");
    require(block_tables.shape(0) == slot_mapping.shape(0), "arrays of one batch differ in groups");
    const Batch batch{input_ids.data(),        positions.data(),        logits_indices.data(),
                      hidden_indices.data(),   cu_seqlens_q.data(),     seq_lens.data(),
                      block_tables.data(),     slot_mapping.data(),     tokens,
                      logits_indices.shape(0), hidden_indices.shape(0), requests,
                      block_tables.shape(2),   block_tables.shape(0)};
    const auto fits = [&](const Results2D &result, const Buffer &buffer) {
        return result.shape(0) == batch.count(buffer.rows) && result.shape(1) == buffer.width;
    };
    require(fits(out, program.output()), "the output has the wrong shape");
    require(hidden.has_value() == (program.hidden() != nullptr) &&
                (!hidden || fits(*hidden, *program.hidden())),
            "the hidden states have the wrong shape, or should not be given, or are missing");
    require(!seconds || seconds->shape(0) == program.size(),
            "there is not one time for each entry");
    std::vector<double> times(seconds ? program.size() : 0);
    {
        nb::gil_scoped_release release;
        program.run(batch, {out.data(), hidden ? hidden->data() : nullptr},
                    seconds ? times.data() : nullptr);
    }
    for (size_t i = 0; i < times.size(); i++) seconds->data()[i] += static_cast<float>(times[i]);
}

}  // namespace

void bind_native(nb::module_ &m) {
    nb::class_<ThreadPool>(m, "ThreadPool")
        .def(nb::init<size_t>())
        .def_prop_ro("size", &ThreadPool::size);
    nb::class_<WeightMemory>(m, "WeightMemory").def(nb::init<>());
    nb::class_<Weight>(m, "Weight")
        .def_ro("outputs", &Weight::outputs)
        .def_ro("inputs", &Weight::inputs)
        .def_ro("nbytes", &Weight::bytes)
        .def_ro("finite", &Weight::finite)
        .def_prop_ro("ggml_type", [](const Weight &w) { return static_cast<int>(w.format); })
        .def_prop_ro("quantized", [](const Weight &w) { return dense_bytes(w.format) == 0; })
        .def_prop_ro("order", [](const Weight &w) {  // as bytes, to be compared
            return nb::bytes(reinterpret_cast<const char *>(w.order.data()),
                             w.order.size() * sizeof(int32_t));
        });
    nb::class_<Vector>(m, "Vector")
        .def("__init__",
             [](Vector *self, std::vector<float> values) { new (self) Vector{std::move(values)}; })
        .def_prop_ro("size", [](const Vector &v) { return v.values.size(); });
    nb::class_<KVStore>(m, "KVStore").def("block_bytes", &block_bytes);
    nb::class_<Program>(m, "Program")
        .def("run", &run, nb::arg("input_ids"), nb::arg("positions"), nb::arg("logits_indices"),
             nb::arg("hidden_indices"), nb::arg("cu_seqlens_q"), nb::arg("seq_lens"),
             nb::arg("block_tables"), nb::arg("slot_mapping"), nb::arg("out").noconvert(),
             nb::arg("hidden").noconvert() = nb::none(),
             nb::arg("seconds").noconvert() = nb::none())
        .def_prop_ro("size", &Program::size);
    m.def("load_weight", &load_weight, nb::arg("pool"), nb::arg("memory"), nb::arg("ggml_type"),
          nb::arg("inputs"), nb::arg("rows"), nb::arg("order").none() = nb::none());
    m.def("load_stored_weights", &load_stored_weights);
    m.def("new_kv_store", &new_kv_store);
    m.def("new_program", &new_program);
    nb::class_<ReadBuffer>(m, "ReadBuffer")
        .def(
            "__init__",
            [](ReadBuffer *self, ThreadPool &pool, size_t bytes) {
                require(bytes > 0 && bytes <= kMostBytes, "a working set has no size, or too much");
                new (self) ReadBuffer(pool, bytes);
            },
            nb::arg("pool"), nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>())
        .def(
            "read",
            [](const ReadBuffer &self, const std::string &isa, ThreadPool &pool, size_t bytes,
               double seconds) {
                require(seconds > 0 && seconds <= 60,
                        "measuring takes more than 0 and at most 60 s");
                return self.read(*kernels_by_name(isa), pool, bytes, seconds);
            },
            nb::arg("isa"), nb::arg("pool"), nb::arg("bytes"), nb::arg("seconds"),
            nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "measure_barrier",
        [](ThreadPool &pool, size_t stages) {
            require(stages > 0 && stages <= 1000000, "barriers are 1 to 1,000,000");
            return measure_barrier(pool, stages);
        },
        nb::arg("pool"), nb::arg("stages"), nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "measure_int8_peak",
        [](const std::string &isa, ThreadPool &pool, double seconds) {
            require(seconds > 0 && seconds <= 60, "measuring takes more than 0 and at most 60 s");
            return measure_int8_peak(*kernels_by_name(isa), pool, seconds);
        },
        nb::arg("isa"), nb::arg("pool"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "measure_float_peak",
        [](const std::string &isa, ThreadPool &pool, double seconds) {
            require(seconds > 0 && seconds <= 60, "measuring takes more than 0 and at most 60 s");
            return measure_float_peak(*kernels_by_name(isa), pool, seconds);
        },
        nb::arg("isa"), nb::arg("pool"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>());
    m.def("limits", [] {
        nb::dict limits;
        limits["head_dim"] = kMostHeadDim;
        limits["num_kv_heads"] = kMostKvHeads;
        limits["row_width"] = kMostWidth;
        limits["tokens"] = kMostTokens;
        limits["block_size"] = kMostChunks * kChunk;
        limits["slots"] = kMostSlots;
        return limits;
    });
    m.def("kernels", [] {
        nb::dict kernels;
        for (const KernelSet &set : kernel_sets()) kernels[set.name] = set.needs;
        return kernels;
    });
    m.def("ops", [] {
        nb::dict ops;
        for (const OpDeclaration &op : op_declarations())
            ops[op.name] = nb::make_tuple(op.rows, nb::cast(op.attributes));
        return ops;
    });
    m.def("kv_types", [] {
        std::vector<std::string> names;
        for (const KvTypeName &type : kKvTypes) names.emplace_back(type.name);
        return names;
    });
    m.def("kv_head_bytes", [](const std::string &type, int head_dim) {
        require(head_dim > 0 && head_dim <= kMostHeadDim, "a head has no size, or too much");
        return kv_chunk_bytes(kv_type_by_name(type), head_dim) / kChunk;
    });
    m.def("linear_scratch_bytes", [](size_t inputs) {
        require(inputs <= kMostWidth, "a row is too wide");
        return scratch_bytes(inputs);
    });
    m.def("attention_partials_bytes", [](const std::string &isa, size_t threads, int heads,
                                         int head_dim, size_t tokens, size_t context) {
        require(threads <= ThreadPool::kMaxThreads && heads > 0 && head_dim > 0 &&
                    head_dim <= kMostHeadDim && tokens <= kMostTokens && context <= kMostTokens,
                "a step is too large");
        return sizeof(float) * kernels_by_name(isa)->attention_partials_most(
                                   heads, head_dim, tokens, context, threads);
    });
    m.def("attention_scratch_bytes", [](const std::string &isa, int kv_heads, int head_dim) {
        require(
            kv_heads > 0 && kv_heads <= kMostKvHeads && head_dim > 0 && head_dim <= kMostHeadDim,
            "a cache has too large heads");
        return kernels_by_name(isa)->attention_scratch(kv_heads, head_dim) * sizeof(float);
    });
}

}  // namespace pellucid
