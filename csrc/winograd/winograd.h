// Winograd's F(2×2, 3×3): a 3×3 convolution of stride 1 and padding 1 by 16 matrix products that need 4/9 of the direct
// one's multiplications (Winograd, 1980; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016).
//   y = Aᵀ [ (G w Gᵀ) ⊙ (Bᵀ d B) ] A
// for each tile of 2×2 positions of y, where d is the 4×4 ones of x around it. Here are the transforms and their adjoints,
// which the gradients need; the products, one for each of the 16 elements of a tile, are those of csrc/products.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace sabmn {

// What becomes of images in order to or after the products. Planes are float [16, tiles, channels].
enum class WinogradTransform : int {
    input = 0,            // x [batch, height, width, channels] → planes, Bᵀ d B
    input_gradient = 1,   // planes → the gradient of x
    output = 2,           // planes → y, Aᵀ m A
    output_gradient = 3,  // the gradient of y → planes
    weight = 4,           // w [batch, 3, 3, channels] → planes, G w Gᵀ; a tile for each image
    weight_gradient = 5,  // planes → the gradient of w
};

// Dense images [batch, height, width, channels]; a tile is 2×2 positions of an image, fewer in an odd last row or column.
struct WinogradImages {
    DType dtype;  // float32 or bfloat16
    std::int64_t batch, height, width, channels;
};

SABMN_FOR_EACH_ISA(int winograd(WinogradTransform transform, const WinogradImages& shape, void* images, float* planes,
                                int threads);)

}  // namespace sabmn
