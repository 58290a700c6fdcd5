// overlap_table on a GPU: a block of 128 threads per 64 x 64 block of C, all pairs of all groups in
// one launch; then a block of 64 threads per strip of 64 shells.
#include <cuda_runtime.h>

#include "choose_tile.h"
#include "launch.h"
#include "overlap_table.h"

namespace prolora {
namespace {

// One column more than a block has: threads that walk down columns and along rows both meet every
// bank of shared memory.
constexpr Index kStride = kOverlapBlock + 1;

// The product is needed only once the slices that made it are not.
template <class Tile>
union Shared {
  typename Tile::Shared tile;
  typename Tile::Number c[kOverlapBlock * kStride];
};

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    overlap_table_kernel(OverlapTableArgs<T> args) {
  static_assert(Tile::kCols == kOverlapBlock);
  DYNAMIC_SHARED(Shared<Tile>, shared);
  const OverlapPlace place = overlap_place(args, blockIdx.x);
  const OverlapGroup<T>& group = args.groups[place.group];
  // What is needed after the product takes four registers.
  const int row = int(place.row);
  const int col = int(place.col);
  const int rows = int(smaller(kOverlapBlock, group.ks - place.row * kOverlapBlock));
  const int cols = int(smaller(kOverlapBlock, group.kt - place.col * kOverlapBlock));
  overlap_product(Tile{shared->tile}, group, place, shared->c, kStride);
  double* edges = args.edges + Index(blockIdx.x) * kOverlapBlock;
  __syncthreads();
  CudaBlock{}.each(kOverlapBlock, [&](Index t) {
    edges[t] = edge_sum(shared->c, kStride, rows, cols, row, col, t);
  });
  if (threadIdx.x < 32) {
    const double sum = CudaWarp{}.sum<double>(kOverlapBlock, [&](Index t) { return edges[t]; });
    if (threadIdx.x == 0) args.table[blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(int(kOverlapBlock)) shells_kernel(OverlapTableArgs<T> args) {
  const Index g = last_group_from(args, Index(blockIdx.x), &OverlapGroup<T>::first_strip);
  const OverlapGroup<T> group = args.groups[g];
  const Index fewest = smaller(group.ks, group.kt);
  const Index strips = ceil_div(fewest, kOverlapBlock);
  const auto [matrix, strip] = divide(Index(blockIdx.x) - group.first_strip, strips);
  const Index k = strip * kOverlapBlock + threadIdx.x;
  if (k >= fewest) return;
  const Index cols = ceil_div(group.kt, kOverlapBlock);
  const Index per_matrix = ceil_div(group.ks, kOverlapBlock) * cols;
  const double* edges = args.edges + (group.first_block + matrix * per_matrix) * kOverlapBlock;
  args.shells[group.first_shell + matrix * fewest + k] = shell_sum(edges, cols, k);
}

template <class Tile, class T>
void run_blocks(const OverlapTableArgs<T>& args, cudaStream_t stream) {
  const int bytes = int(sizeof(Shared<Tile>));
  auto kernel = overlap_table_kernel<Tile, T>;
  static SharedMemoryOptIn opt_in;
  opt_in.raise_limit(kernel, bytes, "overlap_table: shared memory");
  LAUNCH(kernel, grid_size(args.blocks, "overlap_table"), Tile::kThreads, bytes, stream, args);
  check(cudaGetLastError(), "overlap_table: launch");
}

}  // namespace

template <class T>
void overlap_table_cuda(const OverlapTableArgs<T>& args, std::uintptr_t stream) {
  if (args.blocks == 0) return;
  run_on_tile<T, kOverlapBlock>(
      [&](auto tile) { run_blocks<typename decltype(tile)::Type>(args, to_stream(stream)); });
  auto shells = shells_kernel<T>;
  LAUNCH(shells, grid_size(args.strips, "overlap_table"), int(kOverlapBlock), 0, to_stream(stream),
         args);
  check(cudaGetLastError(), "overlap_table: launch of the shells");
}

PROLORA_INSTANTIATE_CUDA(overlap_table, OverlapTableArgs)

}  // namespace prolora
