// project_pair on a GPU, in float32 on tensor cores: float64, and float32 without fast TF32, are
// left to torch, so that there are no kernels for them. A block per tile and part of its depth, all
// matrices of the batch in one launch per product. The tile is 64 x 32 (64 threads) for 32 rows or
// fewer, else 64 x 64 (128). Where C has so few tiles that they would not fill the GPU, the parts'
// sums go to scratch and are added up in their order by another kernel, so that results repeat bit
// by bit. C Uᵀ has a tile per 64 of m, and is not cut.
#include <cuda_runtime.h>

#include "choose_tile.h"
#include "launch.h"
#include "project_pair.h"

namespace prolora {
namespace {

constexpr int kThreads = 128;  // of the kernels without a tile

// Whether a block has anything to do. For all threads of it.
template <class T>
__device__ __forceinline__ bool takes_part(const ProjectRows<T>& rows, const Index* cancelled,
                                           Index matrix) {
  if (rows.had == nullptr) return true;
  bool any = false;
  for (int row = threadIdx.x; row < rows.rows; row += int(blockDim.x)) {
    any |= cancelled[matrix * rows.rows + row] != 0;
  }
  return __syncthreads_or(any) != 0;
}

// cancelled [batch, rows], a warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cancelled_kernel(ProjectRows<T> rows, Index batch, Index* cancelled) {
  const Index row = Index(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= batch * rows.rows) return;
  const auto [matrix, in_matrix] = divide(row, rows.rows);
  const bool is = row_cancelled(CudaWarp{}, rows, matrix, in_matrix);
  if (threadIdx.x % 32 == 0) cancelled[row] = is;
}

// Blocks count tiles, parts and matrices, from the fastest to the slowest.
struct CoefficientGrid {
  TileGrid tiles;
  DepthParts parts;
  Index batch;
  Index blocks() const { return batch * parts.count * tiles.per_matrix(); }
};

// to [parts, batch, rows, k]
template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    coefficients_kernel(ProjectRows<T> rows, const Index* cancelled, CoefficientGrid grid, T* to) {
  PROLORA_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const auto [other, tile] = divide(blockIdx.x, grid.tiles.per_matrix());
  const auto [matrix, part] = divide(other, grid.parts.count);
  if (!takes_part(rows, cancelled, matrix)) return;
  if constexpr (Tile::kCompiled) {
    // Tiles of the same rows follow each other, so that they share U through the L2 cache.
    const auto [row, col] = divide(tile, grid.tiles.cols);
    project_coefficients(Tile{*shared}, rows, matrix, row, col, grid.parts, part,
                         to + (part * grid.batch + matrix) * rows.rows * rows.k);
  }
}

// c [batch, rows, k] from parts of it, a block a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(ProjectRows<T> rows, const Index* cancelled, CoefficientGrid grid,
                     const T* __restrict__ parts, T* __restrict__ c) {
  const Index row = blockIdx.x;
  if (!takes_part(rows, cancelled, divide(row, rows.rows).quotient)) return;
  const Index size = grid.batch * rows.rows * rows.k;
  for (Index i = row * rows.k + threadIdx.x; i < (row + 1) * rows.k; i += kThreads) {
    T sum = 0;
    for (Index part = 0; part < grid.parts.count; ++part) sum += parts[part * size + i];
    c[i] = sum;
  }
}

// A kernel per step: with the step known, what the others would need takes no registers.
template <class Tile, ProjectStep kStep, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    apply_kernel(ProjectPairArgs<T> args, TileGrid grid) {
  PROLORA_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const auto [matrix, in_matrix] = divide(blockIdx.x, grid.per_matrix());
  if (!takes_part(project_rows(args, kStep), args.cancelled, matrix)) return;
  if constexpr (Tile::kCompiled) {
    const auto [row, col] = divide(in_matrix, grid.cols);
    project_apply(Tile{*shared}, args, kStep, matrix, row, col);
  }
}

void check_launch() { check(cudaGetLastError(), "project_pair: launch"); }

// f(TileType<Tile>{}) with the tile for so many rows.
template <class F>
void on_tile(Index rows, F f) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, "project_pair") < 8) {
    throw std::runtime_error("project_pair: this GPU's tensor cores have no TF32");
  }
  rows <= 32 ? f(TileType<TensorTile<32>>{}) : f(TileType<TensorTile<64>>{});
}

template <class Tile, class T>
CoefficientGrid coefficient_grid(const ProjectRows<T>& rows, Index batch) {
  constexpr int kThreadsWanted = 256;  // per multiprocessor
  const Index processors = device_attribute(cudaDevAttrMultiProcessorCount, "project_pair");
  const TileGrid tiles = tile_grid<Tile>(rows.k, rows.rows);
  const Index blocks = processors * kThreadsWanted / Tile::kThreads;
  return {tiles, depth_parts(batch * tiles.per_matrix(), rows.m, blocks), batch};
}

// Numbers that C takes at most, before its parts.
template <class T>
Index coefficient_room(const ProjectPairArgs<T>& args) {
  return args.batch * 2 * args.r * max_index(args.ks, args.kt);
}

template <class Tile, class T>
void run_coefficients(const ProjectPairArgs<T>& args, const ProjectRows<T>& rows,
                      cudaStream_t stream) {
  const CoefficientGrid grid = coefficient_grid<Tile>(rows, args.batch);
  const unsigned blocks = grid_size(grid.blocks(), "project_pair");
  if (blocks == 0) return;
  T* parts = args.coefficients + coefficient_room(args);
  T* to = grid.parts.count > 1 ? parts : args.coefficients;
  auto kernel = coefficients_kernel<Tile, T>;
  PROLORA_LAUNCH(kernel, blocks, Tile::kThreads, sizeof(typename Tile::Shared), stream, rows,
                 args.cancelled, grid, to);
  check_launch();
  if (grid.parts.count == 1) return;
  auto sum = sum_parts_kernel<T>;
  PROLORA_LAUNCH(sum, grid_size(args.batch * rows.rows, "project_pair"), kThreads, 0, stream, rows,
                 args.cancelled, grid, parts, args.coefficients);
  check_launch();
}

template <ProjectStep kStep, class T>
void run_step(const ProjectPairArgs<T>& args, cudaStream_t stream) {
  const ProjectRows<T> rows = project_rows(args, kStep);
  if (rows.had != nullptr) {
    const Index blocks = ceil_div(args.batch * rows.rows, kThreads / 32);
    auto kernel = cancelled_kernel<T>;
    PROLORA_LAUNCH(kernel, grid_size(blocks, "project_pair"), kThreads, 0, stream, rows, args.batch,
                   args.cancelled);
    check_launch();
  }
  on_tile(rows.rows, [&](auto tile) {
    using Tile = typename decltype(tile)::Type;
    run_coefficients<Tile>(args, rows, stream);
    const TileGrid grid = tile_grid<Tile>(args.m, rows.rows);
    auto kernel = apply_kernel<Tile, kStep, T>;
    PROLORA_LAUNCH(kernel, grid_size(args.batch * grid.per_matrix(), "project_pair"),
                   Tile::kThreads, sizeof(typename Tile::Shared), stream, args, grid);
    check_launch();
  });
}

}  // namespace

Index project_pair_scratch_cuda(Index batch, Index m, Index ks, Index kt, Index r) {
  ProjectPairArgs<float> args{};
  args.batch = batch, args.m = m, args.ks = ks, args.kt = kt, args.r = r;
  Index most = 0;
  for (const ProjectStep step : kProjectSteps) {
    const ProjectRows<float> rows = project_rows(args, step);
    on_tile(rows.rows, [&](auto tile) {
      const Index parts = coefficient_grid<typename decltype(tile)::Type>(rows, batch).parts.count;
      if (parts > 1) most = max_index(most, parts * batch * rows.rows * rows.k);
    });
  }
  return coefficient_room(args) + most;
}

template <class T>
void project_pair_cuda(const ProjectPairArgs<T>& args, std::uintptr_t stream) {
  if (args.batch * args.m * args.r == 0) return;
  if (max_index(args.m, max_index(args.ks, args.kt)) > kMaxStride) {
    throw std::runtime_error("project_pair: rows of more than 2^24 numbers");
  }
  run_step<ProjectStep::kSplit>(args, to_stream(stream));
  run_step<ProjectStep::kSplitAgain>(args, to_stream(stream));
  run_step<ProjectStep::kMove>(args, to_stream(stream));
  run_step<ProjectStep::kMoveAgain>(args, to_stream(stream));
}

template void project_pair_cuda(const ProjectPairArgs<float>&, std::uintptr_t);

}  // namespace prolora
