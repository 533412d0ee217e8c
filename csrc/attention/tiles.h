// Tiles of self-attention: [rows][64 lanes], a lane is a position of one image. Reading and writing them from and to
// images and matrices, conversion from 16-bit types included. A position that does not exist is a lane of zeros.
#pragma once

#include <omp.h>

#include "attention/attention.h"
#include "common/half.h"
#include "common/product.h"
#include "common/simd.h"

namespace sabmn {
namespace SABMN_ISA {

constexpr std::int64_t lanes = attention_lanes, chunk = attention_chunk;
// Tiles that products with the weights take together, so that wide weights are fetched half as often.
constexpr std::int64_t tiles_together = 2;

// Calls f(row, lane, offset in the tile) for each vector of the first `columns` lanes of a tile's rows.
template <typename T, typename F>
static inline void each_vector(std::int64_t rows, std::int64_t columns, F f) {
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t lane = 0; lane < columns; lane += vector_lanes<T>) f(row, lane, row * lanes + lane);
}

// to[0 … count) = from, converted. T is an element type, Wide<T> what is computed in.
template <typename T>
static inline void read_row(const T* from, std::int64_t count, Wide<T>* to) {
    if (count == lanes)  // a constant count makes a handful of vector moves
        for (std::int64_t i = 0; i < lanes; ++i) to[i] = widen(from[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <typename T>
static inline void write_row(const Wide<T>* from, std::int64_t count, T* to) {
    if (count == lanes)
        for (std::int64_t i = 0; i < lanes; ++i) narrow(from[i], to[i]);
    else
        for (std::int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// tile[row][i] = matrix[row][i] for i < count, then zeros up to `filled`; rows are row_length and tile_row apart. And
// back.
template <typename T>
static void load_tile(const T* matrix, std::int64_t rows, std::int64_t row_length, std::int64_t count, Wide<T>* tile,
                      std::int64_t tile_row = lanes, std::int64_t filled = lanes) {
    for (std::int64_t row = 0; row < rows; ++row, matrix += row_length, tile += tile_row) {
        read_row(matrix, count, tile);
        for (std::int64_t i = count; i < filled; ++i) tile[i] = 0;
    }
}
template <typename T>
static void store_tile(const Wide<T>* tile, std::int64_t rows, std::int64_t row_length, std::int64_t count, T* matrix) {
    for (std::int64_t row = 0; row < rows; ++row, matrix += row_length, tile += lanes) write_row(tile, count, matrix);
}

// Fetches rows of memory into the cache that are needed next, some cache lines at each call: between the blocks of a
// product they come meanwhile; all at once, they would be waited for.
struct Fetch {
    static constexpr std::int64_t line = 64, lines = 16;
    const char* row = nullptr;
    std::int64_t rows = 0, row_stride = 0, row_bytes = 0, at = 0;

    void operator()() {
        for (std::int64_t i = 0; i < lines && rows > 0; ++i) {
            __builtin_prefetch(row + at);
            if ((at += line) >= row_bytes) at = 0, row += row_stride, --rows;
        }
    }
};

// Up to `chunk` consecutive positions of one image.
template <typename T>
struct Window {
    using F = Wide<T>;
    T* base;
    std::int64_t channel_stride, count, offset[chunk];
    bool uniform = true;  // the positions are the same distance apart

    Window(const Image& image, std::int64_t width, std::int64_t batch, std::int64_t first, std::int64_t positions)
        : base(static_cast<T*>(image.data) + batch * image.batch_stride),
          channel_stride(image.channel_stride),
          count(positions) {
        std::int64_t row = first / width, column = first % width;
        for (std::int64_t lane = 0; lane < count; ++lane) {
            offset[lane] = row * image.height_stride + column * image.width_stride;
            uniform = uniform && offset[lane] - offset[0] == lane * step();
            if (++column == width) column = 0, ++row;
        }
    }

    std::int64_t step() const { return count > 1 ? offset[1] - offset[0] : 1; }
    bool contiguous() const { return uniform && step() == 1; }

    // tile[channel][lane], rows of `width` ≥ count, zeros after the last position.
    void load(std::int64_t first_channel, std::int64_t channels, F* tile, std::int64_t width = lanes) const {
        const T* const from = base + first_channel * channel_stride;
        if (contiguous()) return load_tile<T>(from + offset[0], channels, channel_stride, count, tile, width, width);
        if constexpr (sizeof(T) == sizeof(F)) {
            if (channel_stride == 1) {
                transpose<F>(count, channels, [=](std::int64_t lane) { return from + offset[lane]; }, tile, width);
                return clear_after(channels, tile, width);
            }
        }
        if (channel_stride == 1) {
            F row[lanes];
            for (std::int64_t lane = 0; lane < count; ++lane)
                for (std::int64_t c = 0; c < channels; c += lanes) {
                    const std::int64_t part = smaller(lanes, channels - c);
                    read_row(from + offset[lane] + c, part, row);
                    for (std::int64_t i = 0; i < part; ++i) tile[(c + i) * width + lane] = row[i];
                }
        } else {
            for (std::int64_t channel = 0; channel < channels; ++channel)
                for (std::int64_t lane = 0; lane < count; ++lane)
                    tile[channel * width + lane] = widen(from[channel * channel_stride + offset[lane]]);
        }
        clear_after(channels, tile, width);
    }

    // Channels of the window, or nothing where neither they nor their positions lie side by side.
    Fetch fetch(std::int64_t first_channel, std::int64_t channels) const {
        constexpr std::int64_t size = sizeof(T);
        if (count == 0 || channels <= 0) return {};
        const char* const from = reinterpret_cast<const char*>(base + first_channel * channel_stride + offset[0]);
        if (contiguous()) return {from, channels, size * channel_stride, size * count};
        if (uniform && channel_stride == 1) return {from, count, size * step(), size * channels};
        return {};
    }

    void store(std::int64_t first_channel, std::int64_t channels, const F* tile) const {
        T* const to = base + first_channel * channel_stride;
        if (contiguous()) return store_tile<T>(tile, channels, channel_stride, count, to + offset[0]);
        if (channel_stride == 1) {
            F rows[lanes * lanes];  // [lane][channel]
            for (std::int64_t c = 0; c < channels; c += lanes) {
                const std::int64_t part = smaller(lanes, channels - c);
                const F* const from = tile + c * lanes;
                transpose<F>(part, count, [=](std::int64_t channel) { return from + channel * lanes; }, rows, lanes);
                for (std::int64_t lane = 0; lane < count; ++lane)
                    write_row(rows + lane * lanes, part, to + offset[lane] + c);
            }
        } else {
            for (std::int64_t channel = 0; channel < channels; ++channel)
                for (std::int64_t lane = 0; lane < count; ++lane)
                    narrow(tile[channel * lanes + lane], to[channel * channel_stride + offset[lane]]);
        }
    }

private:
    void clear_after(std::int64_t channels, F* tile, std::int64_t width) const {
        for (std::int64_t channel = 0; channel < channels; ++channel)
            for (std::int64_t lane = count; lane < width; ++lane) tile[channel * width + lane] = 0;
    }
};

// The windows of tiles_together tiles; those after `positions` are empty.
template <typename T>
struct Windows {
    Window<T> windows[tiles_together];
    Windows(const Image& image, std::int64_t width, std::int64_t batch, std::int64_t first, std::int64_t positions)
        : windows{{image, width, batch, first, smaller(lanes, positions)},
                  {image, width, batch, first + lanes, positions > lanes ? positions - lanes : 0}} {}
    const Window<T>& operator[](std::int64_t tile) const { return windows[tile]; }

    // What comes after these channels of a tile, where for each part of `all` channels the tiles take turns.
    Fetch fetch_next(std::int64_t tile, std::int64_t first_channel, std::int64_t channels, std::int64_t all) const {
        if (tile + 1 < tiles_together && windows[tile + 1].count > 0) return windows[tile + 1].fetch(first_channel, channels);
        const std::int64_t next = first_channel + channels;
        return windows[0].fetch(next, smaller(channels, all - next));
    }
};

// Hands out pieces of a block of memory, one after the other, each on a cache line of its own.
template <typename T>
struct Arena {
    T* next;
    T* take(std::int64_t elements) {
        T* const piece = next;
        next += blocks_of(elements, 16) * 16;
        return piece;
    }
};

// Calls f(job, this thread's scratch memory) for every job, over the threads.
template <typename F, typename Body>
static void each_job(const AttentionInputs& in, F* scratch, std::int64_t scratch_of_thread, std::int64_t jobs,
                     Body body) {
#pragma omp parallel for num_threads(in.threads) schedule(dynamic)
    for (std::int64_t job = 0; job < jobs; ++job)
        body(job, Arena<F>{scratch + omp_get_thread_num() * scratch_of_thread});
}

// Whether whole images give the threads equal work.
static inline bool image_by_image(const AttentionInputs& in) {
    return in.sizes.batch % in.threads == 0 || in.sizes.batch >= 8 * in.threads;
}

// A phase of the work on an image: body(image, job, scratch) for each of its jobs.
template <typename Body>
struct Phase {
    std::int64_t jobs;
    Body body;
};

// The phase that calls body(image, first position, positions, scratch) for each tile of positions, or for each two.
template <typename Body>
static auto tile_by_tile(const AttentionInputs& in, Body body) {
    const std::int64_t positions = in.sizes.positions(), step = (image_by_image(in) ? tiles_together : 1) * lanes;
    const auto tiles = [=](std::int64_t image, std::int64_t job, auto arena) {
        body(image, job * step, smaller(step, positions - job * step), arena);
    };
    return Phase<decltype(tiles)>{blocks_of(positions, step), tiles};
}

// Calls body(tile, first position, positions) for each tile of `count` positions.
template <typename Body>
static inline void each_tile(std::int64_t first, std::int64_t count, Body body) {
    for (std::int64_t tile = 0; tile * lanes < count; ++tile)
        body(tile, first + tile * lanes, smaller(lanes, count - tile * lanes));
}

// Takes every image through the phases. Where that gives the threads equal work, a thread takes an image through all of
// them while it is in the cache; else the threads share the jobs of one phase after the other.
template <typename F, typename... Bodies>
static void each_image(const AttentionInputs& in, F* scratch, std::int64_t scratch_of_thread, Phase<Bodies>... phases) {
    const std::int64_t images = in.sizes.batch;
    if (image_by_image(in)) {
        each_job(in, scratch, scratch_of_thread, images, [&](std::int64_t image, Arena<F> arena) {
            const auto run = [&](auto& phase) {
                for (std::int64_t job = 0; job < phase.jobs; ++job) phase.body(image, job, arena);
            };
            (run(phases), ...);
        });
        return;
    }
    const auto run = [&](auto& phase) {
        each_job(in, scratch, scratch_of_thread, images * phase.jobs, [&](std::int64_t job, Arena<F> arena) {
            phase.body(job / phase.jobs, job % phase.jobs, arena);
        });
    };
    (run(phases), ...);
}

}  // namespace SABMN_ISA
}  // namespace sabmn
