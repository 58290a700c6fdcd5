// overlap_table on a GPU: a block of 128 threads per 64 x 64 block of C, all pairs of all groups in
// one launch; then a block of 64 threads per strip of 64 shells.
#include <cuda_runtime.h>

#include "launch.h"
#include "overlap_table.h"

namespace prolora {
namespace {

template <class T>
using Tile = CudaTile<T, int(kOverlapBlock)>;

// One column more than a block has: threads that walk down columns and along rows both meet every
// bank of shared memory.
constexpr Index kStride = kOverlapBlock + 1;

// The product is needed only once the slices that made it are not.
template <class T>
union Shared {
  typename Tile<T>::Shared slices;
  T c[kOverlapBlock * kStride];
};

template <class T>
__global__ void __launch_bounds__(Tile<T>::kThreads, Tile<T>::kMinBlocks)
    overlap_table_kernel(OverlapTableArgs<T> args) {
  DYNAMIC_SHARED(Shared<T>, shared);
  const Index block = blockIdx.x;
  const OverlapPlace place = overlap_place(args, block);
  const OverlapGroup<T> group = args.groups[place.group];
  overlap_product(Tile<T>{shared->slices}, group, place, shared->c, kStride);
  const Index rows = smaller(kOverlapBlock, group.ks - place.row * kOverlapBlock);
  const Index cols = smaller(kOverlapBlock, group.kt - place.col * kOverlapBlock);
  double* edges = args.edges + block * kOverlapBlock;
  __syncthreads();
  CudaBlock{}.each(kOverlapBlock, [&](Index t) {
    edges[t] = edge_sum(shared->c, kStride, rows, cols, place.row, place.col, t);
  });
  if (threadIdx.x < 32) {
    const double sum = CudaWarp{}.sum<double>(kOverlapBlock, [&](Index t) { return edges[t]; });
    if (threadIdx.x == 0) args.table[block] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(int(kOverlapBlock)) shells_kernel(OverlapTableArgs<T> args) {
  const Index g = last_group_from(args, Index(blockIdx.x), &OverlapGroup<T>::first_strip);
  const OverlapGroup<T> group = args.groups[g];
  const Index in_group = Index(blockIdx.x) - group.first_strip;
  const Index fewest = smaller(group.ks, group.kt);
  const Index strips = ceil_div(fewest, kOverlapBlock);
  const Index matrix = in_group / strips;
  const Index k = in_group % strips * kOverlapBlock + threadIdx.x;
  if (k >= fewest) return;
  const Index cols = ceil_div(group.kt, kOverlapBlock);
  const Index per_matrix = ceil_div(group.ks, kOverlapBlock) * cols;
  const double* edges = args.edges + (group.first_block + matrix * per_matrix) * kOverlapBlock;
  args.shells[group.first_shell + matrix * fewest + k] = shell_sum(edges, cols, k);
}

}  // namespace

template <class T>
void overlap_table_cuda(const OverlapTableArgs<T>& args, std::uintptr_t stream) {
  if (args.blocks == 0) return;
  const int bytes = int(sizeof(Shared<T>));
  auto kernel = overlap_table_kernel<T>;
  static SharedMemoryOptIn opt_in;
  opt_in.raise_limit(kernel, bytes, "overlap_table: shared memory");
  LAUNCH(kernel, grid_size(args.blocks, "overlap_table"), Tile<T>::kThreads, bytes,
         to_stream(stream), args);
  check(cudaGetLastError(), "overlap_table: launch");
  auto shells = shells_kernel<T>;
  LAUNCH(shells, grid_size(args.strips, "overlap_table"), int(kOverlapBlock), 0, to_stream(stream),
         args);
  check(cudaGetLastError(), "overlap_table: launch of the shells");
}

PROLORA_INSTANTIATE_CUDA(overlap_table, OverlapTableArgs)

}  // namespace prolora
