// Compares every table of kernels that this CPU can run with a plainer computation of each kernel.
//
// - linear: against decode_row in double; with scales that are powers of two, against the portable
//   kernels bit for bit.
// - the rest: against the portable kernels, within a few roundings, and bit for bit where nothing
// is
//   rounded differently.
// - all of them: a token alone against the same token among others, and any division of the work,
//   bit for bit.
//
// Arrays have the exact size, and memory that a kernel must not use is NaN. So a sanitizer, or a
// NaN in a result, shows a read too far. Random numbers are drawn from a fixed seed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "../float16.h"
#include "../kernels.h"
#include "support.h"

using namespace pellucid;

namespace {

using Floats = std::vector<float>;

Floats random_floats(size_t count, float size = 3.0f) {
    Floats out(count);
    for (float &x : out) x = random_float(size);
    return out;
}

bool same(const float *a, const float *b, size_t count) {
    return std::memcmp(a, b, count * sizeof(float)) == 0;
}
bool same(const Floats &a, const Floats &b) {
    return a.size() == b.size() && same(a.data(), b.data(), a.size());
}

// |a - b| is within 1e-5 of b, or within `floor` of the largest b, because sums that cancel have
// such errors. 2e-7 is about three roundings.
bool near(const Floats &a, const Floats &b, double floor = 2e-7) {
    double largest = 0.0;
    for (float x : b) largest = std::max(largest, std::fabs(static_cast<double>(x)));
    for (size_t i = 0; i < b.size(); i++) {
        const double y = static_cast<double>(b[i]);
        if (!(std::fabs(static_cast<double>(a[i]) - y) <= 1e-5 * std::fabs(y) + floor * largest))
            return false;  // NaN is not near
    }
    return true;
}

// ---- linear

struct Matrix {
    Format format;
    size_t outputs, inputs;
    std::vector<uint8_t> tiles;
};

void put_f16(uint8_t *p, float x) {
    const uint16_t bits = f16_from_float(x);
    std::memcpy(p, &bits, sizeof(bits));
}

// Random codes; scales that are random, or powers of two, few and near each other: with
// them every sum below fits the 24 bits of a float32, and is exact.
Matrix random_matrix(Format format, size_t outputs, size_t inputs, bool exact) {
    const TileFormat f = tile_format(format);
    const size_t row_tiles = (outputs + kTileRows - 1) / kTileRows;
    auto scale = [&] { return exact ? std::ldexp(1.0f, random_int(-1, 0)) : random_float(0.05f); };
    Matrix m{format, outputs, inputs, {}};
    if (f.bits == 0) {
        const size_t size = format == Format::F32 ? 4 : 2;
        m.tiles.resize(row_tiles * inputs * kTileRows * size);
        for (uint8_t *p = m.tiles.data(); p < m.tiles.data() + m.tiles.size(); p += size) {
            const float x = random_float(1.0f);
            const uint32_t bits = std::bit_cast<uint32_t>(x);
            if (format == Format::F16)
                put_f16(p, x);
            else  // the upper half of a float32 is a bfloat16
                std::memcpy(p, reinterpret_cast<const uint8_t *>(&bits) + (4 - size), size);
        }
        return m;
    }
    m.tiles.resize(row_tiles * f.row_tile_bytes(inputs));
    uint8_t *p = m.tiles.data();
    for (size_t tile = 0; tile < row_tiles * (inputs / kTileInputs); tile++) {
        const bool has_header =
            f.header_bytes() && tile % (inputs / kTileInputs) % f.tiles_per_header(format) == 0;
        if (has_header && f.scale == Scale::Group) {
            for (int r = 0; r < kTileRows; r++, p += sizeof(float)) {
                const float x = scale();
                std::memcpy(p, &x, sizeof x);
            }
            for (int r = 0; r < kTileRows && f.has_min; r++)
                *p++ = static_cast<uint8_t>(exact ? f.offset + random_int(-2, 1) : random_bits());
        } else if (has_header)
            for (int i = 0; i < f.header_bytes(); i += 2, p += 2) put_f16(p, scale());
        for (int i = 0; i < f.code_bytes(); i++) *p++ = static_cast<uint8_t>(random_bits());
        for (int i = 0; i < f.scale_bytes() * (f.has_min ? 2 : 1);
             i += f.scale == Scale::F16 ? 2 : 1) {
            if (f.scale == Scale::F16) {
                put_f16(p, scale());
                p += 2;
            } else {
                *p++ = exact ? static_cast<uint8_t>(1 << random_int(0, 1))
                             : static_cast<uint8_t>(random_bits());
            }
        }
    }
    return m;
}

struct Activations {
    size_t tokens, inputs, per_scale;  // inputs that share a scale
    Floats x, scales;
    std::vector<int32_t> sums32, sums16;
    std::vector<int8_t> q;
    Quantized view(size_t token) {
        const size_t block = token * inputs / per_scale;
        return {q.data() + token * inputs, scales.data() + block, sums32.data() + block,
                sums16.data() + 2 * block};
    }
};

Activations random_activations(size_t tokens, size_t inputs, bool exact,
                               size_t per_scale = kTileInputs) {
    const size_t blocks = tokens * (inputs / per_scale);
    Activations a{tokens,
                  inputs,
                  per_scale,
                  random_floats(tokens * inputs),
                  Floats(blocks),
                  std::vector<int32_t>(blocks),
                  std::vector<int32_t>(2 * blocks),
                  {}};
    for (size_t i = 0; i < tokens * inputs; i++)
        a.q.push_back(static_cast<int8_t>(random_int(-127, 127)));
    for (size_t b = 0; b < blocks; b++) {
        a.scales[b] = exact ? std::ldexp(1.0f, random_int(-1, 0)) : random_float(0.02f);
        for (size_t i = 0; i < per_scale; i++) {
            a.sums32[b] += a.q[b * per_scale + i];
            a.sums16[2 * b + i / 16 % 2] += a.q[b * per_scale + i];  // not used by rows
        }
    }
    return a;
}

// Tokens `first` …, computed together; each call computes `share` row tiles.
Floats linear(const Kernels &k, const Matrix &m, Activations &a, size_t first, size_t tokens,
              const float *bias, size_t share = 2) {
    Floats y(tokens * m.outputs, NAN);
    std::vector<uint8_t> scratch(scratch_bytes(m.inputs));
    const LinearArgs args{m.format,       m.tiles.data(), m.outputs,
                          m.inputs,       bias,           a.x.data() + first * a.inputs,
                          a.view(first),  tokens,         y.data(),
                          scratch.data(), nullptr};
    const size_t row_tiles = (m.outputs + kTileRows - 1) / kTileRows;
    for (size_t t = 0; t < row_tiles; t += share) k.linear(args, t, std::min(t + share, row_tiles));
    return y;
}

// Σ weight · x in double, and next to it Σ |weight · x|, which bounds what rounding can do.
bool close_to_decoded(const Matrix &m, const Activations &a, const Floats &bias, const Floats &y) {
    const bool dense = tile_format(m.format).bits == 0;
    Floats weight(m.inputs);
    for (size_t n = 0; n < m.outputs; n++) {
        decode_row(m.format, m.tiles.data(), n, m.inputs, 1.0f, weight.data());
        for (size_t t = 0; t < a.tokens; t++) {
            double sum = static_cast<double>(bias[n]), size = std::fabs(sum);
            for (size_t k = 0; k < m.inputs; k++) {
                const size_t i = t * m.inputs + k;
                const double x = dense ? static_cast<double>(a.x[i])
                                       : static_cast<double>(a.scales[i / a.per_scale]) * a.q[i];
                sum += static_cast<double>(weight[k]) * x;
                size += std::fabs(static_cast<double>(weight[k]) * x);
            }
            if (!(std::fabs(static_cast<double>(y[t * m.outputs + n]) - sum) <= 2e-6 * size))
                return false;
        }
    }
    return true;
}

void compare_linear(const Kernels &k) {
    std::vector<Format> formats{Format::F32, Format::F16, Format::BF16};
    for (const TileFormat &f : kTileFormats) formats.push_back(f.format);
    for (Format format : formats) {
        const std::string name = "linear, ggml type " + std::to_string(static_cast<int>(format));
        const bool dense = tile_format(format).bits == 0;
        const size_t outputs = 139, most = 71;
        // of quantized ones so many that AVX2 decodes a row tile in parts
        const size_t inputs = dense ? 75 : tile_format(format).file_inputs == 32 ? 1056 : 1280;
        const Floats bias = random_floats(outputs);
        for (bool exact : {false, true}) {
            const Matrix m = random_matrix(format, outputs, inputs, exact);
            const size_t per_scale = format == Format::Int8_Row ? inputs : kTileInputs;
            Activations a = random_activations(most, inputs, exact, per_scale);
            const Floats all = linear(k, m, a, 0, most, bias.data());
            check(close_to_decoded(m, a, bias, all), name + ": far from what decode_row gives");
            if (exact && !dense)
                check(same(linear(k, m, a, 0, most, nullptr),
                           linear(*kernels_portable(), m, a, 0, most, nullptr)),
                      name + ": other bits than the portable kernels, where nothing is rounded");
            for (size_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 33, 64, 65})
                for (size_t share : {2, 9}) {  // of a large one, activations may be packed
                    const Floats some = linear(k, m, a, most - tokens, tokens, bias.data(), share);
                    check(same(some.data(), &all[(most - tokens) * outputs], some.size()),
                          name + ": other bits with " + std::to_string(tokens) + " tokens");
                }
        }
    }
}

void compare_quantize(const Kernels &k) {
    const size_t tokens = 5, inputs = 96;
    Floats x = random_floats(tokens * inputs);
    std::fill_n(x.begin(), 32, 0.0f);
    for (size_t i = 32; i < 64; i++) x[i] *= 1e-6f;
    Activations one = random_activations(tokens, inputs, false),
                two = random_activations(tokens, inputs, false);
    k.quantize(x.data(), nullptr, inputs, one.view(0), 0, 2);
    k.quantize(x.data(), nullptr, inputs, one.view(0), 2, tokens);
    kernels_portable()->quantize(x.data(), nullptr, inputs, two.view(0), 0, tokens);
    check(one.q == two.q && same(one.scales, two.scales) && one.sums32 == two.sums32 &&
              one.sums16 == two.sums16,
          "quantize");

    std::vector<int32_t> order(inputs);  // in another order: as if x lay in it
    for (size_t i = 0; i < inputs; i++) order[i] = static_cast<int32_t>((i * 35) % inputs);
    Floats sorted(x.size());
    for (size_t i = 0; i < x.size(); i++)
        sorted[i] = x[i / inputs * inputs + static_cast<size_t>(order[i % inputs])];
    k.quantize(x.data(), order.data(), inputs, one.view(0), 0, tokens);
    k.quantize(sorted.data(), nullptr, inputs, two.view(0), 0, tokens);
    check(one.q == two.q && same(one.scales, two.scales) && one.sums32 == two.sums32,
          "quantize in another order");

    Activations three = random_activations(tokens, inputs, false, inputs), four = three;
    x[2 * inputs + 5] = std::numeric_limits<float>::quiet_NaN();
    k.quantize_rows(x.data(), inputs, three.view(0), 0, 2);
    k.quantize_rows(x.data(), inputs, three.view(0), 2, tokens);
    kernels_portable()->quantize_rows(x.data(), inputs, four.view(0), 0, tokens);
    check(std::isnan(three.scales[2]) && three.q == four.q && three.sums32 == four.sums32 &&
              same(three.scales, four.scales),
          "quantize_rows");
}

// ---- ops on single tokens

// Run `f(kernels, out)` with both tables.
bool agree(const Kernels &k, size_t count, const std::function<void(const Kernels &, float *)> &f,
           bool exactly) {
    Floats one(count, NAN), two(count, NAN);
    f(k, one.data());
    f(*kernels_portable(), two.data());
    return exactly ? same(one, two) : near(one, two);
}

void compare_elementwise(const Kernels &k) {
    for (size_t width : {1, 7, 8, 15, 16, 37, 100}) {
        const std::string of = " of width " + std::to_string(width);
        const size_t tokens = 3, count = tokens * width;
        const Floats x = random_floats(count, 20.0f), y = random_floats(count),
                     weight = random_floats(width), bias = random_floats(width);
        auto in_two = [&](auto f) {  // as two threads would
            f(0, 1);
            f(1, tokens);
        };
        check(agree(
                  k, count,
                  [&](const Kernels &t, float *out) {
                      in_two([&](size_t a, size_t b) {
                          t.rms_norm(x.data(), weight.data(), 1e-5f, width, out, a, b);
                      });
                  },
                  false),
              "rms_norm" + of);
        check(agree(
                  k, count,
                  [&](const Kernels &t, float *out) {
                      in_two([&](size_t a, size_t b) {
                          t.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, width, out, a,
                                       b);
                      });
                  },
                  false),
              "layer_norm" + of);
        auto both = [&](const char *name, bool exactly, auto f) {
            check(agree(k, count, f, exactly), name + of);
        };
        both("add", true,
             [&](const Kernels &t, float *out) { t.add(x.data(), y.data(), out, count); });
        both("silu_mul", false,
             [&](const Kernels &t, float *out) { t.silu_mul(x.data(), y.data(), out, count); });
        both("gelu_mul", false,
             [&](const Kernels &t, float *out) { t.gelu_mul(x.data(), y.data(), out, count); });
        both("gelu", false,
             [&](const Kernels &t, float *out) { t.gelu(x.data(), nullptr, out, count); });
        both("softcap", false,
             [&](const Kernels &t, float *out) { t.softcap(x.data(), 5.0f, out, count); });
    }
    for (int rotary : {6, 32, 40}) {
        const int heads = 3, dim = 40;
        const size_t tokens = 4, count = tokens * heads * dim;
        const Floats x = random_floats(count),
                     angles = random_floats(tokens * static_cast<size_t>(rotary));
        check(agree(
                  k, count,
                  [&](const Kernels &t, float *out) {
                      t.rope(x.data(), angles.data(), heads, dim, rotary, out, 0, tokens);
                  },
                  true),
              "rope of " + std::to_string(rotary) + " dimensions");
    }
}

// ---- NaN and infinity

// A NaN or an infinity in any lane shows in its own results.
void check_broken(const Kernels &k) {
    for (const float value : {NAN, -NAN, INFINITY, -INFINITY})
        for (size_t at = 0; at < 64; at++) {
            Floats x = random_floats(64);
            x[at] = value;
            const std::string where = " of " + std::to_string(value) + " at " + std::to_string(at);
            // quantized: no codes, and a scale that makes every product NaN
            Activations a = random_activations(1, 64, false);
            k.quantize(x.data(), nullptr, 64, a.view(0), 0, 1);
            const size_t block = at / 32;
            check(std::isnan(a.scales[block]) && std::isfinite(a.scales[1 - block]) &&
                      a.sums32[block] == 0,
                  "quantize" + where);
            // in the cache: the scale of the vector, or of its group
            for (const KvType type : {KvType::Int8, KvType::Int4})
                for (const bool keys : {true, false}) {
                    std::vector<uint8_t> chunk(kv_chunk_bytes(type, 64));
                    const int32_t slot = 3;
                    k.kv_write({x.data(), &slot, 1, 64, type, keys, chunk.data()}, 0, 1);
                    const size_t group = type == KvType::Int8 ? 0 : at / kKvGroup;
                    uint16_t scale;
                    std::memcpy(&scale, &chunk[kv_code_bytes(type, 64) + 2 * (group * kChunk + 3)],
                                2);
                    check(std::isnan(float_from_f16(scale)), "kv_write" + where);
                }
            if (std::isinf(value)) continue;
            Floats out(64);
            const auto shows = [&](const char *name) {
                bool good = true;
                for (size_t i = 0; i < 64; i++) good = good && std::isnan(out[i]) == (i == at);
                check(good, name + where);
            };
            const Floats y = random_floats(64);
            k.softcap(x.data(), 5.0f, out.data(), 64), shows("softcap");
            k.silu_mul(x.data(), y.data(), out.data(), 64), shows("silu_mul");
            k.silu_mul(y.data(), x.data(), out.data(), 64), shows("silu_mul");
            k.gelu_mul(x.data(), y.data(), out.data(), 64), shows("gelu_mul");
            k.gelu(x.data(), nullptr, out.data(), 64), shows("gelu");
        }
}

// ---- attention

struct Attention {
    int heads, kv_heads, dim, chunks_per_block, window;
    float softcap;
    KvType k_type = KvType::F16, v_type = KvType::F16;
};

// Requests with a context before them and a few new tokens each, in a cache whose other places hold
// NaN.
void compare_attention(const Kernels &k, const Attention &c) {
    char name[120];
    std::snprintf(name, sizeof(name),
                  "attention, heads %d/%d, head_dim %d, window %d, softcap %g, types %d %d",
                  c.heads, c.kv_heads, c.dim, c.window, static_cast<double>(c.softcap),
                  static_cast<int>(c.k_type), static_cast<int>(c.v_type));
    const std::vector<int32_t> lengths{1, 16, 530, 37, 700}, queries{1, 16, 3, 9, 1};
    const size_t requests = lengths.size(),
                 block_size = static_cast<size_t>(c.chunks_per_block) * kChunk;
    const size_t width = (700 + block_size - 1) / block_size, blocks = requests * width;
    std::vector<int32_t> table(blocks), starts{0};
    for (size_t i = 0; i < blocks; i++) table[i] = static_cast<int32_t>(i);
    for (size_t i = blocks - 1; i > 0; i--)
        std::swap(table[i], table[static_cast<size_t>(random_int(0, static_cast<int>(i)))]);
    for (int32_t n : queries) starts.push_back(starts.back() + n);

    // Write the keys and values of each request, by both kernels: they must be the same bits.
    const size_t row = static_cast<size_t>(c.kv_heads * c.dim);
    const size_t heads =
        blocks * static_cast<size_t>(c.chunks_per_block) * static_cast<size_t>(c.kv_heads);
    std::vector<uint8_t> kc(heads * kv_chunk_bytes(c.k_type, c.dim), 0xff),
        vc(heads * kv_chunk_bytes(c.v_type, c.dim), 0xff);
    std::vector<uint8_t> kp = kc, vp = vc;
    for (size_t r = 0; r < requests; r++) {
        const size_t n = static_cast<size_t>(lengths[r]);
        const Floats keys = random_floats(n * row), values = random_floats(n * row);
        std::vector<int32_t> slots;
        for (size_t i = 0; i < n; i++)
            slots.push_back(table[r * width + i / block_size] * static_cast<int32_t>(block_size) +
                            static_cast<int32_t>(i % block_size));
        for (const bool own : {true, false}) {
            const Kernels &writer = own ? k : *kernels_portable();
            writer.kv_write({keys.data(), slots.data(), c.kv_heads, c.dim, c.k_type, true,
                             own ? kc.data() : kp.data()},
                            0, n);
            writer.kv_write({values.data(), slots.data(), c.kv_heads, c.dim, c.v_type, false,
                             own ? vc.data() : vp.data()},
                            0, n);
        }
    }
    check(kc == kp && vc == vp, std::string(name) + ": kv_write");

    const size_t tokens = static_cast<size_t>(starts.back()),
                 per_token = static_cast<size_t>(c.heads * c.dim), count = tokens * per_token;
    const Floats q = random_floats(count);
    AttentionArgs args{};
    args.q = q.data(), args.k = kc.data(), args.v = vc.data(), args.k_type = c.k_type,
    args.v_type = c.v_type;
    args.cu_seqlens_q = starts.data(), args.seq_lens = lengths.data(),
    args.block_tables = table.data();
    args.requests = requests, args.table_width = width;
    args.heads = c.heads, args.kv_heads = c.kv_heads, args.head_dim = c.dim,
    args.chunks_per_block = c.chunks_per_block;
    args.scale = 1.0f / std::sqrt(static_cast<float>(c.dim)), args.softcap = c.softcap,
    args.window = c.window;

    auto attend = [&](const Kernels &t, AttentionArgs a, size_t n, size_t threads) {
        Floats out(n * per_token, NAN), scratch(t.attention_scratch(c.kv_heads, c.dim));
        a.out = out.data();
        for (size_t thread = 0; thread < threads; thread++)
            t.attention(a, scratch.data(), thread, threads);
        return out;
    };
    const Floats all = attend(k, args, tokens, 1);
    // Scores of up to some 15 are sums of dim products, each rounded: their error, a few 1e-6, is
    // that of the weights.
    check(near(all, attend(*kernels_portable(), args, tokens, 1), 4e-6),
          std::string(name) + ": far from the portable kernels");
    check(same(all, attend(k, args, tokens, 3)),
          std::string(name) + ": other bits when three threads share the work");

    // In two steps, with a barrier between them.
    Floats merged(count, NAN), scratch(k.attention_scratch(c.kv_heads, c.dim)),
        partials(k.attention_partials_size(args, tokens, 64));
    const size_t splits =
        partials.size() / (tokens * static_cast<size_t>(c.heads) * static_cast<size_t>(c.dim + 2));
    check(splits > 1, std::string(name) + ": a long context is not divided");
    AttentionArgs parts = args;
    parts.out = merged.data(), parts.partials = partials.data();
    for (size_t thread = 0; thread < 3; thread++)
        k.attention_partials(parts, scratch.data(), splits, thread, 3);
    for (size_t thread = 0; thread < 3; thread++)
        k.attention_merge(parts, scratch.data(), splits, thread, 3);
    check(same(all, merged), std::string(name) + ": other bits when divided by splits");

    // The last token of each request, alone.
    for (size_t r = 0; r < requests; r++) {
        const int32_t alone[] = {0, 1};
        const size_t token = static_cast<size_t>(starts[r + 1]) - 1;
        AttentionArgs one = args;
        one.requests = 1, one.cu_seqlens_q = alone, one.q = q.data() + token * per_token;
        one.seq_lens = lengths.data() + r, one.block_tables = table.data() + r * width;
        check(same(attend(k, one, 1, 1).data(), all.data() + token * per_token, per_token),
              std::string(name) + ": other bits for a token alone, request " + std::to_string(r));
    }
}

}  // namespace

int main() {
#if defined(__x86_64__)
    if (cpu_has(kernel_sets().front().needs))  // AVX-512
        compare_linear(*kernels_amx_model());  // for fewer than 16 tokens it is AVX-512: so the
                                               // bits are the same
#endif
    return for_usable_kernels([](const Kernels *k) {
        compare_quantize(*k);
        compare_linear(*k);
        compare_elementwise(*k);
        check_broken(*k);
        compare_attention(*k, {4, 2, 64, 1, 0, 0.0f});
        compare_attention(*k, {3, 3, 32, 2, 0, 20.0f});
        compare_attention(*k, {7, 1, 20, 2, 100, 0.0f});  // head_dim that no vector divides
        compare_attention(*k, {4, 1, 64, 1, 0, 0.0f, KvType::F32, KvType::F32});
        compare_attention(*k, {14, 2, 64, 1, 0, 0.0f, KvType::Int8, KvType::Int8});
        compare_attention(*k, {7, 1, 20, 2, 100, 0.0f, KvType::Int8, KvType::Int8});
        compare_attention(*k, {9, 3, 64, 1, 0, 0.0f, KvType::Int4, KvType::Int4});
        compare_attention(*k, {2, 2, 96, 2, 300, 20.0f, KvType::Int8, KvType::Int4});
    });
}
