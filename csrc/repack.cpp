// Repacks the blocks of a file into the tiles of tile.h. Bits move, but no value changes.
//
// Each row's 32 inputs are read as 32 plain codes and their scales (read_*), and 16 rows of them
// are written as planes (write_tile). The layouts of the blocks are drawn in src/pellucid/formats;
// the names of their fields are the same here.
#include <bit>
#include <cstring>

#include "tile.h"

namespace pellucid {
namespace {

struct RowTile {  // one row, 32 inputs
    uint8_t codes[kTileInputs];
    uint16_t d, m;  // float16: of the tile where Scale::F16, else of the super-block
    uint8_t scale[2], min[2];
    float group_scale;  // of the group where Scale::Group, with its zero point
    uint8_t zero;
};

void read_nibbles(const uint8_t *qs, uint8_t *codes) {  // low nibbles: inputs 0–15, high: 16–31
    for (int i = 0; i < 16; i++) {
        codes[i] = qs[i] & 15;
        codes[i + 16] = qs[i] >> 4;
    }
}

uint16_t read_u16(const uint8_t *p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

// 32-input blocks: d [m] [qh] qs
void read_legacy(const TileFormat &f, const uint8_t *block, RowTile &out) {
    out.d = read_u16(block);
    const uint8_t *p = block + 2;
    if (f.has_min) {
        out.m = read_u16(p);
        p += 2;
    }
    if (f.bits == 8) {
        for (int i = 0; i < 32; i++) out.codes[i] = p[i] ^ 0x80;  // signed -> offset 128
        return;
    }
    const uint8_t *qh = p;
    if (f.bits == 5) p += 4;
    read_nibbles(p, out.codes);
    if (f.bits == 5)
        for (int i = 0; i < 32; i++)
            out.codes[i] |= static_cast<uint8_t>((qh[i / 8] >> (i % 8) & 1) << 4);
}

// The 6-bit scales and minima of Q4_K and Q5_K: 8 of each in 12 bytes.
void read_scales_k4(const uint8_t *s, int j, uint8_t &scale, uint8_t &min) {
    if (j < 4) {
        scale = s[j] & 63;
        min = s[j + 4] & 63;
    } else {
        scale = static_cast<uint8_t>((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        min = static_cast<uint8_t>((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

// Tile j (of 8) of a super-block of 256 inputs.
void read_super(const TileFormat &f, const uint8_t *block, int j, RowTile &out) {
    const int half = j / 4,
              quarter = j % 4;  // codes of 2 bits interleave the four quarters of 128 inputs
    switch (f.format) {
        case Format::Q2_K: {  // scales[16] qs[64] d dmin
            out.d = read_u16(block + 80);
            out.m = read_u16(block + 82);
            for (int i = 0; i < 32; i++)
                out.codes[i] = block[16 + 32 * half + i] >> (2 * quarter) & 3;
            for (int g = 0; g < 2; g++) {
                out.scale[g] = block[2 * j + g] & 15;
                out.min[g] = block[2 * j + g] >> 4;
            }
            break;
        }
        case Format::Q3_K: {  // hmask[32] qs[64] scales[12] d
            out.d = read_u16(block + 108);
            for (int i = 0; i < 32; i++)
                out.codes[i] = static_cast<uint8_t>(
                    (block[32 + 32 * half + i] >> (2 * quarter) & 3) | (block[i] >> j & 1) << 2);
            const uint8_t *s = block + 96;
            for (int g = 0; g < 2; g++) {
                int k = 2 * j + g;
                int low = k < 8 ? s[k] & 15 : s[k - 8] >> 4,
                    high = s[8 + k % 4] >> (2 * (k / 4)) & 3;
                out.scale[g] = static_cast<uint8_t>((low | high << 4) - 32);
            }
            break;
        }
        case Format::Q4_K:    // d dmin scales[12] qs[128]
        case Format::Q5_K: {  // d dmin scales[12] qh[32] qs[128]
            out.d = read_u16(block);
            out.m = read_u16(block + 2);
            read_scales_k4(block + 4, j, out.scale[0], out.min[0]);
            const uint8_t *qs = block + (f.bits == 5 ? 48 : 16) + 32 * (j / 2);
            for (int i = 0; i < 32; i++) {
                out.codes[i] = qs[i] >> (4 * (j % 2)) & 15;
                if (f.bits == 5)
                    out.codes[i] |= static_cast<uint8_t>((block[16 + i] >> j & 1) << 4);
            }
            break;
        }
        case Format::Q6_K: {  // ql[128] qh[64] scales[16] d
            out.d = read_u16(block + 208);
            for (int i = 0; i < 32; i++) {
                uint8_t low = block[64 * half + 32 * (quarter % 2) + i] >> (4 * (quarter / 2)) & 15;
                uint8_t high = block[128 + 32 * half + i] >> (2 * quarter) & 3;
                out.codes[i] = static_cast<uint8_t>(low | high << 4);
            }
            out.scale[0] = block[192 + 2 * j];
            out.scale[1] = block[192 + 2 * j + 1];
            break;
        }
        default: {  // IQ4_XS: d scales_h(u16) scales_l[4] qs[128]
            out.d = read_u16(block);
            int low = block[4 + j / 2] >> (4 * (j % 2)) & 15,
                high = read_u16(block + 2) >> (2 * j) & 3;
            out.scale[0] = static_cast<uint8_t>((low | high << 4) - 32);
            read_nibbles(block + 8 + 16 * j, out.codes);
        }
    }
}

// 32 codes of a stream of bits. The number of bits is known when this is compiled, because the
// shifts become vector instructions then: a weight is repacked five times as fast.
template <int kBits>
void read_stream(const uint8_t *p, uint8_t *codes) {
    if constexpr (kBits == 8) {
        std::memcpy(codes, p, kTileInputs);
    } else if constexpr (kBits == 4) {
        for (int i = 0; i < kTileInputs / 2; i++) {
            codes[2 * i] = p[i] & 15;
            codes[2 * i + 1] = p[i] >> 4;
        }
    } else {
        constexpr uint64_t mask = (1u << kBits) - 1;
        for (int i = 0; i < kTileInputs; i += 8, p += kBits) {
            uint64_t eight = 0;  // codes
            std::memcpy(&eight, p, kBits);
            for (int k = 0; k < 8; k++)
                codes[i + k] = static_cast<uint8_t>(eight >> (kBits * k) & mask);
        }
    }
}

// Tile j of a group: scale [zero] codes, which are one stream of bits. `row` is the beginning of
// the row, where Int8_Row has its scale.
void read_group(const TileFormat &f, const uint8_t *row, const uint8_t *block, int j,
                RowTile &out) {
    const bool of_row = f.format == Format::Int8_Row;
    std::memcpy(&out.group_scale, of_row ? row : block, sizeof(float));
    const uint8_t *p = of_row ? block : block + sizeof(float);
    if (f.has_min) out.zero = *p++;
    p += kTileInputs * f.bits / 8 * j;
    if (f.bits == 8)
        read_stream<8>(p, out.codes);
    else if (f.bits == 4)
        read_stream<4>(p, out.codes);
    else if (f.bits == 3)
        read_stream<3>(p, out.codes);
    else
        read_stream<2>(p, out.codes);
    if (of_row)
        for (uint8_t &code : out.codes) code ^= 0x80;  // signed -> offset 128
}

// The planes of tile.h. Four codes move as one 32-bit word: word t of row r becomes lane r of
// vector t. Planes are extracted from these vectors by shifts and masks, which compilers turn into
// vector instructions.
void write_codes(int bits, const RowTile *rows, uint8_t *out) {
    constexpr int kQuads = kTileInputs / 4;
    using Vector = uint32_t[kTileRows];
    Vector quads[kQuads], plane;
    for (int r = 0; r < kTileRows; r++)
        for (int t = 0; t < kQuads; t++) std::memcpy(&quads[t][r], rows[r].codes + 4 * t, 4);
    const auto write = [&](const Vector &v) {
        std::memcpy(out, v, sizeof v);
        out += sizeof v;
    };
    // Vectors of fields of `width` bits, taken from bit `shift` of each code: vector v holds the
    // quads first(v), first(v) + step, …
    const auto write_plane = [&](int width, int shift, int vectors, int next_vector, int step) {
        const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
        for (int v = 0; v < vectors; v++) {
            for (uint32_t &x : plane) x = 0;
            for (int j = 0; j < 8 / width; j++) {
                const Vector &q = quads[v * next_vector + j * step];
                for (int r = 0; r < kTileRows; r++)
                    plane[r] |= (q[r] >> shift & mask) << (width * j);
            }
            write(plane);
        }
    };
    if (bits == 8) {
        for (const Vector &q : quads) write(q);
        return;
    }
    if (bits >= 4) write_plane(4, 0, 4, 1, 4);
    if (bits % 4 >= 2) write_plane(2, bits / 4 * 4, 2, 4, 1);
    if (bits % 2) write_plane(1, bits - 1, 1, 0, 1);
}

void write_u16(uint8_t *p, uint16_t x) { std::memcpy(p, &x, 2); }

// Bit 15 of the result is set if a float16 is NaN or infinite: then all exponent bits are set, and
// adding one carries into bit 15.
uint32_t broken_bit(uint16_t x) { return (x & 0x7c00u) + 0x0400u; }

// The same of a float32.
uint32_t broken_bit(float x) {
    return ((std::bit_cast<uint32_t>(x) & 0x7f800000u) + 0x00800000u) >> 16;
}

// Whether some element is NaN or infinite. `exponent` is the mask of the exponent's bits.
template <class T>
bool has_broken(const uint8_t *p, size_t count, T exponent) {
    unsigned broken = 0;
    for (size_t i = 0; i < count; i++) {
        T x;
        std::memcpy(&x, p + i * sizeof(T), sizeof(T));
        broken |= (x & exponent) == exponent;
    }
    return broken != 0;
}

bool has_broken(Format format, const uint8_t *row, size_t count) {
    if (format == Format::F32) return has_broken<uint32_t>(row, count, 0x7f800000);
    return has_broken<uint16_t>(row, count, format == Format::F16 ? 0x7c00 : 0x7f80);
}

// Element r of each group of 16 is one of row r.
template <class T>
void interleave(const uint8_t *row, size_t inputs, size_t r, uint8_t *out) {
    for (size_t k = 0; k < inputs; k++)
        std::memcpy(out + (k * kTileRows + r) * sizeof(T), row + k * sizeof(T), sizeof(T));
}

}  // namespace

bool repack(Format format, const uint8_t *file, size_t rows, size_t inputs, uint8_t *tiles,
            size_t first, size_t last) {
    const TileFormat f = tile_format(format);
    const size_t row_bytes = f.file_row_bytes(inputs);
    const size_t tiles_per_block = static_cast<size_t>(f.file_inputs / kTileInputs);
    const size_t tiles_per_header = f.tiles_per_header(f.format);
    uint32_t broken = 0;
    for (size_t t = first; t < last; t++) {
        uint8_t *out = tiles + t * f.row_tile_bytes(inputs);
        for (size_t b = 0; b < inputs / kTileInputs; b++) {
            RowTile row[kTileRows] = {};
            for (size_t r = 0; r < kTileRows && t * kTileRows + r < rows; r++) {
                const uint8_t *source = file + (t * kTileRows + r) * row_bytes;
                const uint8_t *block = source +
                                       (row_bytes - f.file_bytes * (inputs / f.file_inputs)) +
                                       b / tiles_per_block * f.file_bytes;
                const int j = static_cast<int>(b % tiles_per_block);
                if (f.scale == Scale::Group)
                    read_group(f, source, block, j, row[r]);
                else if (f.file_inputs == kTileInputs)
                    read_legacy(f, block, row[r]);
                else
                    read_super(f, block, j, row[r]);
                broken |= broken_bit(row[r].d) | broken_bit(row[r].m);
                broken |= broken_bit(row[r].group_scale);
            }
            if (f.header_bytes() && b % tiles_per_header == 0) {
                for (int r = 0; r < kTileRows; r++) {
                    if (f.scale == Scale::Group) {
                        std::memcpy(out + 4 * r, &row[r].group_scale, sizeof(float));
                        if (f.has_min) out[4 * kTileRows + r] = row[r].zero;
                        continue;
                    }
                    write_u16(out + 2 * r, row[r].d);
                    if (f.has_min) write_u16(out + 2 * (kTileRows + r), row[r].m);
                }
                out += f.header_bytes();
            }
            write_codes(f.bits, row, out);
            uint8_t *scales = out + f.code_bytes(), *mins = scales + f.scale_bytes();
            for (int r = 0; r < kTileRows; r++) {
                if (f.scale == Scale::Group) break;  // the header has them
                if (f.scale == Scale::F16) {
                    write_u16(scales + 2 * r, row[r].d);
                    if (f.has_min) write_u16(mins + 2 * r, row[r].m);
                    continue;
                }
                for (int g = 0; g < f.groups; g++) {
                    scales[g * kTileRows + r] = row[r].scale[g];
                    if (f.has_min) mins[g * kTileRows + r] = row[r].min[g];
                }
            }
            out += f.tile_bytes();
        }
    }
    return (broken & 0x8000u) == 0;
}

bool repack_dense(Format format, const uint8_t *file, size_t rows, size_t inputs, uint8_t *tiles,
                  size_t first, size_t last) {
    const size_t size = static_cast<size_t>(dense_bytes(format));
    bool finite = true;
    for (size_t t = first; t < last; t++) {
        uint8_t *out = tiles + t * inputs * kTileRows * size;
        std::memset(out, 0, inputs * kTileRows * size);
        for (size_t r = 0; r < kTileRows && t * kTileRows + r < rows; r++) {
            const uint8_t *row = file + (t * kTileRows + r) * inputs * size;
            if (has_broken(format, row, inputs)) finite = false;
            if (size == 4)
                interleave<uint32_t>(row, inputs, r, out);
            else
                interleave<uint16_t>(row, inputs, r, out);
        }
    }
    return finite;
}

}  // namespace pellucid
