// A block of a block Krylov iteration with G = W Wᵀ, for a batch. The last `width` rows Q of an
// orthonormal basis K [size, d] are multiplied by G, what K holds of it is taken out, and its
// orthonormal rows become the next ones of K:
//   Z = (Q W) Wᵀ,   C = Z Kᵀ,  Z -= C K,  Z = L Z',  Z' -= (Z' Kᵀ) K,  Z' = L' Q'.
// C are the block's rows of K G Kᵀ; the length of Z says how much the basis lacks. The second pass
// is over rows of length 1: of a row of which little was left the rounding of C K is a large share.
//
// W [d, n] lies in memory as it is stored, in 16 bits, its rows or its columns side by side: a
// product reads half the bytes of a float32 copy, and on tensor cores takes two TF32 products for
// one, since W is exact in TF32 (tensor_tile.h). All else is float32.
//
// Six products of `width` thin rows, each y(j, i) = Σ_p a(p, i) x(j, p) with rows x, y of a few
// and a large matrix a, which is read once; panel_qr, twice, with all else that is small, a block a
// matrix. Eight launches. Where so few tiles would leave a GPU idle, the sums of a product are cut
// into parts, which another kernel adds up in their order, so that results repeat bit by bit.
// Both passes take the whole basis: the last two blocks of it alone in the first one would do where
// no vector has converged yet, but not where some have (σ_i = i^-2).
// Shapes as in KrylovBlockArgs (ops.h). 4 width d n flops for W, 8 width d size for K, and
// panel_qr's; W is read twice (4 d n bytes), K four times (16 size d bytes).
// Bound: `width` flops a byte of W, so memory where tensor cores multiply, and float32 elsewhere.
// 64 x 1280² is 0.42 GB a block: 0.14 ms at 3 TB/s [E: estimated, not measured].
#pragma once

#include <climits>
#include <cmath>
#include <stdexcept>

#include "ops.h"
#include "panel_qr.h"
#include "tile.h"

namespace prolora {

inline void check_krylov_size(const KrylovBlockArgs<float>& args) {
  const Index longest = args.d > args.n ? args.d : args.n;
  if (args.width > kMaxKrylovWidth || longest > kMaxStride || args.width * longest > INT_MAX ||
      args.size > kMaxStride) {
    throw std::invalid_argument(
        "krylov_block: a block of more than 64 rows, or rows of 2^24 numbers");
  }
}

// One of the six products for a batch: y = Σ a x, or y -= Σ a x.
template <class Stored>
struct ThinProduct {
  const Stored* a;
  const float* x;  // [batch, x_batch], rows of `depth`
  float* y;        // [batch, cols, rows]
  Index a_batch, a_stride, x_batch;
  Index rows, cols, depth;
  bool subtract;
};

// Q W.
template <class Stored>
PROLORA_HOST_DEVICE ThinProduct<Stored> product_with_w(const KrylovBlockArgs<float>& args) {
  const float* block = args.rows + (args.size - args.width) * args.d;
  return {static_cast<const Stored*>(args.w),
          block,
          args.images,
          args.d * args.n,
          args.transposed ? args.d : args.n,
          args.room * args.d,
          args.n,
          args.width,
          args.d,
          false};
}

// Its product with Wᵀ.
template <class Stored>
PROLORA_HOST_DEVICE ThinProduct<Stored> product_back(const KrylovBlockArgs<float>& args) {
  return {static_cast<const Stored*>(args.w),
          args.images,
          args.image,
          args.d * args.n,
          args.transposed ? args.d : args.n,
          args.width * args.n,
          args.d,
          args.width,
          args.n,
          false};
}

// What the basis holds of the image.
PROLORA_HOST_DEVICE ThinProduct<float> product_with_basis(const KrylovBlockArgs<float>& args) {
  const Index basis = args.room * args.d;
  return {args.rows,           args.image, args.coefficients, basis,  args.d,
          args.width * args.d, args.size,  args.width,        args.d, false};
}

// The image without that.
PROLORA_HOST_DEVICE ThinProduct<float> rest_of_basis(const KrylovBlockArgs<float>& args) {
  const Index basis = args.room * args.d;
  return {args.rows, args.coefficients, args.image, basis, args.d, args.width * args.size,
          args.d,    args.width,        args.size,  true};
}

// Tile (tile_row, tile_col) of a product of one matrix, over a part of its depth, to `y`: the
// product's own, or the part's.
template <class Operand, class Tile, class Stored>
PROLORA_HOST_DEVICE void thin_product(const Tile& tile, const ThinProduct<Stored>& product,
                                      Index matrix, Index tile_row, Index tile_col,
                                      DepthParts parts, Index part, float* y, bool subtract) {
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const Index first = part * parts.length;
  const Index at =
      Operand::kAlongDepth ? i0 * product.a_stride + first : first * product.a_stride + i0;
  const Operand a{product.a + matrix * product.a_batch + at, product.a_stride,
                  min_index(Tile::kRows, product.rows - i0)};
  const AlongDepth<float> x{product.x + matrix * product.x_batch + j0 * product.depth + first,
                            product.depth, min_index(Tile::kCols, product.cols - j0)};
  float* stage = tile.stage();
  tile.product(a, x, min_index(parts.length, product.depth - first),
               [&](Index i, Index j, float sum) { stage[j * Tile::kStageStride + i] = sum; });
  const Index stride = product.rows;
  float* to = y + j0 * stride + i0;
  tile.each_pack(a.size, x.size, in_packs(to, stride), [&](Index i, Index j, auto sum) {
    using Sum = decltype(sum);
    float* place = to + j * stride + i;
    (subtract ? Sum::load(place) - sum : sum).store(place);
  });
}

// ‖x‖ of the rows x [r, m] of which the squares are in `squares` [r].
PROLORA_HOST_DEVICE double total_length(const double* squares, int r) {
  double sum = 0;
  for (int i = 0; i < r; ++i) sum += squares[i];
  return std::sqrt(sum);
}

// A unit row is dropped if the component in the basis is subtracted and less than this is left: the
// rest consists of rounding errors of the first subtraction.
constexpr double kOutside = 1e-2;

// Orthonormal rows q of the image, which q may replace. A row is zero if at most scale * kDependent
// of it is left (make_block passes a scale for which this is kOutside), and so are all rows of a
// panel that panel_qr gives up.
template <class Block>
PROLORA_HOST_DEVICE void make_rows(const Block& block, const KrylovBlockArgs<float>& args,
                                   Index matrix, double scale, float* q, const PanelWorkspace& w) {
  const int r = int(args.width);
  const int d = int(args.d);
  Index* rank = args.rank + matrix;
  panel_qr(block, args.image + matrix * r * d, scale, q, args.l + matrix * r * r, rank, w, r, d);
  const bool given_up = *rank < 0;
  block.each(given_up ? r * d : 0, [&](int p) { q[p] = 0; });
}

// The next block of the basis, from an image in its place that has rows of length 1.
template <class Block>
PROLORA_HOST_DEVICE void make_block(const Block& block, const KrylovBlockArgs<float>& args,
                                    Index matrix, const PanelWorkspace& w) {
  float* q = args.rows + (matrix * args.room + args.size) * args.d;
  make_rows(block, args, matrix, kOutside / kDependent, q, w);
}

// The projection's rows, the length of the image, and rows of length 1 of it in its place, for a
// matrix. Where little was left of a row, the rounding of the rest leans on the basis: so what the
// basis holds of these rows is taken out once more before the block is made.
template <class Block>
PROLORA_HOST_DEVICE void normalise_image(const Block& block, const KrylovBlockArgs<float>& args,
                                         Index matrix, const PanelWorkspace& w) {
  const int r = int(args.width);
  const int d = int(args.d);
  const int size = int(args.size);
  float* image = args.image + matrix * r * d;
  const float* coefficients = args.coefficients + matrix * r * size;
  float* projected = args.projected + (matrix * args.room + size - r) * args.room;
  double* of_image = args.lengths + matrix * 2 * r;
  double* of_column = of_image + r;
  auto square = [](float x) { return double(x) * double(x); };
  block.each_warp(r, [&](const auto& warp, int i) {
    float* row = projected + i * args.room;
    const double image_square =
        warp.template sum<double>(d, [&](int p) { return square(image[i * d + p]); });
    const double column_square = warp.template sum<double>(size, [&](int p) {
      row[p] = coefficients[i * size + p];
      return square(row[p]);
    });
    warp.each(1, [&](int) {
      of_image[i] = image_square;
      of_column[i] = column_square;
    });
  });
  block.each(1, [&](int) { args.length[matrix] = total_length(of_image, r); });
  if (size + r > args.room) return;  // the basis is full
  make_rows(block, args, matrix, total_length(of_column, r), image, w);
}

}  // namespace prolora
