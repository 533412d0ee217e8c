// How the workspace of self-attention is divided, and into which parts the backward pass cuts the keys of an image.
#pragma once

#include "attention/attention.h"

namespace sabmn {

constexpr int64_t attention_padded(int64_t width) { return (width + 15) / 16 * 16; }  // whole vectors

// The keys of an image, cut into parts that can be worked on at the same time. Each part has a sum of its own for the
// gradients of the queries, and these are added in their order: the parts depend on N alone, so that the result does
// not depend on the number of threads.
struct AttentionParts {
    int64_t keys;    // of a part, whole tiles
    int64_t parts;   // of an image: at most 8, so that the sums stay O(N)
    int64_t images;  // worked on at the same time: enough parts for all threads
};

inline AttentionParts attention_parts(const AttentionSizes& sizes, int threads) {
    const int64_t tiles = (sizes.positions() + attention_lanes - 1) / attention_lanes;
    const int64_t part = tiles > 64 ? (tiles + 7) / 8 : 8, parts = (tiles + part - 1) / part;
    const int64_t images = parts == 1 ? sizes.batch : (2 * threads + parts - 1) / parts;
    return {part * attention_lanes, parts, images < sizes.batch ? images : sizes.batch};
}

// Of a thread: tiles of a chunk's rows, up to 2 and, as pairs, 3 of half their size or one of twice it; tiles of the
// widths' rows.
inline int64_t attention_thread_workspace(const AttentionSizes& sizes) {
    const int64_t widths = attention_padded(sizes.key_width) + attention_padded(sizes.value_width);
    return attention_lanes * (4 * attention_chunk + 7 * widths);
}

// A matrix [B, rows, N] as the products read it: cut into chunks of 128 positions, [B, chunks, rows, 128] (fewer where
// N is smaller). In place, rows of N numbers would meet in the same few cache sets.
struct AttentionChunks {
    int64_t chunks, positions;  // of an image; of a chunk
    explicit AttentionChunks(const AttentionSizes& sizes)
        : chunks((sizes.positions() + attention_chunk - 1) / attention_chunk),
          positions(chunks > 1 ? attention_chunk : attention_padded(sizes.positions())) {}
    // Pairs of bfloat16 stand there twice, along the rows and along the positions, which takes an even number of rows.
    int64_t elements(int64_t batch, int64_t rows) const { return batch * chunks * (rows + rows % 2) * positions; }
    // Where the row 0 of a position stands; row r is r · positions further.
    int64_t at(int64_t image, int64_t rows, int64_t position) const {
        return (image * chunks + position / attention_chunk) * rows * positions + position % attention_chunk;
    }
};

// Columns of the gradients at a position: of query, key and value.
inline int64_t attention_gradient_columns(const AttentionSizes& sizes) {
    return 2 * attention_padded(sizes.key_width) + attention_padded(sizes.value_width);
}

// Elements of an image's context in chunks, whose place its out, [N, padded value_width], takes when that is done with.
inline int64_t attention_context_elements(const AttentionSizes& sizes) {
    const int64_t chunks = AttentionChunks(sizes).elements(1, sizes.value_width);
    const int64_t rows = sizes.positions() * attention_padded(sizes.value_width);
    return chunks > rows ? chunks : rows;
}

// Elements of the wide type that the workspace must have: as many for the forward pass as for the backward pass, which
// needs more, so that the second can have the memory of the first. What a pass does not touch takes none.
inline int64_t attention_workspace(const AttentionSizes& sizes, int threads) {
    const int64_t positions = sizes.batch * sizes.positions(), C = sizes.channels;
    const int64_t widths = sizes.key_width + sizes.value_width;
    int64_t elements = threads * attention_thread_workspace(sizes) + 2 * C * widths + 256;
    elements += AttentionChunks(sizes).elements(sizes.batch, sizes.key_width);
    elements += sizes.batch * attention_context_elements(sizes);
    elements += positions * (2 + attention_gradient_columns(sizes));
    const AttentionParts parts = attention_parts(sizes, threads);
    if (parts.parts > 1)
        elements += parts.images * parts.parts * sizes.positions() * attention_padded(sizes.key_width);
    return elements;
}

}  // namespace sabmn
