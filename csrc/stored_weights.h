// Weights from a file into tiles, piece by piece.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "memory.h"
#include "program.h"
#include "thread_pool.h"

namespace pellucid {

// Bytes of a row in a file, and of 16 rows in tiles. Throws std::invalid_argument where no kernel
// knows the format, or a row is not a whole number of its blocks.
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
    // Rows of q and k: so many heads, in each of which rows 2i and 2i + 1 become rows i and i + D/2.
    // 0: rows stay where they are.
    size_t interleaved_heads;
};

// Bytes that could not be read: of which matrix, where in the file, and the system's error; 0 where
// the file ends there.
struct Unread {
    size_t matrix, offset;
    int error;
};

// Load matrices. Each thread reads its share of the rows in pieces that stay in its cache, and puts
// each piece into tiles at once. So nothing but the tiles takes memory, and no page is written
// twice. The bytes are copied (pread) and not mapped: where the file is cut short or the disk
// fails, `unread` says so, and the weights are not to be used.
std::vector<std::shared_ptr<Weight>> load_stored(ThreadPool &pool, WeightMemory &memory,
                                                 const std::vector<StoredMatrix> &matrices,
                                                 std::optional<Unread> &unread);

}  // namespace pellucid
