// overlap on a GPU: a block of 128 threads per 64 x 64 tile, all matrices of the batch in one
// launch; then a warp per matrix adds its tiles' numbers.
#include <cuda_runtime.h>

#include "launch.h"
#include "overlap.h"

namespace prolora {
namespace {

constexpr int kSumThreads = 128;
constexpr int kSumWarps = kSumThreads / 32;

template <class T>
using Tile = CudaTile<T, 64>;

template <class T>
__global__ void __launch_bounds__(Tile<T>::kThreads, Tile<T>::kMinBlocks)
    overlap_kernel(OverlapArgs<T> args, TileGrid grid) {
  DYNAMIC_SHARED(typename Tile<T>::Shared, shared);
  const Index matrix = blockIdx.x / grid.per_matrix();
  const Index in_matrix = blockIdx.x % grid.per_matrix();
  const double squares =
      overlap_tile(Tile<T>{*shared}, args, matrix, in_matrix / grid.cols, in_matrix % grid.cols);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = squares;
}

__global__ void __launch_bounds__(kSumThreads)
    sum_tiles_kernel(const double* partial, double* out, Index batch, Index tiles) {
  const Index matrix = Index(blockIdx.x) * kSumWarps + threadIdx.x / 32;
  if (matrix >= batch) return;
  const double* mine = partial + matrix * tiles;
  const double sum = CudaWarp{}.sum<double>(tiles, [&](Index i) { return mine[i]; });
  if (threadIdx.x % 32 == 0) out[matrix] = sum;
}

}  // namespace

template <class T>
Index overlap_tiles_cuda(Index ks, Index kt) {
  return tile_grid<Tile<T>>(ks, kt).per_matrix();
}

template <class T>
void overlap_cuda(const OverlapArgs<T>& args, std::uintptr_t stream) {
  if (args.batch == 0) return;
  const TileGrid grid = tile_grid<Tile<T>>(args.ks, args.kt);
  const unsigned blocks = grid_size(args.batch * grid.per_matrix(), "overlap");
  if (blocks > 0) {
    LAUNCH(overlap_kernel<T>, blocks, Tile<T>::kThreads, sizeof(typename Tile<T>::Shared),
           to_stream(stream), args, grid);
    check(cudaGetLastError(), "overlap: launch");
  }
  LAUNCH(sum_tiles_kernel, grid_size(ceil_div(args.batch, kSumWarps), "overlap"), kSumThreads, 0,
         to_stream(stream), args.partial, args.out, args.batch, grid.per_matrix());
  check(cudaGetLastError(), "overlap: launch of the sum");
}

template Index overlap_tiles_cuda<float>(Index, Index);
template Index overlap_tiles_cuda<double>(Index, Index);
template void overlap_cuda(const OverlapArgs<float>&, std::uintptr_t);
template void overlap_cuda(const OverlapArgs<double>&, std::uintptr_t);

}  // namespace prolora
