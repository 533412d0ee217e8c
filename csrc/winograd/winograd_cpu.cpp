// Winograd's transforms on the CPU. A tile is gathered from its places in memory, transformed in registers, a vector of
// channels at a time, and written: every number is written once and read once (planes of input gradients 36/16 times, from
// a cache), so that the bandwidth of the caches is the limit.

#include "winograd/winograd.h"

#include <omp.h>

#include "common/half.h"
#include "common/simd.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

using std::int64_t;

constexpr int64_t values_per_thread = 1 << 14;  // fewer are done sooner than another thread begins

// ---- the matrices, applied to one row or column of a tile: its elements are `stride` apart ----

struct InputMatrix {  // Bᵀ
    static constexpr int from = 4, to = 4;
    template <typename V>
    static void apply(const V* d, V* out, int stride) {
        out[0] = d[0] - d[2 * stride];
        out[stride] = d[stride] + d[2 * stride];
        out[2 * stride] = d[2 * stride] - d[stride];
        out[3 * stride] = d[stride] - d[3 * stride];
    }
};

// B, for the two positions that are a tile's own: the last element of the tile before, the four of the tile, and the first
// one of the tile behind reach them.
struct InputAdjoint {
    static constexpr int from = 6, to = 2;
    template <typename V>
    static void apply(const V* v, V* out, int stride) {
        const V second = v[2 * stride], third = v[3 * stride];
        out[0] = (second - third) + (v[4 * stride] - v[0]);
        out[stride] = (second + third) - (v[stride] - v[5 * stride]);
    }
};

struct OutputMatrix {  // Aᵀ
    static constexpr int from = 4, to = 2;
    template <typename V>
    static void apply(const V* m, V* out, int stride) {
        out[0] = m[0] + (m[stride] + m[2 * stride]);
        out[stride] = (m[stride] - m[2 * stride]) - m[3 * stride];
    }
};

struct OutputAdjoint {  // A
    static constexpr int from = 2, to = 4;
    template <typename V>
    static void apply(const V* y, V* out, int stride) {
        const V first = y[0], second = y[stride];
        out[0] = first;
        out[stride] = first + second;
        out[2 * stride] = first - second;
        out[3 * stride] = -second;
    }
};

struct WeightMatrix {  // G
    static constexpr int from = 3, to = 4;
    template <typename V>
    static void apply(const V* w, V* out, int stride) {
        const V first = w[0], middle = w[stride], last = w[2 * stride], outer = first + last;
        out[0] = first;
        out[stride] = (outer + middle) * 0.5f;
        out[2 * stride] = (outer - middle) * 0.5f;
        out[3 * stride] = last;
    }
};

struct WeightAdjoint {  // Gᵀ
    static constexpr int from = 4, to = 3;
    template <typename V>
    static void apply(const V* u, V* out, int stride) {
        const V even = (u[stride] + u[2 * stride]) * 0.5f, odd = (u[stride] - u[2 * stride]) * 0.5f, last = u[3 * stride];
        out[0] = u[0] + even;
        out[stride] = odd;
        out[2 * stride] = even + last;
    }
};

constexpr int side = 6;  // of a tile in registers: rows are so far apart, whatever their length

// matrix · tile · matrixᵀ, in place
template <typename Matrix, typename V>
void transform(V* tile) {
    alignas(vector_bytes) V columns[side * side];
#pragma GCC unroll 6
    for (int j = 0; j < Matrix::from; ++j) Matrix::apply(tile + j, columns + j, side);
#pragma GCC unroll 4
    for (int i = 0; i < Matrix::to; ++i) Matrix::apply(columns + side * i, tile + side * i, 1);
}

// ---- reading and writing, many channels at once or one; all is float in between ----

struct Many {
    using V = Vector<float>;
    typedef std::uint16_t Halves __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));
    typedef std::uint32_t Bits __attribute__((vector_size(vector_bytes)));
    static constexpr int64_t count = vector_lanes<float>;

    static V read(const float* from) { return vector_at(from); }
    static void write(float* to, V value) { vector_at(to) = value; }
    static V read(const BFloat16* from) {
        return (V)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
    }
    static void write(BFloat16* to, V value) {  // as narrow() does
        const Bits bits = (Bits)value, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Bits kept = (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded;
        *reinterpret_cast<Halves*>(to) = __builtin_convertvector(kept, Halves);
    }
};

struct One {
    using V = float;
    static constexpr int64_t count = 1;

    template <typename T>
    static V read(const T* from) {
        return widen(*from);
    }
    template <typename T>
    static void write(T* to, V value) {
        narrow(value, *to);
    }
};

// ---- tiles ----

// Where the elements of a tile stand: null outside of the image.
template <typename T, int size>
struct Places {
    T* at[size * size];
    bool whole = true;

    void set(int i, int j, T* place) {
        at[i * size + j] = place;
        whole = whole && place;
    }
};

template <typename Matrix, typename Lanes, bool whole, typename From, typename To>
inline void move_lanes(const From& from, const To& to, int64_t channel) {
    using V = typename Lanes::V;
    alignas(vector_bytes) V tile[side * side];
#pragma GCC unroll 36
    for (int i = 0; i < Matrix::from * Matrix::from; ++i) {
        const auto* place = from.at[i];
        tile[i / Matrix::from * side + i % Matrix::from] = whole || place ? Lanes::read(place + channel) : V{};
    }
    transform<Matrix>(tile);
#pragma GCC unroll 16
    for (int i = 0; i < Matrix::to * Matrix::to; ++i) {
        auto* place = to.at[i];
        if (whole || place) Lanes::write(place + channel, tile[i / Matrix::to * side + i % Matrix::to]);
    }
}

template <typename Matrix, bool whole, typename From, typename To>
void move_channels(const From& from, const To& to, int64_t channels) {
    int64_t channel = 0;
    for (; channel + Many::count <= channels; channel += Many::count) move_lanes<Matrix, Many, whole>(from, to, channel);
    for (; channel < channels; ++channel) move_lanes<Matrix, One, whole>(from, to, channel);
}

template <typename Matrix, typename From, typename To>
void move_tile(const From& from, const To& to, int64_t channels) {
    if (from.whole && to.whole) {
        move_channels<Matrix, true>(from, to, channels);
    } else {
        move_channels<Matrix, false>(from, to, channels);
    }
}

// ---- images and planes ----

template <typename T>
struct Images {
    const WinogradImages& shape;
    T* values;

    // The size×size positions from (y, x) on.
    template <int size>
    Places<T, size> places(int64_t image, int64_t y, int64_t x) const {
        Places<T, size> found;
        for (int i = 0; i < size; ++i) {
            for (int j = 0; j < size; ++j) {
                const bool inside = y + i >= 0 && y + i < shape.height && x + j >= 0 && x + j < shape.width;
                const int64_t position = (image * shape.height + y + i) * shape.width + x + j;
                found.set(i, j, inside ? values + position * shape.channels : nullptr);
            }
        }
        return found;
    }
};

struct Planes {
    int64_t tile_rows, tile_columns, channels, stride;  // from one plane to the next
    float* values;

    Planes(const WinogradImages& shape, bool of_weights, float* start)
        : tile_rows(of_weights ? 1 : (shape.height + 1) / 2), tile_columns(of_weights ? 1 : (shape.width + 1) / 2),
          channels(shape.channels), stride(shape.batch * tile_rows * tile_columns * channels), values(start) {}

    float* at(int64_t image, int64_t row, int64_t column, int i, int j) const {
        return values + (4 * i + j) * stride + ((image * tile_rows + row) * tile_columns + column) * channels;
    }
    Places<float, 4> tile(int64_t image, int64_t row, int64_t column) const {
        Places<float, 4> found;
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) found.set(i, j, at(image, row, column, i, j));
        }
        return found;
    }
    // What InputAdjoint takes, of this tile and its neighbours.
    Places<float, 6> around(int64_t image, int64_t row, int64_t column) const {
        Places<float, 6> found;
        for (int i = 0; i < 6; ++i) {
            for (int j = 0; j < 6; ++j) {
                const int64_t r = row + (i == 5) - (i == 0), c = column + (j == 5) - (j == 0);
                const bool inside = r >= 0 && r < tile_rows && c >= 0 && c < tile_columns;
                found.set(i, j, inside ? at(image, r, c, (i + 3) % 4, (j + 3) % 4) : nullptr);
            }
        }
        return found;
    }
};

// call(image, row, column) for all tiles
template <typename Call>
void for_tiles(const WinogradImages& shape, const Planes& planes, int threads, const Call& call) {
    const int64_t useful = planes.stride * 16 / values_per_thread + 1;
#pragma omp parallel for collapse(2) num_threads(useful < threads ? static_cast<int>(useful) : threads)
    for (int64_t image = 0; image < shape.batch; ++image) {
        for (int64_t row = 0; row < planes.tile_rows; ++row) {
            for (int64_t column = 0; column < planes.tile_columns; ++column) call(image, row, column);
        }
    }
}

template <typename T>
void run(WinogradTransform transform, const WinogradImages& shape, T* values, float* start, int threads) {
    const bool of_weights = transform == WinogradTransform::weight || transform == WinogradTransform::weight_gradient;
    const Images<T> images = {shape, values};
    const Planes planes(shape, of_weights, start);
    const int64_t channels = shape.channels;
    const auto each = [&](const auto& call) { for_tiles(shape, planes, threads, call); };
    switch (transform) {
        case WinogradTransform::input:
            return each([=](int64_t image, int64_t row, int64_t column) {
                const auto places = images.template places<4>(image, 2 * row - 1, 2 * column - 1);
                move_tile<InputMatrix>(places, planes.tile(image, row, column), channels);
            });
        case WinogradTransform::input_gradient:
            return each([=](int64_t image, int64_t row, int64_t column) {
                const auto places = images.template places<2>(image, 2 * row, 2 * column);
                move_tile<InputAdjoint>(planes.around(image, row, column), places, channels);
            });
        case WinogradTransform::output:
            return each([=](int64_t image, int64_t row, int64_t column) {
                const auto places = images.template places<2>(image, 2 * row, 2 * column);
                move_tile<OutputMatrix>(planes.tile(image, row, column), places, channels);
            });
        case WinogradTransform::output_gradient:
            return each([=](int64_t image, int64_t row, int64_t column) {
                const auto places = images.template places<2>(image, 2 * row, 2 * column);
                move_tile<OutputAdjoint>(places, planes.tile(image, row, column), channels);
            });
        case WinogradTransform::weight:
            return each([=](int64_t image, int64_t, int64_t) {
                move_tile<WeightMatrix>(images.template places<3>(image, 0, 0), planes.tile(image, 0, 0), channels);
            });
        case WinogradTransform::weight_gradient:
            return each([=](int64_t image, int64_t, int64_t) {
                move_tile<WeightAdjoint>(planes.tile(image, 0, 0), images.template places<3>(image, 0, 0), channels);
            });
    }
}

}  // namespace

int winograd(WinogradTransform transform, const WinogradImages& shape, void* images, float* planes, int threads) {
    if (shape.dtype == DType::float32) {
        run(transform, shape, static_cast<float*>(images), planes, threads);
    } else if (shape.dtype == DType::bfloat16) {
        run(transform, shape, static_cast<BFloat16*>(images), planes, threads);
    } else {
        return unsupported_dtype;
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
