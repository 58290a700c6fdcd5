// What subspaces share, for groups of different shapes in one call: Σ C² for every pair of
// matrices, C = Usᵀ Ut [ks, kt], as sums over blocks of 64 x 64, which the caller adds up in their
// order, so that results repeat bit by bit.
//
// us [batch, m, ks], ut [batch, m, kt], row-major, T float or double; sums in double. Products of
// float32 are accurate to float32 whichever tile makes them (tensor_tile.h).
//
// A block of C takes 2 m flops an entry, is kept in shared memory (or the cache), and is never
// written. One launch. Traffic: every block reads two strips of 64 m numbers, 16 flops a byte in
// float32, most of it from the L2 cache: 4 m (ks + kt) bytes come from memory for 2 m ks kt flops.
// Bound: the products.
#pragma once

#include "ops.h"
#include "tile.h"

namespace prolora {

// Which matrix pair and block a number of blocks counted over all groups is.
struct OverlapPlace {
  Index group, matrix, row, col;
};

template <class T>
PROLORA_HOST_DEVICE OverlapPlace overlap_place(const SubspaceOverlapArgs<T>& args, Index block) {
  Index low = 0;
  for (Index high = args.count; high - low > 1;) {
    const Index middle = (low + high) / 2;
    (args.groups[middle].first_block <= block ? low : high) = middle;
  }
  const OverlapGroup<T>& group = args.groups[low];
  const Index cols = ceil_div(group.kt, kOverlapBlock);
  const Index per_matrix = ceil_div(group.ks, kOverlapBlock) * cols;
  // Not by `divide`: for sm_80 the compiler keeps more alive then, and spills.
  const Index in_group = block - group.first_block;
  const Index in_matrix = in_group % per_matrix;
  return {low, in_group / per_matrix, in_matrix / cols, in_matrix % cols};
}

// Block (place.row, place.col) of C for one pair into c[i * stride + j].
template <class Tile, class T>
PROLORA_HOST_DEVICE void overlap_product(const Tile& tile, const OverlapGroup<T>& group,
                                         const OverlapPlace& place, T* c, Index stride) {
  const Index i0 = place.row * kOverlapBlock;
  const Index j0 = place.col * kOverlapBlock;
  const AlongTile<T> us{group.us + place.matrix * group.m * group.ks + i0, group.ks,
                        min_index(kOverlapBlock, group.ks - i0)};
  const Index cols = min_index(kOverlapBlock, group.kt - j0);
  for (Index j = 0; j < cols; j += Tile::kCols) {
    const AlongTile<T> ut{group.ut + place.matrix * group.m * group.kt + j0 + j, group.kt,
                          min_index(Tile::kCols, cols - j)};
    tile.product(us, ut, group.m, [&](Index i, Index jj, T sum) { c[i * stride + j + jj] = sum; });
  }
}

// Σ C² of a block's row.
template <class T>
PROLORA_HOST_DEVICE double row_square(const T* c, Index cols) {
  double sum = 0;
  for (Index j = 0; j < cols; ++j) sum += double(c[j]) * double(c[j]);
  return sum;
}

}  // namespace prolora
