// Decodes one row of the tiles of tile.h without vectors: an embedding lookup reads one row per
// token.
#include <cstring>

#include "float16.h"
#include "tile.h"

namespace pellucid {
namespace {

uint16_t u16_at(const uint8_t *p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

unsigned code_at(const TileFormat &f, const uint8_t *tile, int row, int input) {
    const int quad = input / 4, lane = 4 * row + input % 4;
    if (f.bits == 8) return tile[64 * quad + lane];
    unsigned code = 0;
    int have = 0;
    if (f.bits >= 4) {
        code = tile[64 * (quad % 4) + lane] >> (quad / 4 * 4) & 15;
        tile += 256;
        have = 4;
    }
    if (f.bits % 4 >= 2) {
        code |= static_cast<unsigned>(tile[64 * (quad / 4) + lane] >> (quad % 4 * 2) & 3) << have;
        tile += 128;
        have += 2;
    }
    if (f.bits % 2) code |= static_cast<unsigned>(tile[lane] >> quad & 1) << have;
    return f.nonlinear ? kIq4Values[code] : code;
}

}  // namespace

void decode_row(Format format, const uint8_t *tiles, size_t row, size_t inputs, float factor,
                float *out) {
    const int r = static_cast<int>(row % kTileRows);
    const size_t row_tile = row / kTileRows;
    if (format == Format::F32 || format == Format::F16 || format == Format::BF16) {
        for (size_t k = 0; k < inputs; k++) {
            const size_t i = (row_tile * inputs + k) * kTileRows + static_cast<size_t>(r);
            if (format == Format::F32)
                out[k] = reinterpret_cast<const float *>(tiles)[i] * factor;
            else if (format == Format::F16)
                out[k] = float_from_f16(reinterpret_cast<const uint16_t *>(tiles)[i]) * factor;
            else
                out[k] = float_from_bf16(reinterpret_cast<const uint16_t *>(tiles)[i]) * factor;
        }
        return;
    }
    const TileFormat f = tile_format(format);
    const uint8_t *tile = tiles + row_tile * f.row_tile_bytes(inputs), *header = tile;
    for (size_t b = 0; b < inputs / kTileInputs; b++) {
        if (f.header_bytes() && b % f.tiles_per_header(format) == 0) {
            header = tile;
            tile += f.header_bytes();
        }
        for (int i = 0; i < kTileInputs; i++) {
            const int g = f.groups == 2 ? i / 16 : 0;
            const uint8_t *scales = tile + f.code_bytes(), *mins = scales + f.scale_bytes();
            float scale, min = 0.0f;
            int offset = f.offset;
            if (f.scale == Scale::Group) {
                std::memcpy(&scale, header + 4 * r, sizeof scale);
                if (f.has_min) offset = header[4 * kTileRows + r];
            } else if (f.scale == Scale::F16) {
                scale = float_from_f16(u16_at(scales + 2 * r));
                if (f.has_min) min = float_from_f16(u16_at(mins + 2 * r));
            } else {
                const uint8_t s = scales[g * kTileRows + r];
                scale = float_from_f16(u16_at(header + 2 * r)) *
                        (f.scale == Scale::U8 ? static_cast<float>(s)
                                              : static_cast<float>(static_cast<int8_t>(s)));
                if (f.has_min)
                    min = -(float_from_f16(u16_at(header + 2 * (kTileRows + r))) *
                            static_cast<float>(mins[g * kTileRows + r]));
            }
            const float code =
                static_cast<float>(static_cast<int>(code_at(f, tile, r, i)) - offset);
            out[b * kTileInputs + static_cast<size_t>(i)] = (scale * code + min) * factor;
        }
        tile += f.tile_bytes();
    }
}

}  // namespace pellucid
