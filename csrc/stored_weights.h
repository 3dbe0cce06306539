// Reads weights from a file into tiles, piece by piece.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "memory.h"
#include "program.h"
#include "thread_pool.h"

namespace pellucid {

// Bytes of a row in a file, and of 16 rows in tiles. Throws std::invalid_argument if no kernel
// supports the format, or if a row is not a whole number of blocks.
struct RowLayout {
    size_t file_bytes, tile_bytes;
};
RowLayout row_layout(Format format, size_t inputs);

// A matrix that lies in an open file, row after row from `offset`.
struct StoredMatrix {
    Format format;
    size_t outputs, inputs;
    int file;
    size_t offset;
    // For q and k: the number of heads, in each of which rows 2i and 2i + 1 become rows i and i +
    // D/2. 0: rows keep their order.
    size_t interleaved_heads;
};

// A failed read: the matrix, the offset in the file, and the system's error; 0 if the file ends
// there.
struct Unread {
    size_t matrix, offset;
    int error;
};

// Load matrices. Each thread reads its share of the rows in pieces that fit in its cache, and
// repacks each piece into tiles at once. So only the tiles take memory, and no page is written
// twice. The bytes are copied (pread), not mapped. If the file is cut short or the disk fails,
// `unread` says so, and the weights must not be used.
std::vector<std::shared_ptr<Weight>> load_stored(ThreadPool &pool, WeightMemory &memory,
                                                 const std::vector<StoredMatrix> &matrices,
                                                 std::optional<Unread> &unread);

}  // namespace pellucid
