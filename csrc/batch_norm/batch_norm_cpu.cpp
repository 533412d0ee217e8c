// Batch normalisation on the CPU: two passes over the images in each direction, sums and then values. All loops run over
// rows of numbers with a coefficient of its own for each column:
//   channels_last   a row is a position, a column a channel. Rows are cut into blocks by the shape alone; threads take runs
//                   of blocks, and the second pass goes backwards, so that what was read last comes from the cache.
//   contiguous      a row is a part of one channel's positions in one image, all columns alike. A thread takes channels, and
//                   has one in its cache for the second pass.
// Sums are taken in float within a block, of differences from a number near the block's values, and in double from block to
// block, in one order whatever the number of threads.

#include "batch_norm/batch_norm.h"

#include <omp.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/half.h"

namespace sabmn {
namespace SABMN_ISA {
namespace {

using std::int64_t;

constexpr int row_group = 4;           // rows that share one reading of coefficients and sums
// Of a block: so few that its sums in float stay exact enough, and so many that they take little beside it.
constexpr int64_t fewest_rows = 64, most_rows = 1024;
constexpr int64_t block_values = 1 << 16;
constexpr int64_t most_images = 64;    // of a part of contiguous images, for the same reason
constexpr int64_t row_values = 1024;   // of a row of contiguous images
constexpr int64_t columns_together = 64;
constexpr int64_t tile_columns = 256;
constexpr int64_t values_per_thread = 1 << 15;  // fewer are done sooner than another thread begins

enum class Mask { none, from_x, from_y };  // from_y: in the first pass; its second one takes what has passed
// y before the ReLU is (x − center)·scale + offset, plus the residual.
struct Affine {
    float *center, *scale, *offset;

    Affine from(int64_t column) const { return {center + column, scale + column, offset + column}; }
};

// The gradient of x is scale·g − constant − (x − center)·slope.
struct Slope {
    float *constant, *slope;

    Slope from(int64_t column) const { return {constant + column, slope + column}; }
};

// Inlined wherever they are called, the loops would take most of the compilation's time.
#define SABMN_ONCE __attribute__((noinline))

void fill(float* values, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i) values[i] = value;
}

// ---- loops over rows of float: `stride` from one row to the next ----

struct Rows {
    float* values;
    int64_t stride;
};

// call(first row, how many: a constant) for groups of rows and for those that are left
template <int n>
struct Group {
    static constexpr int count = n;
};
template <typename Call>
void for_row_groups(int64_t rows, const Call& call) {
    int64_t row = 0;
    for (; row + row_group <= rows; row += row_group) call(row, Group<row_group>());
    for (; row < rows; ++row) call(row, Group<1>());
}

// sum += x − shift, squares += (x − shift)²
SABMN_ONCE void add_moments(Rows x, int64_t rows, int64_t columns, const float* shift, float* sum, float* squares) {
    for_row_groups(rows, [=](int64_t row, auto group) {
        const float* first = x.values + row * x.stride;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            float differences = 0, products = 0;
#pragma GCC unroll 4
            for (int r = 0; r < group.count; ++r) {
                const float difference = first[r * x.stride + i] - shift[i];
                differences += difference, products += difference * difference;
            }
            sum[i] += differences, squares[i] += products;
        }
    });
}

template <bool with_residual>
SABMN_ONCE void write_values(Rows x, Rows residual, Rows y, int64_t rows, int64_t columns, Affine affine, float lowest) {
    for_row_groups(rows, [=](int64_t row, auto group) {
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            const float center = affine.center[i], scale = affine.scale[i], offset = affine.offset[i];
#pragma GCC unroll 4
            for (int64_t r = row; r < row + group.count; ++r) {
                float value = (x.values[r * x.stride + i] - center) * scale + offset;
                if (with_residual) value += residual.values[r * residual.stride + i];
                y.values[r * y.stride + i] = value < lowest ? lowest : value;
            }
        }
    });
}

// What the ReLU lets through of a gradient: where the value was greater than `threshold`, or NaN, as torch's does.
template <Mask mask>
float passed(float gradient, float difference, float scale, float offset, float threshold) {
    if (mask != Mask::from_x) return gradient;
    return difference * scale + offset <= threshold ? 0.0f : gradient;
}

// sum += g, products += g·(x − center), where g is what passes of grad_y; from_y writes it.
template <Mask mask>
SABMN_ONCE void add_gradients(Rows grad_y, Rows x, Rows y, Rows masked, int64_t rows, int64_t columns, Affine affine,
                   float threshold, float* sum, float* products) {
    for_row_groups(rows, [=](int64_t row, auto group) {
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            const float center = affine.center[i], scale = affine.scale[i], offset = affine.offset[i];
            float gradients = 0, weighted = 0;
#pragma GCC unroll 4
            for (int64_t r = row; r < row + group.count; ++r) {
                const float difference = x.values[r * x.stride + i] - center;
                float g = passed<mask>(grad_y.values[r * grad_y.stride + i], difference, scale, offset, threshold);
                if (mask == Mask::from_y) {
                    g = y.values[r * y.stride + i] <= 0 ? 0.0f : g;
                    masked.values[r * masked.stride + i] = g;
                }
                gradients += g, weighted += g * difference;
            }
            sum[i] += gradients, products[i] += weighted;
        }
    });
}

template <Mask mask>
SABMN_ONCE void write_gradients(Rows grad_y, Rows x, Rows grad_x, int64_t rows, int64_t columns, Affine affine, Slope slope,
                     float threshold) {
    for_row_groups(rows, [=](int64_t row, auto group) {
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) {
            const float center = affine.center[i], scale = affine.scale[i], offset = affine.offset[i];
            const float constant = slope.constant[i], steepness = slope.slope[i];
#pragma GCC unroll 4
            for (int64_t r = row; r < row + group.count; ++r) {
                const float difference = x.values[r * x.stride + i] - center;
                const float g = passed<mask>(grad_y.values[r * grad_y.stride + i], difference, scale, offset, threshold);
                grad_x.values[r * grad_x.stride + i] = scale * g - constant - difference * steepness;
            }
        }
    });
}

// ---- the same for rows of any type: 16 bits go through float, a tile at a time ----

// What is not greater rounds to 0: half of the type's smallest number.
float rounds_to_zero(DType dtype) {
    return dtype == DType::bfloat16 ? 0x1p-134f : dtype == DType::float16 ? 0x1p-25f : 0;
}

template <typename T>
SABMN_ONCE void widen_row(const T* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <typename T>
SABMN_ONCE void narrow_row(const float* from, int64_t n, T* to) {
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

#if defined(__F16C__)
void widen_row(const Float16* from, int64_t n, float* to) {
    for (; n >= 8; n -= 8, from += 8, to += 8) {
        _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

void narrow_row(const float* from, int64_t n, Float16* to) {
    for (; n >= 8; n -= 8, from += 8, to += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
    }
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}
#endif

struct Tile {
    alignas(64) float values[row_group * tile_columns];
};

// Rows as they stand in memory. An absent image (null) is neither read nor written.
struct Image {
    char* values;
    int64_t stride;  // in elements
    DType dtype;

    Image(const void* image, int64_t row_stride, DType type)
        : values(static_cast<char*>(const_cast<void*>(image))), stride(row_stride), dtype(type) {}

    Image part(int64_t row, int64_t column) const {
        const int64_t bytes = dtype == DType::float32 ? 4 : 2;
        return {values ? values + (row * stride + column) * bytes : nullptr, stride, dtype};
    }

    // The rows themselves, or their copy in a tile.
    Rows in(int64_t rows, int64_t columns, Tile& tile) const {
        if (dtype == DType::float32) return {reinterpret_cast<float*>(values), stride};
        for (int64_t row = 0; values && row < rows; ++row) {
            const char* from = values + row * stride * 2;
            float* to = tile.values + row * tile_columns;
            if (dtype == DType::bfloat16) widen_row(reinterpret_cast<const BFloat16*>(from), columns, to);
            if (dtype == DType::float16) widen_row(reinterpret_cast<const Float16*>(from), columns, to);
        }
        return {tile.values, tile_columns};
    }

    // Where to write rows; store() puts them in their place.
    Rows out(Tile& tile) const {
        return dtype == DType::float32 ? Rows{reinterpret_cast<float*>(values), stride} : Rows{tile.values, tile_columns};
    }
    void store(int64_t rows, int64_t columns, const Tile& tile) const {
        if (dtype == DType::float32 || !values) return;
        for (int64_t row = 0; row < rows; ++row) {
            const float* from = tile.values + row * tile_columns;
            char* to = values + row * stride * 2;
            if (dtype == DType::bfloat16) narrow_row(from, columns, reinterpret_cast<BFloat16*>(to));
            if (dtype == DType::float16) narrow_row(from, columns, reinterpret_cast<Float16*>(to));
        }
    }
};

// call(row, rows, column, columns) for all tiles: of float there is one.
template <typename Call>
void for_tiles(DType dtype, int64_t rows, int64_t columns, const Call& call) {
    const int64_t height = dtype == DType::float32 ? rows : row_group, width = dtype == DType::float32 ? columns : tile_columns;
    for (int64_t row = 0; row < rows; row += height) {
        for (int64_t column = 0; column < columns; column += width) {
            call(row, rows - row < height ? rows - row : height, column, columns - column < width ? columns - column : width);
        }
    }
}

void add_moments(Image x, int64_t rows, int64_t columns, const float* shift, float* sum, float* squares) {
    for_tiles(x.dtype, rows, columns, [=](int64_t row, int64_t few, int64_t column, int64_t width) {
        Tile tile;
        add_moments(x.part(row, column).in(few, width, tile), few, width, shift + column, sum + column, squares + column);
    });
}

void normalize(Image x, Image residual, Image y, int64_t rows, int64_t columns, Affine affine, bool relu) {
    const float lowest = relu ? 0 : -__builtin_huge_valf();
    const auto write = residual.values ? write_values<true> : write_values<false>;
    for_tiles(x.dtype, rows, columns, [=](int64_t row, int64_t few, int64_t column, int64_t width) {
        Tile tiles[3];
        const Image out = y.part(row, column);
        write(x.part(row, column).in(few, width, tiles[0]), residual.part(row, column).in(few, width, tiles[1]),
              out.out(tiles[2]), few, width, affine.from(column), lowest);
        out.store(few, width, tiles[2]);
    });
}

void add_gradients(Mask mask, Image grad_y, Image x, Image y, Image masked, int64_t rows, int64_t columns, Affine affine,
                   float* sum, float* products) {
    const float threshold = rounds_to_zero(x.dtype);
    const auto add = mask == Mask::from_y   ? add_gradients<Mask::from_y>
                     : mask == Mask::from_x ? add_gradients<Mask::from_x>
                                            : add_gradients<Mask::none>;
    for_tiles(x.dtype, rows, columns, [=](int64_t row, int64_t few, int64_t column, int64_t width) {
        Tile tiles[4];
        const Image out = masked.part(row, column);
        add(grad_y.part(row, column).in(few, width, tiles[0]), x.part(row, column).in(few, width, tiles[1]),
            y.part(row, column).in(few, width, tiles[2]), out.out(tiles[3]), few, width, affine.from(column), threshold,
            sum + column, products + column);
        out.store(few, width, tiles[3]);
    });
}

void write_gradients(Mask mask, Image grad_y, Image x, Image grad_x, int64_t rows, int64_t columns, Affine affine,
                     Slope slope) {
    const float threshold = rounds_to_zero(x.dtype);
    const auto write = mask == Mask::from_x ? write_gradients<Mask::from_x> : write_gradients<Mask::none>;
    for_tiles(x.dtype, rows, columns, [=](int64_t row, int64_t few, int64_t column, int64_t width) {
        Tile tiles[3];
        const Image out = grad_x.part(row, column);
        write(grad_y.part(row, column).in(few, width, tiles[0]), x.part(row, column).in(few, width, tiles[1]),
              out.out(tiles[2]), few, width, affine.from(column), slope.from(column), threshold);
        out.store(few, width, tiles[2]);
    });
}

// ---- channels ----

// Adds `n` values, given the sums of their differences from `shift`, to `count` values of this mean and these squares of
// differences from it (Chan et al., 1979); all for `columns` channels.
template <typename S>
void add_block(double count, double n, int64_t columns, const S* shift, const S* sum, const S* sum_of_squares, double* mean,
               double* squares) {
    const double share = n / (count + n), both = count * share;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
        const double own_sum = static_cast<double>(sum[i]);
        const double own = static_cast<double>(sum_of_squares[i]) - own_sum * own_sum / n;
        const double difference = static_cast<double>(shift[i]) + own_sum / n - mean[i];
        squares[i] += (own < 0 ? 0 : own) + difference * difference * both;
        mean[i] += difference * share;
    }
}

void set_statistics(const BatchNormForward& pass, int64_t channel, double mean, double squares) {
    const BatchNormImages& images = pass.images;
    const double count = static_cast<double>(images.batch * images.positions);
    float* out = pass.statistics + channel;
    out[0] = static_cast<float>(mean);
    out[images.channels] = static_cast<float>(mean - static_cast<double>(out[0]));
    out[2 * images.channels] = static_cast<float>(1 / __builtin_sqrt(squares / count + pass.eps));
    if (pass.running_mean) {
        const auto move = [&](float& value, double to) {
            value = static_cast<float>((1 - pass.momentum) * static_cast<double>(value) + pass.momentum * to);
        };
        move(pass.running_mean[channel], mean);
        move(pass.running_var[channel], squares / (count - 1));
    }
}

template <typename Pass>
void set_affine(const Pass& pass, int64_t channel, Affine out, int64_t i) {
    const float* statistics = pass.statistics + channel;
    const float inverse = statistics[2 * pass.images.channels];
    out.center[i] = statistics[0];
    out.scale[i] = pass.weight ? pass.weight[channel] * inverse : inverse;
    out.offset[i] = (pass.bias ? pass.bias[channel] : 0.0f) - statistics[pass.images.channels] * out.scale[i];
}

// The gradients of weight and bias, and what the gradient of x needs, from the sums of g and of g·(x − center).
void set_gradients(const BatchNormBackward& pass, int64_t channel, double sum, double products, float scale, Slope out,
                   int64_t i) {
    const BatchNormImages& images = pass.images;
    const double rest = static_cast<double>(pass.statistics[images.channels + channel]);
    const double inverse = static_cast<double>(pass.statistics[2 * images.channels + channel]);
    const double count = static_cast<double>(images.batch * images.positions);
    const double weight_gradient = (products - rest * sum) * inverse;
    pass.grad_bias[channel] = static_cast<float>(sum);
    pass.grad_weight[channel] = static_cast<float>(weight_gradient);
    const double slope = static_cast<double>(scale) * inverse * weight_gradient / count;
    out.slope[i] = static_cast<float>(slope);
    out.constant[i] = static_cast<float>(static_cast<double>(scale) * sum / count - rest * slope);
}

// ---- channels_last ----

struct Blocks {
    int64_t rows, columns, block_rows, count;

    explicit Blocks(const BatchNormImages& images) : rows(images.batch * images.positions), columns(images.channels) {
        block_rows = block_values / columns / row_group * row_group;
        block_rows = block_rows < fewest_rows ? fewest_rows : block_rows > most_rows ? most_rows : block_rows;
        count = (rows + block_rows - 1) / block_rows;
    }
    int64_t rows_of(int64_t block) const {
        const int64_t left = rows - block * block_rows;
        return left < block_rows ? left : block_rows;
    }
};

// The arrays of a pass: sums of every block [count, arrays, columns], coefficients [columns].
struct Workspace {
    float *sums, *coefficients;
    int64_t padded;  // columns

    Workspace(const Blocks& blocks, void* memory) : padded((blocks.columns + 15) / 16 * 16) {
        sums = static_cast<float*>(memory);
        coefficients = sums + blocks.count * 3 * padded;
    }
    float* sum(int64_t block, int64_t array) const { return sums + (block * 3 + array) * padded; }
    Affine affine() const { return {coefficients, coefficients + padded, coefficients + 2 * padded}; }
    Slope slope() const { return {coefficients + 3 * padded, coefficients + 4 * padded}; }
    int64_t bytes(const Blocks& blocks) const { return (blocks.count * 3 + 5) * padded * static_cast<int64_t>(sizeof(float)); }
};

// first(block) for all blocks, then finish(first channel, number of channels, …), then second(block).
template <typename First, typename Finish, typename Second>
void two_passes(const Blocks& blocks, int threads, const First& first, const Finish& finish, const Second& second) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t begin = blocks.count * me / all, end = blocks.count * (me + 1) / all;
        for (int64_t block = begin; block < end; ++block) first(block);
#pragma omp barrier
#pragma omp for
        for (int64_t channel = 0; channel < blocks.columns; channel += columns_together) {
            const int64_t left = blocks.columns - channel;
            finish(channel, left < columns_together ? left : columns_together);
        }
        for (int64_t block = end; block-- > begin;) second(block);
    }
}

// The images of a pass, by what they hold.
struct ForwardImages {
    Image x, residual, y;

    ForwardImages(const BatchNormForward& pass, int64_t stride)
        : x(pass.x, stride, pass.images.dtype), residual(pass.residual, stride, pass.images.dtype),
          y(pass.y, stride, pass.images.dtype) {}
};

struct BackwardImages {
    Mask mask;
    Image grad_y, x, y, masked, passed, grad_x;  // passed: what the first pass has left of grad_y

    BackwardImages(const BatchNormBackward& pass, int64_t stride)
        : mask(pass.y ? Mask::from_y : pass.relu ? Mask::from_x : Mask::none),
          grad_y(pass.grad_y, stride, pass.images.dtype), x(pass.x, stride, pass.images.dtype),
          y(pass.y, stride, pass.images.dtype), masked(pass.grad_residual, stride, pass.images.dtype),
          passed(pass.y ? masked : grad_y), grad_x(pass.grad_x, stride, pass.images.dtype) {}
};

void forward_rows(const BatchNormForward& pass, void* memory, int threads) {
    const Blocks blocks(pass.images);
    const Workspace own(blocks, memory);
    const int64_t columns = blocks.columns;
    const Affine affine = own.affine();
    const ForwardImages of(pass, columns);
    two_passes(
        blocks, threads,
        [&](int64_t block) {
            const Image x = of.x.part(block * blocks.block_rows, 0);
            float *shift = own.sum(block, 0), *sum = own.sum(block, 1), *squares = own.sum(block, 2);
            const int64_t rows = blocks.rows_of(block), few = rows < row_group ? rows : row_group;
            fill(shift, columns, 0), fill(sum, columns, 0), fill(squares, columns, 0);
            add_moments(x, few, columns, shift, sum, squares);
            for (int64_t i = 0; i < columns; ++i) shift[i] = sum[i] / static_cast<float>(few);
            fill(sum, columns, 0), fill(squares, columns, 0);
            add_moments(x, rows, columns, shift, sum, squares);
        },
        [&](int64_t channel, int64_t channels) {
            double mean[columns_together] = {}, squares[columns_together] = {};
            for (int64_t block = 0; block < blocks.count; ++block) {
                add_block(static_cast<double>(block * blocks.block_rows), static_cast<double>(blocks.rows_of(block)), channels,
                          own.sum(block, 0) + channel, own.sum(block, 1) + channel, own.sum(block, 2) + channel, mean,
                          squares);
            }
            for (int64_t i = 0; i < channels; ++i) {
                set_statistics(pass, channel + i, mean[i], squares[i]);
                set_affine(pass, channel + i, affine, channel + i);
            }
        },
        [&](int64_t block) {
            const int64_t row = block * blocks.block_rows;
            normalize(of.x.part(row, 0), of.residual.part(row, 0), of.y.part(row, 0), blocks.rows_of(block), columns, affine,
                      pass.relu);
        });
}

void backward_rows(const BatchNormBackward& pass, void* memory, int threads) {
    const Blocks blocks(pass.images);
    const Workspace own(blocks, memory);
    const int64_t columns = blocks.columns;
    const Affine affine = own.affine();
    const Slope slope = own.slope();
    const BackwardImages of(pass, columns);
    for (int64_t channel = 0; channel < columns; ++channel) set_affine(pass, channel, affine, channel);
    two_passes(
        blocks, threads,
        [&](int64_t block) {
            const int64_t row = block * blocks.block_rows;
            float *sum = own.sum(block, 0), *products = own.sum(block, 1);
            fill(sum, columns, 0), fill(products, columns, 0);
            add_gradients(of.mask, of.grad_y.part(row, 0), of.x.part(row, 0), of.y.part(row, 0), of.masked.part(row, 0),
                          blocks.rows_of(block), columns, affine, sum, products);
        },
        [&](int64_t channel, int64_t channels) {
            double sum[columns_together] = {}, products[columns_together] = {};
            for (int64_t block = 0; block < blocks.count; ++block) {
                const float *own_sum = own.sum(block, 0) + channel, *own_products = own.sum(block, 1) + channel;
#pragma omp simd
                for (int64_t i = 0; i < channels; ++i) {
                    sum[i] += static_cast<double>(own_sum[i]), products[i] += static_cast<double>(own_products[i]);
                }
            }
            for (int64_t i = 0; i < channels; ++i) {
                set_gradients(pass, channel + i, sum[i], products[i], affine.scale[channel + i], slope, channel + i);
            }
        },
        [&](int64_t block) {
            const int64_t row = block * blocks.block_rows;
            if (!of.grad_x.values) return;
            write_gradients(of.mask, of.passed.part(row, 0), of.x.part(row, 0), of.grad_x.part(row, 0), blocks.rows_of(block),
                            columns, affine, slope);
        });
}

// ---- contiguous ----

// call(offset, rows, columns) for the parts of one channel: its rows lie channels·positions apart.
template <typename Call>
void for_parts(const BatchNormImages& images, int64_t channel, const Call& call) {
    for (int64_t image = 0; image < images.batch; image += most_images) {
        const int64_t left = images.batch - image, rows = left < most_images ? left : most_images;
        for (int64_t position = 0; position < images.positions; position += row_values) {
            const int64_t more = images.positions - position, columns = more < row_values ? more : row_values;
            call((image * images.channels + channel) * images.positions + position, rows, columns);
        }
    }
}

double total(const float* values, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(values[i]);
    return sum;
}

// A channel's coefficients and sums, once for each column.
struct Columns {
    alignas(64) float coefficients[5][row_values], sums[3][row_values];

    Affine affine() { return {coefficients[0], coefficients[1], coefficients[2]}; }
    Slope slope() { return {coefficients[3], coefficients[4]}; }
    void spread(int first, int end) {
        for (int i = first; i < end; ++i) fill(coefficients[i], row_values, coefficients[i][0]);
    }
};

void forward_planes(const BatchNormForward& pass, int threads) {
    const BatchNormImages& images = pass.images;
    const ForwardImages of(pass, images.channels * images.positions);
#pragma omp parallel for num_threads(threads)
    for (int64_t channel = 0; channel < images.channels; ++channel) {
        Columns own;
        double mean = 0, squares = 0, count = 0;
        float *shifts = own.sums[0], *sums = own.sums[1], *squares_of = own.sums[2];
        for_parts(images, channel, [&](int64_t first, int64_t rows, int64_t columns) {
            const Image x = of.x.part(0, first);
            const int64_t few = columns < 16 ? columns : 16;
            fill(shifts, columns, 0), fill(sums, columns, 0), fill(squares_of, columns, 0);
            add_moments(x, 1, few, shifts, sums, squares_of);
            const double shift = static_cast<double>(static_cast<float>(total(sums, few) / static_cast<double>(few)));
            fill(shifts, columns, static_cast<float>(shift)), fill(sums, few, 0), fill(squares_of, few, 0);
            add_moments(x, rows, columns, shifts, sums, squares_of);
            const double n = static_cast<double>(rows * columns);
            const double sum = total(sums, columns), sum_of_squares = total(squares_of, columns);
            add_block(count, n, 1, &shift, &sum, &sum_of_squares, &mean, &squares);
            count += n;
        });
        set_statistics(pass, channel, mean, squares);
        set_affine(pass, channel, own.affine(), 0);
        own.spread(0, 3);
        for_parts(images, channel, [&](int64_t first, int64_t rows, int64_t columns) {
            normalize(of.x.part(0, first), of.residual.part(0, first), of.y.part(0, first), rows, columns, own.affine(),
                      pass.relu);
        });
    }
}

void backward_planes(const BatchNormBackward& pass, int threads) {
    const BatchNormImages& images = pass.images;
    const BackwardImages of(pass, images.channels * images.positions);
#pragma omp parallel for num_threads(threads)
    for (int64_t channel = 0; channel < images.channels; ++channel) {
        Columns own;
        double sum = 0, products = 0;
        float *sums = own.sums[0], *products_of = own.sums[1];
        set_affine(pass, channel, own.affine(), 0);
        own.spread(0, 3);
        for_parts(images, channel, [&](int64_t first, int64_t rows, int64_t columns) {
            fill(sums, columns, 0), fill(products_of, columns, 0);
            add_gradients(of.mask, of.grad_y.part(0, first), of.x.part(0, first), of.y.part(0, first),
                          of.masked.part(0, first), rows, columns, own.affine(), sums, products_of);
            sum += total(sums, columns), products += total(products_of, columns);
        });
        set_gradients(pass, channel, sum, products, own.affine().scale[0], own.slope(), 0);
        own.spread(3, 5);
        if (!of.grad_x.values) continue;
        for_parts(images, channel, [&](int64_t first, int64_t rows, int64_t columns) {
            write_gradients(of.mask, of.passed.part(0, first), of.x.part(0, first), of.grad_x.part(0, first), rows, columns,
                            own.affine(), own.slope());
        });
    }
}

int useful_threads(const BatchNormImages& images, int threads) {
    const int64_t useful = images.batch * images.channels * images.positions / values_per_thread;
    return useful >= threads ? threads : useful < 1 ? 1 : static_cast<int>(useful);
}

bool is_served(DType dtype) {
    return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

}  // namespace

int64_t batch_norm_workspace(const BatchNormImages& images) {
    if (!images.channels_last) return 0;
    const Blocks blocks(images);
    return Workspace(blocks, nullptr).bytes(blocks);
}

int batch_norm_forward(const BatchNormForward& pass, void* workspace, int threads) {
    if (!is_served(pass.images.dtype)) return unsupported_dtype;
    threads = useful_threads(pass.images, threads);
    if (pass.images.channels_last) {
        forward_rows(pass, workspace, threads);
    } else {
        forward_planes(pass, threads);
    }
    return ok;
}

int batch_norm_backward(const BatchNormBackward& pass, void* workspace, int threads) {
    if (!is_served(pass.images.dtype)) return unsupported_dtype;
    threads = useful_threads(pass.images, threads);
    if (pass.images.channels_last) {
        backward_rows(pass, workspace, threads);
    } else {
        backward_planes(pass, threads);
    }
    return ok;
}

}  // namespace SABMN_ISA
}  // namespace sabmn
