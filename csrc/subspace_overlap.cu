// subspace_overlap on a GPU, in float32: torch has float64. A block of 128 threads per 64 x 64
// block of C, all pairs of all groups in one launch.
#include <cuda_runtime.h>

#include "choose_tile.h"
#include "launch.h"
#include "subspace_overlap.h"

namespace prolora {
namespace {

// One column more than a block has: threads that walk along rows meet every bank of shared memory.
constexpr Index kStride = kOverlapBlock + 1;

// The product is needed only once the slices that made it are not.
template <class Tile>
union Shared {
  typename Tile::Shared tile;
  float c[kOverlapBlock * kStride];
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    subspace_overlap_kernel(SubspaceOverlapArgs<float> args) {
  static_assert(Tile::kCols == kOverlapBlock);
  if constexpr (Tile::kCompiled) {
    PROLORA_DYNAMIC_SHARED(Shared<Tile>, shared);
    const OverlapPlace place = overlap_place(args, blockIdx.x);
    const OverlapGroup<float>& group = args.groups[place.group];
    // What is needed after the product takes two registers.
    const int rows = int(min_index(kOverlapBlock, group.ks - place.row * kOverlapBlock));
    const int cols = int(min_index(kOverlapBlock, group.kt - place.col * kOverlapBlock));
    overlap_product(Tile{shared->tile}, group, place, shared->c, kStride);
    __syncthreads();
    if (threadIdx.x < 32) {
      const double sum = CudaWarp{}.sum<double>(
          rows, [&](int i) { return row_square(shared->c + i * kStride, cols); });
      if (threadIdx.x == 0) args.sums[blockIdx.x] = sum;
    }
  }
}

}  // namespace

template <>
void subspace_overlap_cuda(const SubspaceOverlapArgs<float>& args, std::uintptr_t stream) {
  if (args.blocks == 0) return;
  run_on_tile<kOverlapBlock>([&](auto tile) {
    using Tile = typename decltype(tile)::Type;
    const int bytes = int(sizeof(Shared<Tile>));
    auto kernel = subspace_overlap_kernel<Tile>;
    static SharedMemoryOptIn opt_in;
    opt_in.raise_limit(kernel, bytes, "subspace_overlap: shared memory");
    PROLORA_LAUNCH(kernel, grid_size(args.blocks, "subspace_overlap"), Tile::kThreads, bytes,
                   to_stream(stream), args);
    check(cudaGetLastError(), "subspace_overlap: launch");
  });
}

}  // namespace prolora
