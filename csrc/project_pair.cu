// project_pair on a GPU: a block per tile, all matrices of the batch in one launch per product,
// eight products. The tile is 64 x 32 (64 threads) for 32 rows or fewer, else 64 x 64 (128).
#include <cuda_runtime.h>

#include "launch.h"
#include "project_pair.h"

namespace prolora {
namespace {

// A kernel per step: with the step known, what the others would need takes no registers.
template <class T, int kCols, ProjectStep kStep, bool kApply>
__global__ void __launch_bounds__(CudaTile<T, kCols>::kThreads, CudaTile<T, kCols>::kMinBlocks)
    project_pair_kernel(ProjectPairArgs<T> args, TileGrid grid) {
  using Tile = CudaTile<T, kCols>;
  DYNAMIC_SHARED(typename Tile::Shared, shared);
  const Tile tile{*shared};
  const Index matrix = blockIdx.x / grid.per_matrix();
  const Index in_matrix = blockIdx.x % grid.per_matrix();
  // Tiles of the same rows follow each other, so that they share U through the L2 cache.
  const Index row = in_matrix / grid.cols;
  const Index col = in_matrix % grid.cols;
  if (kApply) {
    project_apply(tile, args, kStep, matrix, row, col);
  } else {
    project_coefficients(tile, args, kStep, matrix, row, col);
  }
}

template <class T, int kCols, ProjectStep kStep, bool kApply>
void run(const ProjectPairArgs<T>& args, const ProjectRows<T>& rows, cudaStream_t stream) {
  using Tile = CudaTile<T, kCols>;
  const TileGrid grid = tile_grid<Tile>(kApply ? args.m : rows.k, rows.rows);
  const unsigned blocks = grid_size(args.batch * grid.per_matrix(), "project_pair");
  if (blocks == 0) return;
  auto kernel = project_pair_kernel<T, kCols, kStep, kApply>;
  LAUNCH(kernel, blocks, Tile::kThreads, sizeof(typename Tile::Shared), stream, args, grid);
  check(cudaGetLastError(), "project_pair: launch");
}

template <ProjectStep kStep, class T>
void run_step(const ProjectPairArgs<T>& args, cudaStream_t stream) {
  const ProjectRows<T> rows = project_rows(args, kStep);
  if (rows.rows <= 32) {
    run<T, 32, kStep, false>(args, rows, stream);
    run<T, 32, kStep, true>(args, rows, stream);
  } else {
    run<T, 64, kStep, false>(args, rows, stream);
    run<T, 64, kStep, true>(args, rows, stream);
  }
}

}  // namespace

template <class T>
void project_pair_cuda(const ProjectPairArgs<T>& args, std::uintptr_t stream) {
  run_step<ProjectStep::kSplit>(args, to_stream(stream));
  run_step<ProjectStep::kSplitAgain>(args, to_stream(stream));
  run_step<ProjectStep::kMove>(args, to_stream(stream));
  run_step<ProjectStep::kMoveAgain>(args, to_stream(stream));
}

PROLORA_INSTANTIATE_CUDA(project_pair, ProjectPairArgs)

}  // namespace prolora
