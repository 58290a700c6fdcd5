// precise_product on a GPU with integer tensor cores of compute capability 8.0 or later: a warp a
// row for the digits, a block a tile of the results, all matrices of the batch in one launch.
#include <cuda_runtime.h>

#include <stdexcept>

#include "digit_tile.h"
#include "launch.h"

namespace prolora {
namespace {

constexpr int kSplitThreads = 256;

template <class Stored>
__global__ void __launch_bounds__(kSplitThreads) split_rows_kernel(RowsToSplit<Stored> rows) {
  const Index row = Index(blockIdx.x) * (kSplitThreads / 32) + threadIdx.x / 32;
  if (row < rows.count) split_row(CudaWarp{}, rows, row);
}

// Tiles of the same rows follow each other, so that they share x through the L2 cache.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    precise_product_kernel(PreciseProductArgs<float> args, TileGrid grid) {
  if constexpr (Tile::kCompiled) {
    PROLORA_DYNAMIC_SHARED(typename Tile::Shared, shared);
    const auto [matrix, tile] = divide(blockIdx.x, grid.per_matrix());
    const auto [row, col] = divide(tile, grid.cols);
    precise_product(Tile{*shared}, args, matrix, row, col);
  }
}

void check_launch() { check(cudaGetLastError(), "precise_product: launch"); }

template <class Stored>
void run_split(const RowsToSplit<Stored>& rows, cudaStream_t stream) {
  if (rows.count == 0) return;
  auto kernel = split_rows_kernel<Stored>;
  PROLORA_LAUNCH(kernel, grid_size(ceil_div(rows.count, kSplitThreads / 32), "precise_product"),
                 kSplitThreads, 0, stream, rows);
  check_launch();
}

SharedMemoryOptIn opt_in;

}  // namespace

template <>
void precise_product_cuda(const PreciseProductArgs<float>& args, std::uintptr_t stream) {
  if (args.batch * args.rows * args.cols == 0) return;
  check_precise_size(args);
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, "precise_product") < 8) {
    throw std::runtime_error("precise_product: this GPU's tensor cores take too few integers");
  }
  as_stored(args.x_stored,
            [&](auto number) { run_split(rows_of_x<decltype(number)>(args), to_stream(stream)); });
  if (args.y) {
    as_stored(args.y_stored, [&](auto number) {
      run_split(rows_of_y<decltype(number)>(args), to_stream(stream));
    });
  }
  const TileGrid grid = tile_grid<DigitTile>(args.rows, args.cols);
  constexpr int kBytes = sizeof(DigitTile::Shared);
  auto kernel = precise_product_kernel<DigitTile>;
  opt_in.raise_limit(kernel, kBytes, "precise_product");
  PROLORA_LAUNCH(kernel, grid_size(args.batch * grid.per_matrix(), "precise_product"),
                 DigitTile::kThreads, kBytes, to_stream(stream), args, grid);
  check_launch();
}

}  // namespace prolora
