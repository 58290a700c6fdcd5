// krylov_block on a GPU: a block per tile of a product, all matrices of the batch in one launch;
// then a block of up to 384 threads per matrix.
#include <cuda_runtime.h>

#include "choose_tile.h"
#include "krylov_block.h"
#include "launch.h"

namespace prolora {
namespace {

constexpr int kTileCols = 32;  // a block of the iteration has no more rows
constexpr int kSumThreads = 128;

// Blocks count tiles, parts and matrices, from the fastest to the slowest.
struct ThinGrid {
  TileGrid tiles;
  DepthParts parts;
  Index batch;
  Index blocks() const { return batch * parts.count * tiles.per_matrix(); }
};

// To y, or where it is in parts to parts [parts, batch, cols, rows].
template <class Tile, class Operand>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    thin_product_kernel(ThinProduct<typename Operand::Number> product, ThinGrid grid,
                        float* parts) {
  if constexpr (Tile::kCompiled) {
    PROLORA_DYNAMIC_SHARED(typename Tile::Shared, shared);
    const auto [other, tile] = divide(blockIdx.x, grid.tiles.per_matrix());
    const auto [matrix, part] = divide(other, grid.parts.count);
    const auto [row, col] = divide(tile, grid.tiles.cols);
    const bool whole = grid.parts.count == 1;
    const Index size = product.rows * product.cols;
    float* y = whole ? product.y + matrix * size : parts + (part * grid.batch + matrix) * size;
    // Tiles of the same rows follow each other, so that they share A through the L2 cache.
    thin_product<Operand>(Tile{*shared}, product, matrix, row, col, grid.parts, part, y,
                          whole && product.subtract);
  }
}

// y from the parts of it; `size` numbers in all.
__global__ void __launch_bounds__(kSumThreads)
    sum_thin_parts_kernel(float* __restrict__ y, const float* __restrict__ parts, Index count,
                          Index size, bool subtract) {
  const Index i = Index(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (Index part = 0; part < count; ++part) sum += parts[part * size + i];
  y[i] = subtract ? y[i] - sum : sum;
}

// One block a multiprocessor: batches are smaller than the number of those.
template <bool kLast>
__global__ void __launch_bounds__(32 * kPanelWarps, 1)
    finish_block_kernel(KrylovBlockArgs<float> args) {
  PROLORA_DYNAMIC_SHARED(std::byte, shared);
  const PanelWorkspace workspace = PanelWorkspace::at(shared, int(args.width));
  if constexpr (kLast) {
    make_block(CudaBlock{}, args, blockIdx.x, workspace);
  } else {
    normalise_image(CudaBlock{}, args, blockIdx.x, workspace);
  }
}

void check_launch() { check(cudaGetLastError(), "krylov_block: launch"); }

template <class Tile>
ThinGrid thin_grid(Index batch, Index rows, Index cols, Index depth) {
  constexpr int kThreadsWanted = 256;  // per multiprocessor
  const Index processors = device_attribute(cudaDevAttrMultiProcessorCount, "krylov_block");
  const TileGrid tiles = tile_grid<Tile>(rows, cols);
  const Index blocks = processors * kThreadsWanted / Tile::kThreads;
  return {tiles, depth_parts(batch * tiles.per_matrix(), depth, blocks), batch};
}

template <class Tile, class Operand>
void run_product(const KrylovBlockArgs<float>& args,
                 const ThinProduct<typename Operand::Number>& product, cudaStream_t stream) {
  const ThinGrid grid = thin_grid<Tile>(args.batch, product.rows, product.cols, product.depth);
  if (grid.blocks() == 0) return;  // weights without columns
  auto kernel = thin_product_kernel<Tile, Operand>;
  PROLORA_LAUNCH(kernel, grid_size(grid.blocks(), "krylov_block"), Tile::kThreads,
                 sizeof(typename Tile::Shared), stream, product, grid, args.parts);
  check_launch();
  if (grid.parts.count == 1) return;
  const Index size = args.batch * product.rows * product.cols;
  PROLORA_LAUNCH(sum_thin_parts_kernel, grid_size(ceil_div(size, kSumThreads), "krylov_block"),
                 kSumThreads, 0, stream, product.y, args.parts, grid.parts.count, size,
                 product.subtract);
  check_launch();
}

// Takes the basis out of the image, and makes rows of what is left.
template <class Tile, bool kLast>
void run_pass(const KrylovBlockArgs<float>& args, cudaStream_t stream) {
  run_product<Tile, AlongDepth<float>>(args, product_with_basis(args), stream);
  run_product<Tile, AlongTile<float>>(args, rest_of_basis(args), stream);
  auto kernel = finish_block_kernel<kLast>;
  const int bytes = int(PanelWorkspace::bytes(int(args.width)));
  PROLORA_LAUNCH(kernel, grid_size(args.batch, "krylov_block"), panel_threads(args.width, args.d),
                 bytes, stream, args);
  check_launch();
}

template <class Tile, class Stored>
void run_products(const KrylovBlockArgs<float>& args, cudaStream_t stream) {
  using Along = AlongTile<Stored>;
  using Across = AlongDepth<Stored>;
  const auto with_w = product_with_w<Stored>(args);
  const auto back = product_back<Stored>(args);
  if (args.transposed) {
    run_product<Tile, Across>(args, with_w, stream);
    run_product<Tile, Along>(args, back, stream);
  } else {
    run_product<Tile, Along>(args, with_w, stream);
    run_product<Tile, Across>(args, back, stream);
  }
  run_pass<Tile, false>(args, stream);
  if (args.size + args.width <= args.room) run_pass<Tile, true>(args, stream);
}

template <class Tile>
Index room_for_parts(Index batch, Index rows, Index cols, Index depth) {
  const Index parts = thin_grid<Tile>(batch, rows, cols, depth).parts.count;
  return parts > 1 ? parts * batch * rows * cols : 0;
}

}  // namespace

Index krylov_block_scratch_cuda(Index batch, Index d, Index n, Index size, Index width) {
  Index most = 0;
  run_on_tile<kTileCols>([&](auto tile) {
    using Tile = typename decltype(tile)::Type;
    for (const auto& [rows, depth] : {std::pair{n, d}, {d, n}, {size, d}, {d, size}}) {
      const Index wanted = room_for_parts<Tile>(batch, rows, width, depth);
      most = wanted > most ? wanted : most;
    }
  });
  return most;
}

template <>
void krylov_block_cuda(const KrylovBlockArgs<float>& args, std::uintptr_t stream) {
  if (args.batch == 0) return;
  check_krylov_size(args);
  run_on_tile<kTileCols>([&](auto tile) {
    using Tile = typename decltype(tile)::Type;
    StoredAs(args.stored) == StoredAs::kFloat16
        ? run_products<Tile, Half>(args, to_stream(stream))
        : run_products<Tile, Bfloat>(args, to_stream(stream));
  });
}

}  // namespace prolora
