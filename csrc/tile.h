// The layout of quantized weights in memory: tiles of 16 output rows by 32 inputs, for dot product
// instructions of 4 bytes (VNNI, sdot).
//
// Every format consists of codes and their scales. A tile's codes are 8 quads; quad q is 64
// bytes, in which byte 4·r + i is the code of row r and input 4·q + i. So one load feeds 16 rows,
// and the matching 4 bytes of the activation are the same for all of them. Codes of fewer than 8
// bits are split into planes that keep this order:
//
//     4 bits   4 vectors: low nibble quad t, high nibble quad t + 4
//     2 bits   2 vectors: bits 2·j … 2·j+1 of vector v hold quad 4·v + j
//     1 bit    1 vector:  bit t holds quad t
//
// 5 bits are 4 + 1, 6 are 4 + 2, 3 are 2 + 1: the same number of bits as in the file, so that
// decode reads no more bytes.
//
//     one tile = codes | scales of the 16 rows | minima of the 16 rows        (per 32 inputs, or
//     two of each, per 16 inputs)
//
// Formats whose scales are themselves quantized (k-quants: a super-block of 256 inputs) have a
// header before every 8 tiles: float16 d[16], and d_min[16] where there are minima. Group-wise
// integers (src/pellucid/formats/groups.py) have a header before the tiles of each group: float32
// scale[16], and uint8 zero[16] where there are zero points; their tiles are codes alone. A row
// tile is its K / 32 tiles one after another. A matrix is its row tiles one after another, the last
// one padded with zeros. value = scale · (code - offset) [- min]
#pragma once

#include <cstddef>
#include <cstdint>

namespace pellucid {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 32;

// The number is ggml's, so that files, Python and C++ agree on it. From 1000 they are our own:
// group-wise integers, whose last digit is log2 of the tiles of a group.
enum class Format : int {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    Int4_32 = 1000,
    Int4_64,
    Int4_128,
    UInt4_32 = 1010,
    UInt4_64,
    UInt4_128,
    Int8_32 = 1020,
    Int8_64,
    Int8_128,
    UInt8_32 = 1030,
    UInt8_64,
    UInt8_128,
    UInt3_32 = 1040,
    UInt3_64,
    UInt3_128,
    UInt2_32 = 1050,
    UInt2_64,
    UInt2_128,
    Int8_Row = 1100,
};

// Bytes of one number in a dense format; 0 for a format of blocks.
constexpr int dense_bytes(Format format) {
    return format == Format::F32 ? 4 : format == Format::F16 || format == Format::BF16 ? 2 : 0;
}

enum class Scale : uint8_t {
    F16,    // float16 [16] per tile
    U8,     // uint8 [16] times the header's d
    S8,     // int8 [16] times the header's d
    Group,  // float32 [16] in the header; a minimum is scale · (offset - zero)
};

struct TileFormat {
    Format format;
    int bits;    // of a code: 2, 3, 4, 5, 6 or 8
    int offset;  // subtracted from each code
    int groups;  // scales per 32 inputs: 1, or 2 where a group is 16 inputs
    Scale scale;
    bool has_min;
    bool nonlinear;   // IQ4: a code is an index into kIq4Values
    int file_inputs;  // inputs per quant_block of the file: 32 to 256
    int file_bytes;   // bytes per quant_block of the file

    constexpr int code_bytes() const { return kTileRows * kTileInputs * bits / 8; }
    constexpr int scale_bytes() const {
        return scale == Scale::Group ? 0 : groups * kTileRows * (scale == Scale::F16 ? 2 : 1);
    }
    constexpr int tile_bytes() const { return code_bytes() + scale_bytes() * (has_min ? 2 : 1); }
    constexpr int header_bytes() const {
        if (scale == Scale::F16) return 0;
        return kTileRows * (scale == Scale::Group ? 4 + has_min : 2 + 2 * has_min);
    }
    constexpr size_t row_tile_bytes(size_t inputs) const {
        const size_t tiles = inputs / kTileInputs, per_header = tiles_per_header(format);
        return tiles * tile_bytes() + (tiles + per_header - 1) / per_header * header_bytes();
    }
    // Bytes of a row in a file; one of Int8_Row begins with its scale.
    constexpr size_t file_row_bytes(size_t inputs) const {
        return inputs / file_inputs * file_bytes + (format == Format::Int8_Row ? 4 : 0);
    }

    // Tiles that one header serves; a power of two.
    static constexpr size_t tiles_per_header(Format format) {
        const int number = static_cast<int>(format);
        if (format == Format::Int8_Row) return size_t{1} << 40;  // more than any row has
        return number < 1000 ? 8 : size_t{1} << (number % 10);
    }
};

// format, bits, offset, groups, scale, has_min, nonlinear, file_inputs, file_bytes
constexpr TileFormat kTileFormats[] = {
    {Format::Q4_0, 4, 8, 1, Scale::F16, false, false, 32, 18},
    {Format::Q4_1, 4, 0, 1, Scale::F16, true, false, 32, 20},
    {Format::Q5_0, 5, 16, 1, Scale::F16, false, false, 32, 22},
    {Format::Q5_1, 5, 0, 1, Scale::F16, true, false, 32, 24},
    {Format::Q8_0, 8, 128, 1, Scale::F16, false, false, 32, 34},
    {Format::Q2_K, 2, 0, 2, Scale::U8, true, false, 256, 84},
    {Format::Q3_K, 3, 4, 2, Scale::S8, false, false, 256, 110},
    {Format::Q4_K, 4, 0, 1, Scale::U8, true, false, 256, 144},
    {Format::Q5_K, 5, 0, 1, Scale::U8, true, false, 256, 176},
    {Format::Q6_K, 6, 32, 2, Scale::S8, false, false, 256, 210},
    {Format::IQ4_NL, 4, 128, 1, Scale::F16, false, true, 32, 18},
    {Format::IQ4_XS, 4, 128, 1, Scale::S8, false, true, 256, 136},
    {Format::Int4_32, 4, 8, 1, Scale::Group, false, false, 32, 20},
    {Format::Int4_64, 4, 8, 1, Scale::Group, false, false, 64, 36},
    {Format::Int4_128, 4, 8, 1, Scale::Group, false, false, 128, 68},
    {Format::UInt4_32, 4, 8, 1, Scale::Group, true, false, 32, 21},
    {Format::UInt4_64, 4, 8, 1, Scale::Group, true, false, 64, 37},
    {Format::UInt4_128, 4, 8, 1, Scale::Group, true, false, 128, 69},
    {Format::Int8_32, 8, 128, 1, Scale::Group, false, false, 32, 36},
    {Format::Int8_64, 8, 128, 1, Scale::Group, false, false, 64, 68},
    {Format::Int8_128, 8, 128, 1, Scale::Group, false, false, 128, 132},
    {Format::UInt8_32, 8, 128, 1, Scale::Group, true, false, 32, 37},
    {Format::UInt8_64, 8, 128, 1, Scale::Group, true, false, 64, 69},
    {Format::UInt8_128, 8, 128, 1, Scale::Group, true, false, 128, 133},
    {Format::UInt3_32, 3, 4, 1, Scale::Group, true, false, 32, 17},
    {Format::UInt3_64, 3, 4, 1, Scale::Group, true, false, 64, 29},
    {Format::UInt3_128, 3, 4, 1, Scale::Group, true, false, 128, 53},
    {Format::UInt2_32, 2, 2, 1, Scale::Group, true, false, 32, 13},
    {Format::UInt2_64, 2, 2, 1, Scale::Group, true, false, 64, 21},
    {Format::UInt2_128, 2, 2, 1, Scale::Group, true, false, 128, 37},
    {Format::Int8_Row, 8, 128, 1, Scale::Group, false, false, 32, 32},
};

// The longest row of Int8_Row: with more inputs, a sum of products might not fit into 32 bits.
constexpr size_t kMostRowInputs = 65536;

// The format whose kernels serve this one: group-wise formats that differ in the size of their
// groups alone have the same.
constexpr Format kernel_format(Format format) {
    const int number = static_cast<int>(format);
    return number < 1000 || format == Format::Int8_Row ? format
                                                       : static_cast<Format>(number - number % 10);
}

constexpr TileFormat tile_format(Format format) {
    for (const TileFormat &f : kTileFormats)
        if (f.format == format) return f;
    return {};  // bits = 0: not a format of blocks
}

// The value of each IQ4 code plus 128, which makes it an unsigned byte with offset 128, as Q8_0's
// codes are.
constexpr uint8_t kIq4Values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                    129, 141, 153, 166, 181, 197, 217, 241};

// Repack rows of a file's quant_blocks into tiles. `rows` rows of `inputs` inputs lie at `file`,
// one after another; row tiles first … last - 1 are written to `tiles`, each at its own place. Rows
// beyond the matrix become zeros. False if a scale or a minimum is NaN or infinite.
bool repack(Format format, const uint8_t *file, size_t rows, size_t inputs, uint8_t *tiles,
            size_t first, size_t last);

// F32, F16 and BF16: a row tile is [inputs][16] elements, with the bits of the file. False if one
// is NaN or infinite.
bool repack_dense(Format format, const uint8_t *file, size_t rows, size_t inputs, uint8_t *tiles,
                  size_t first, size_t last);

// One row of a tiled matrix in float32, times `factor`: an embedding.
void decode_row(Format format, const uint8_t *tiles, size_t row, size_t inputs, float factor,
                float *out);

}  // namespace pellucid
