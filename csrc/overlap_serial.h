// What overlap_table does on the CPU once a block of C is there. Included by cpu.cpp and
// overlap_amx.cpp, so once per instruction set; the unnamed namespace keeps the builds apart.
#pragma once

#include "overlap_table.h"

namespace prolora {
namespace {

// The edge of a block and its sum: edge_sum for every t at once, along the rows, where neighbours
// lie side by side.
template <class T>
double edge_sums(const T* c, Index stride, Index rows, Index cols, Index row, Index col,
                 double* edge) {
  constexpr Index kSize = kOverlapBlock;
  double sums[kSize] = {};
  if (row < col && cols == kSize) {
    for (Index i = 0; i < rows; ++i) {
      for (Index t = 0; t < kSize; ++t) {
        const double x = c[i * stride + t];
        sums[t] += x * x;
      }
    }
  } else if (row > col && cols == kSize) {
    constexpr Index kLanes = 8;
    for (Index t = 0; t < rows; ++t) {
      double partial[kLanes] = {};
      for (Index j = 0; j < kSize; j += kLanes) {
        for (Index l = 0; l < kLanes; ++l) {
          const double x = c[t * stride + j + l];
          partial[l] += x * x;
        }
      }
      for (Index l = 0; l < kLanes; ++l) sums[t] += partial[l];
    }
  } else {
    for (Index t = 0; t < kSize; ++t) sums[t] = edge_sum(c, stride, rows, cols, row, col, t);
  }
  double total = 0;
  for (Index t = 0; t < kSize; ++t) {
    edge[t] = sums[t];
    total += sums[t];
  }
  return total;
}

// Block (row, col) of matrix pair `matrix` has been made: its 65 numbers.
template <class T>
void finish_block(const OverlapTableArgs<T>& args, const OverlapGroup<T>& group, Index matrix,
                  Index row, Index col, const T* c, Index stride) {
  const Index all_cols = ceil_div(group.kt, kOverlapBlock);
  const Index per_matrix = ceil_div(group.ks, kOverlapBlock) * all_cols;
  const Index block = group.first_block + matrix * per_matrix + row * all_cols + col;
  const Index rows = smaller(kOverlapBlock, group.ks - row * kOverlapBlock);
  const Index cols = smaller(kOverlapBlock, group.kt - col * kOverlapBlock);
  args.table[block] =
      edge_sums(c, stride, rows, cols, row, col, args.edges + block * kOverlapBlock);
}

// The shells of all pairs, once every block is finished.
template <class T>
void add_shells(const OverlapTableArgs<T>& args) {
  for (Index g = 0; g < args.count; ++g) {
    const OverlapGroup<T>& group = args.groups[g];
    const Index fewest = smaller(group.ks, group.kt);
    const Index cols = ceil_div(group.kt, kOverlapBlock);
    const Index per_matrix = ceil_div(group.ks, kOverlapBlock) * cols;
#pragma omp parallel for schedule(static) if (group.batch * fewest > 65536)
    for (Index matrix = 0; matrix < group.batch; ++matrix) {
      const double* edges = args.edges + (group.first_block + matrix * per_matrix) * kOverlapBlock;
      double* shells = args.shells + group.first_shell + matrix * fewest;
      for (Index k = 0; k < fewest; ++k) shells[k] = shell_sum(edges, cols, k);
    }
  }
}

}  // namespace
}  // namespace prolora
