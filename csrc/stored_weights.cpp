// Reads weights from a file into tiles: see stored_weights.h.
#include "stored_weights.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "tile.h"

namespace pellucid {
namespace {

constexpr size_t kPieceBytes = 256 << 10;  // half of the smallest L2 cache that is common

// The place in the file of a row of the weight.
size_t source_row(const StoredMatrix &m, size_t row) {
    if (m.interleaved_heads == 0) return row;
    const size_t head_rows = m.outputs / m.interleaved_heads, half = head_rows / 2;
    const size_t in_head = row % head_rows;
    return row - in_head + 2 * (in_head % half) + in_head / half;
}

// Fill `into` from `offset`. Returns the number of bytes read, and sets `error` to errno.
size_t read_bytes(int file, size_t offset, uint8_t *into, size_t bytes, int &error) {
    size_t done = 0;
    while (done < bytes) {
        const ssize_t count =
            pread(file, into + done, bytes - done, static_cast<off_t>(offset + done));
        if (count < 0 && errno == EINTR) continue;
        error = count < 0 ? errno : 0;
        if (count <= 0) break;
        done += static_cast<size_t>(count);
    }
    return done;
}

// One thread's memory for reading.
class Reader {
  public:
    // Rows first … last - 1 of the weight, one after another. If they cannot be read: nullptr, with
    // the offset and the error set.
    const uint8_t *rows(const StoredMatrix &m, size_t row_bytes, size_t first, size_t last,
                        size_t &offset, int &error) {
        // the rows of the file that hold them
        size_t begin = first, end = last;
        for (size_t r = first; r < last; r++) {
            begin = std::min(begin, source_row(m, r));
            end = std::max(end, source_row(m, r) + 1);
        }
        const size_t bytes = (end - begin) * row_bytes;
        if (read_.size() < bytes) read_.resize(bytes);
        offset = m.offset + begin * row_bytes;
        const size_t done = read_bytes(m.file, offset, read_.data(), bytes, error);
        if (done < bytes) {
            offset += done;
            return nullptr;
        }
        if (m.interleaved_heads == 0) return read_.data();
        // their order
        ordered_.resize((last - first) * row_bytes);
        for (size_t r = first; r < last; r++)
            std::memcpy(ordered_.data() + (r - first) * row_bytes,
                        read_.data() + (source_row(m, r) - begin) * row_bytes, row_bytes);
        return ordered_.data();
    }

  private:
    std::vector<uint8_t> read_, ordered_;
};

}  // namespace

RowLayout row_layout(Format format, size_t inputs) {
    const TileFormat tiles = tile_format(format);
    const size_t element = static_cast<size_t>(dense_bytes(format));
    if (element == 0 && tiles.bits == 0)
        throw std::invalid_argument("no kernel knows this block format");
    const size_t block = element ? 1 : static_cast<size_t>(tiles.file_inputs);
    if (inputs == 0 || inputs % block != 0 || inputs > kMostWidth)
        throw std::invalid_argument("a row is not a whole number of blocks");
    if (format == Format::Int8_Row && inputs > kMostRowInputs)
        throw std::invalid_argument("a row with one scale is too long");
    if (element) return {inputs * element, inputs * element * kTileRows};
    return {tiles.file_row_bytes(inputs), tiles.row_tile_bytes(inputs)};
}

std::vector<std::shared_ptr<Weight>> load_stored(ThreadPool &pool, WeightMemory &memory,
                                                 const std::vector<StoredMatrix> &matrices,
                                                 std::optional<Unread> &unread) {
    std::vector<std::shared_ptr<Weight>> weights;
    std::vector<RowLayout> layouts;
    std::vector<std::atomic<bool>> finite(matrices.size());
    const auto prepare = [&] {
        for (size_t i = 0; i < matrices.size(); i++) {
            const StoredMatrix &m = matrices[i];
            layouts.push_back(row_layout(m.format, m.inputs));
            const size_t bytes = (m.outputs + kTileRows - 1) / kTileRows * layouts[i].tile_bytes;
            weights.push_back(std::make_shared<Weight>(
                Weight{m.format, m.outputs, m.inputs, bytes, memory.take(bytes)}));
            finite[i].store(true, std::memory_order_relaxed);
        }
        return size_t{1};  // no matrix needs another: threads never wait for each other
    };
    std::mutex turn;
    std::atomic<bool> failed{false};
    const auto load_share = [&](size_t i, size_t share, Reader &reader) {
        const StoredMatrix &m = matrices[i];
        const auto [row_bytes, tile_bytes] = layouts[i];
        const size_t row_tiles = (m.outputs + kTileRows - 1) / kTileRows;
        const size_t last = row_tiles * (share + 1) / pool.size();
        const size_t step = std::max(size_t{1}, kPieceBytes / (row_bytes * kTileRows));
        const auto put_in_tiles = dense_bytes(m.format) ? repack_dense : repack;
        for (size_t t = row_tiles * share / pool.size(); t < last; t += step) {
            const size_t until = std::min(last, t + step), first_row = t * kTileRows;
            const size_t last_row = std::min(m.outputs, until * kTileRows);
            size_t offset = 0;
            int error = 0;
            const uint8_t *rows = reader.rows(m, row_bytes, first_row, last_row, offset, error);
            if (rows == nullptr) {
                const std::lock_guard lock(turn);
                if (!unread) unread = Unread{i, offset, error};
                failed.store(true, std::memory_order_relaxed);
                return;
            }
            if (!put_in_tiles(m.format, rows, last_row - first_row, m.inputs,
                              weights[i]->tiles.get() + t * tile_bytes, 0, until - t))
                finite[i].store(false, std::memory_order_relaxed);
        }
    };
    pool.run(prepare, [&](size_t, size_t share) {  // each thread writes what it will read
        Reader reader;
        for (size_t i = 0; i < matrices.size() && !failed.load(std::memory_order_relaxed); i++)
            load_share(i, share, reader);
    });
    for (size_t i = 0; i < matrices.size(); i++)
        weights[i]->finite = finite[i].load(std::memory_order_relaxed);
    return weights;
}

}  // namespace pellucid
