// Products as if in float64 from 8-bit integers, which tensor cores multiply without rounding:
//   C(i, j) = Σ_p x(i, p) y(j, p),   or Σ_p x(i, p) x(j, p),   for a batch.
//
// A row becomes integers of 47 bits and a power of two: x(p) = q(p) 2^(e-46), |x| <= 2^e, and these
// six digits q = Σ_s d_s 256^(5-s), -128 <= d_s < 128 (Ozaki, Ogita, Oishi, Rump 2012; with
// integers Ootomo, Ozaki, Yokota 2024). Digits s and t of two rows give a product of weight
// 256^(10-s-t). Of the 36 the 21 with s + t <= 5 are taken, and the one of s = t = 3, whose sum in
// x xᵀ is one of squares and cancels nothing; sums of the same weight share an int32. So the result
// is the same bit by bit on every device, and in the emulator.
//
// Error a term: 2^-47 of the power of either row times the other number, by rounding; and by the
// products left out, of both powers, 4.1 2^-46 at most. So 5 2^-46 of both powers in all: little
// beside the lengths of rows of like numbers, and much beside those of rows with one large number
// and many small ones. The Python side reports it, and bounds take it in.
//
// x [rows, depth], y [cols, depth], row-major, of 16, 32 or 64 bits; C [rows, cols], float64.
// Launches: digits of x, of y, products. 44 rows cols depth integer flops (half of it where y is
// x: tiles above the diagonal are mirrored), 5 float64 ones a result.
// Traffic: the operands, 6 bytes a number out and once more in, 8 a result.
// Bound: integer tensor cores. 64 x 1280² times itself is 1.9e12 + 1.9e12/20 integer flops: 14 ms
// at half of a RTX 4090's 660e12/s [E: estimated, not measured], where float64 takes 130 ms.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "ops.h"
#include "tile.h"

namespace prolora {

constexpr int kDigits = 6;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();
// Digits of a row lie in steps of so many bytes, the last ones 0.
constexpr Index kDigitStep = 32;
// Six products of two digits a number fit in an int32.
static_assert(6 * 128 * 128 * kMaxPreciseDepth <= std::numeric_limits<std::int32_t>::max());

// The digits of up to a tile of rows of one matrix.
struct DigitRows {
  const std::int8_t* data;  // digit s of row i, number p at s * step + i * pitch + p
  Index step, pitch;
  Index size;  // rows
};

// Rows of an operand, all matrices' together, and where their digits go.
template <class Stored>
struct RowsToSplit {
  const Stored* from;  // [count, depth]
  std::int8_t* digits;
  double* scales;  // [count], of what the digits give
  Index count, depth, pitch, step;
};

inline void check_precise_size(const PreciseProductArgs<float>& args) {
  if (args.pitch > kMaxPreciseDepth || args.pitch % kDigitStep != 0 || args.pitch < args.depth) {
    throw std::invalid_argument("precise_product: takes sums of up to 21824 numbers");
  }
}

PROLORA_HOST_DEVICE Index digit_step(const PreciseProductArgs<float>& args) {
  return args.batch * (args.rows + (args.y ? args.cols : 0)) * args.pitch;
}

template <class Stored>
PROLORA_HOST_DEVICE RowsToSplit<Stored> rows_of_x(const PreciseProductArgs<float>& args) {
  return {static_cast<const Stored*>(args.x),
          args.digits,
          args.scales,
          args.batch * args.rows,
          args.depth,
          args.pitch,
          digit_step(args)};
}

template <class Stored>
PROLORA_HOST_DEVICE RowsToSplit<Stored> rows_of_y(const PreciseProductArgs<float>& args) {
  const Index before = args.batch * args.rows;
  return {static_cast<const Stored*>(args.y),
          args.digits + before * args.pitch,
          args.scales + before,
          args.batch * args.cols,
          args.depth,
          args.pitch,
          digit_step(args)};
}

// f with the rows as they are stored.
template <class F>
void as_stored(Index stored, F f) {
  switch (StoredAs(stored)) {
    case StoredAs::kFloat16:
      return f(Half{});
    case StoredAs::kBfloat16:
      return f(Bfloat{});
    case StoredAs::kFloat32:
      return f(float{});
    default:
      return f(double{});
  }
}

// The digits of a row and its scale, by a warp. NaN and Inf make the scale NaN.
template <class Warp, class Stored>
PROLORA_HOST_DEVICE void split_row(const Warp& warp, const RowsToSplit<Stored>& rows, Index row) {
  const Stored* x = rows.from + row * rows.depth;
  const int depth = int(rows.depth);
  const double largest = warp.template max<double>(depth, [&](int p) {
    const double size = fabs(double(value_of(x[p])));
    return size < kInfinity ? size : kInfinity;
  });
  int exponent = 0;
  frexp(largest < kInfinity ? largest : 0.0, &exponent);
  exponent = exponent < -960 ? -960 : exponent;  // what is smaller has no square
  const double unit = ldexp(1.0, 46 - exponent);
  std::int8_t* to = rows.digits + row * rows.pitch;
  warp.each(int(rows.pitch) / 4, [&](int word) {
    // With 128 more a digit no digit borrows from the one before.
    constexpr std::uint64_t kBias = 0x808080808080u;
    std::uint64_t biased[4];
    PROLORA_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int p = 4 * word + n;
      const double scaled = p < depth && largest < kInfinity ? double(value_of(x[p])) * unit : 0.0;
      biased[n] = std::uint64_t(llrint(scaled)) + kBias;
    }
    PROLORA_UNROLL
    for (int s = 0; s < kDigits; ++s) {
      std::uint32_t packed = 0;
      PROLORA_UNROLL
      for (int n = 0; n < 4; ++n) {
        packed |= std::uint32_t(biased[n] >> 8 * (kDigits - 1 - s) & 0xffu) << 8 * n;
      }
      packed ^= 0x80808080u;
      *reinterpret_cast<std::uint32_t*>(to + s * rows.step + 4 * word) = packed;
    }
  });
  warp.each(1, [&](int) {
    rows.scales[row] = largest < kInfinity ? ldexp(1.0, exponent - 26) : kNoNumber;
  });
}

// Σ_g sums[g] 256^(5-g) of the sums by weight; what has a fraction is rounded, and the whole.
template <class Sums>
PROLORA_HOST_DEVICE double weigh_sums(const Sums& sums) {
  const auto join = [&](int first) {
    return (std::int64_t(sums(first)) * 256 + sums(first + 1)) * 256 + sums(first + 2);
  };
  return double(join(0)) * 16777216.0 + (double(join(3)) + double(sums(kDigits)) / 256);
}

// Tile (tile_row, tile_col) of C of one matrix; where y is x, its mirror image too.
template <class Tile>
PROLORA_HOST_DEVICE void precise_product(const Tile& tile, const PreciseProductArgs<float>& args,
                                         Index matrix, Index tile_row, Index tile_col) {
  const bool with_itself = args.y == nullptr;
  if (with_itself && tile_col > tile_row) return;
  const Index step = digit_step(args);
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const Index row = matrix * args.rows + i0;
  const Index col = (with_itself ? 0 : args.batch * args.rows) + matrix * args.cols + j0;
  const DigitRows x{args.digits + row * args.pitch, step, args.pitch,
                    min_index(Tile::kRows, args.rows - i0)};
  const DigitRows y{args.digits + col * args.pitch, step, args.pitch,
                    min_index(Tile::kCols, args.cols - j0)};
  double* to = args.product + matrix * args.rows * args.cols;
  tile.product(x, y, [&](int i, int j, double sum) {
    const double value = sum * args.scales[row + i] * args.scales[col + j];
    to[(i0 + i) * args.cols + j0 + j] = value;
    if (with_itself) to[(j0 + j) * args.cols + i0 + i] = value;
  });
}

}  // namespace prolora
