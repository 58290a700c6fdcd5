// How much two subspaces share, for a batch: out = ‖Usᵀ Ut‖_F², the sum of the squared cosines of
// their principal angles.
//
// us [m, ks], ut [m, kt], row-major; out is double whatever the inputs are.
//
// A tile of the ks x kt product lives in registers, is squared and added up in double, and leaves
// as one number; the product itself is never written. 2 m ks kt flops; every tile reads its two
// strips of m rows. The tiles' numbers are added in a second, tiny step in a fixed order, not by
// atomics, so that the result repeats bit by bit.
#pragma once

#include "ops.h"
#include "tile.h"

namespace prolora {

// The share of tile (tile_row, tile_col) of one matrix, known to the first thread.
template <class Tile, class T>
HOST_DEVICE double overlap_tile(const Tile& tile, const OverlapArgs<T>& args, Index matrix,
                                Index tile_row, Index tile_col) {
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const AlongTile<T> us{args.us + matrix * args.m * args.ks + i0, args.ks,
                        smaller(Tile::kRows, args.ks - i0)};
  const AlongTile<T> ut{args.ut + matrix * args.m * args.kt + j0, args.kt,
                        smaller(Tile::kCols, args.kt - j0)};
  double squares = 0;
  tile.product(us, ut, args.m, [&](Index, Index, T sum) { squares += double(sum) * double(sum); });
  return tile.total(squares);
}

}  // namespace prolora
