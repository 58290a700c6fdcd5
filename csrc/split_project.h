// Splits X into its part inside the span of U and the rest, for a batch:
//   C = Uᵀ X,   par = U C,   perp = X - par.
//
// u [m, k] orthonormal columns, x [m, r], c [k, r], par and perp [m, r]; all row-major.
//
// Two products, since C needs all of U before the first row of par can be known:
//   coefficients  a tile of C, summed over m;
//   split         a tile of par, summed over k, which leaves as par and X - par together.
// 4 m k r flops. Traffic per matrix, with r within one tile: U twice, X twice, C once each way, par
// and perp once. torch.bmm + subtract adds one write and two reads of [m, r].
// U is *not* formed into a projector: U Uᵀ would have m² entries.
#pragma once

#include "ops.h"
#include "tile.h"

namespace prolora {

// Tile (tile_row, tile_col) of C = Uᵀ X for one matrix.
template <class Tile, class T>
HOST_DEVICE void coefficients_tile(const Tile& tile, const SplitProjectArgs<T>& args, Index matrix,
                                   Index tile_row, Index tile_col) {
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const AlongTile<T> u{args.u + matrix * args.m * args.k + i0, args.k,
                       smaller(Tile::kRows, args.k - i0)};
  const AlongTile<T> x{args.x + matrix * args.m * args.r + j0, args.r,
                       smaller(Tile::kCols, args.r - j0)};
  T* c = args.coefficients + (matrix * args.k + i0) * args.r + j0;
  const Index r = args.r;
  tile.product(u, x, args.m, [&](Index i, Index j, T sum) { c[i * r + j] = sum; });
}

// Tile (tile_row, tile_col) of par = U C and of perp = X - par for one matrix.
template <class Tile, class T>
HOST_DEVICE void split_tile(const Tile& tile, const SplitProjectArgs<T>& args, Index matrix,
                            Index tile_row, Index tile_col) {
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const AlongDepth<T> u{args.u + (matrix * args.m + i0) * args.k, args.k,
                        smaller(Tile::kRows, args.m - i0)};
  const AlongTile<T> c{args.coefficients + matrix * args.k * args.r + j0, args.r,
                       smaller(Tile::kCols, args.r - j0)};
  const Index offset = (matrix * args.m + i0) * args.r + j0;
  const Index r = args.r;
  const T* x = args.x + offset;
  T* par = args.par + offset;
  T* perp = args.perp + offset;
  tile.product(u, c, args.k, [&](Index i, Index j, T sum) {
    par[i * r + j] = sum;
    perp[i * r + j] = x[i * r + j] - sum;
  });
}

}  // namespace prolora
