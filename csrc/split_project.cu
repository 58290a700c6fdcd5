// split_project on a GPU: a block per tile, all matrices of the batch in one launch per product.
// The tile is 64 x 32 (64 threads) for r <= 32, the usual rank of an adapter, else 64 x 64 (128).
#include <cuda_runtime.h>

#include "launch.h"
#include "split_project.h"

namespace prolora {
namespace {

// kSplit: the second product (par, perp), else the first (C).
template <class T, int kCols, bool kSplit>
__global__ void __launch_bounds__(CudaTile<T, kCols>::kThreads, CudaTile<T, kCols>::kMinBlocks)
    split_project_kernel(SplitProjectArgs<T> args, TileGrid grid) {
  using Tile = CudaTile<T, kCols>;
  DYNAMIC_SHARED(typename Tile::Shared, shared);
  const Tile tile{*shared};
  const Index matrix = blockIdx.x / grid.per_matrix();
  const Index in_matrix = blockIdx.x % grid.per_matrix();
  // Tiles of the same rows follow each other, so that they share U through the L2 cache.
  const Index row = in_matrix / grid.cols;
  const Index col = in_matrix % grid.cols;
  if (kSplit) {
    split_tile(tile, args, matrix, row, col);
  } else {
    coefficients_tile(tile, args, matrix, row, col);
  }
}

template <class T, int kCols, bool kSplit>
void run(const SplitProjectArgs<T>& args, cudaStream_t stream) {
  using Tile = CudaTile<T, kCols>;
  const TileGrid grid = tile_grid<Tile>(kSplit ? args.m : args.k, args.r);
  const unsigned blocks = grid_size(args.batch * grid.per_matrix(), "split_project");
  if (blocks == 0) return;
  auto kernel = split_project_kernel<T, kCols, kSplit>;
  LAUNCH(kernel, blocks, Tile::kThreads, sizeof(typename Tile::Shared), stream, args, grid);
  check(cudaGetLastError(), "split_project: launch");
}

}  // namespace

template <class T>
void split_project_cuda(const SplitProjectArgs<T>& args, std::uintptr_t stream) {
  if (args.r <= 32) {
    run<T, 32, false>(args, to_stream(stream));
    run<T, 32, true>(args, to_stream(stream));
  } else {
    run<T, 64, false>(args, to_stream(stream));
    run<T, 64, true>(args, to_stream(stream));
  }
}

template void split_project_cuda(const SplitProjectArgs<float>&, std::uintptr_t);
template void split_project_cuda(const SplitProjectArgs<double>&, std::uintptr_t);

}  // namespace prolora
