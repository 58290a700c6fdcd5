// The overlaps of nested subspaces, for groups of different shapes in one call. For every pair of
// matrices, with C = Usᵀ Ut [ks, kt] cut into blocks of 64 x 64:
//   table[I, J]  = Σ C²  over block (I, J)
//   shells[k]    = Σ C²  over max(i, j) = k,   k < min(ks, kt)
// Columns are sorted by singular value, so the leading a of Us and b of Ut share Σ C² over i < a,
// j < b: a prefix sum of the table for multiples of 64, of the shells for every a = b.
//
// us [batch, m, ks], ut [batch, m, kt], row-major, T float or double; sums in double. Products of
// float32 are accurate to float32 whichever tile makes them (tensor_tile.h).
//
// A block of C takes 2 m flops an entry, is kept in shared memory (or the cache) for the 64 sums
// along its edge, and is never written: per block 65 numbers leave. A block's edge is what it adds
// to the shells: its columns right of the diagonal, its rows below it, on the diagonal the shells
// themselves. A second, tiny step adds the edges of all blocks of a strip in a fixed
// order, so that results repeat bit by bit. Two launches. Traffic: every block reads two strips of
// 64 m numbers, 16 flops a byte in float32, most of it from the L2 cache: 4 m (ks + kt) bytes come
// from memory for 2 m ks kt flops. Bound: the products.
#pragma once

#include "ops.h"
#include "tile.h"

namespace prolora {

// Which matrix pair and block a number of blocks counted over all groups is.
struct OverlapPlace {
  Index group, matrix, row, col;
};

template <class T>
HOST_DEVICE Index last_group_from(const OverlapTableArgs<T>& args, Index number,
                                  Index OverlapGroup<T>::* first) {
  Index low = 0;
  for (Index high = args.count; high - low > 1;) {
    const Index middle = (low + high) / 2;
    if (args.groups[middle].*first <= number) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
HOST_DEVICE OverlapPlace overlap_place(const OverlapTableArgs<T>& args, Index block) {
  const Index g = last_group_from(args, block, &OverlapGroup<T>::first_block);
  const OverlapGroup<T>& group = args.groups[g];
  const Index cols = ceil_div(group.kt, kOverlapBlock);
  const Index per_matrix = ceil_div(group.ks, kOverlapBlock) * cols;
  // Not by `divide`: for sm_80 the compiler keeps more alive then, and spills.
  const Index in_group = block - group.first_block;
  const Index in_matrix = in_group % per_matrix;
  return {g, in_group / per_matrix, in_matrix / cols, in_matrix % cols};
}

// Number t of the edge of a block c of [rows, cols] entries.
template <class T>
HOST_DEVICE double edge_sum(const T* c, Index stride, Index rows, Index cols, Index row, Index col,
                            Index t) {
  double sum = 0;
  if (row <= col && t < cols) {
    const Index end = row == col ? smaller(t + 1, rows) : rows;
    for (Index i = 0; i < end; ++i) sum += double(c[i * stride + t]) * double(c[i * stride + t]);
  }
  if (row >= col && t < rows) {
    const Index end = row == col ? smaller(t, cols) : cols;
    for (Index j = 0; j < end; ++j) sum += double(c[t * stride + j]) * double(c[t * stride + j]);
  }
  return sum;
}

// Block (place.row, place.col) of C for one pair into c[i * stride + j].
template <class Tile, class T>
HOST_DEVICE void overlap_product(const Tile& tile, const OverlapGroup<T>& group,
                                 const OverlapPlace& place, T* c, Index stride) {
  const Index i0 = place.row * kOverlapBlock;
  const Index j0 = place.col * kOverlapBlock;
  const AlongTile<T> us{group.us + place.matrix * group.m * group.ks + i0, group.ks,
                        smaller(kOverlapBlock, group.ks - i0)};
  const Index cols = smaller(kOverlapBlock, group.kt - j0);
  for (Index j = 0; j < cols; j += Tile::kCols) {
    const AlongTile<T> ut{group.ut + place.matrix * group.m * group.kt + j0 + j, group.kt,
                          smaller(Tile::kCols, cols - j)};
    tile.product(us, ut, group.m, [&](Index i, Index jj, T sum) { c[i * stride + j + jj] = sum; });
  }
}

// Shell k of one pair, from the edges of its blocks [rows, cols, 64].
HOST_DEVICE double shell_sum(const double* edges, Index cols, Index k) {
  const auto [strip, t] = divide(k, kOverlapBlock);
  double sum = 0;
  for (Index i = 0; i < strip; ++i) sum += edges[(i * cols + strip) * kOverlapBlock + t];
  for (Index j = 0; j <= strip; ++j) sum += edges[(strip * cols + j) * kOverlapBlock + t];
  return sum;
}

}  // namespace prolora
