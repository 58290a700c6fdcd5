// Tiles of a matrix product, sum(i, j) = Σ_p a(p, i) b(p, j), for GPU and CPU.
//
// An algorithm is written against a tile that offers
//   kRows, kCols            the size of the tile
//   product(a, b, depth, use)  calls use(i, j, sum(i, j)) for i < a.size, j < b.size
// CudaTile is a block of threads; SerialTile (serial.h) is one CPU core.
#pragma once

#include "block.h"

namespace prolora {

// An operand whose neighbours along the tile lie side by side: element (p, i) = data[p*stride + i].
template <class T>
struct AlongTile {
  static constexpr bool kAlongDepth = false;
  const T* data;
  Index stride;
  Index size;  // i < size; the rest of the tile counts as 0
  HOST_DEVICE Index depth_step() const { return stride; }
  HOST_DEVICE Index step() const { return 1; }
};

// An operand whose neighbours along the sum lie side by side: element (p, i) = data[i*stride + p].
template <class T>
struct AlongDepth {
  static constexpr bool kAlongDepth = true;
  const T* data;
  Index stride;
  Index size;
  HOST_DEVICE Index depth_step() const { return 1; }
  HOST_DEVICE Index step() const { return stride; }
};

// Where a tile lies in a batch of rows x cols matrices cut into tiles.
struct TileGrid {
  Index rows, cols;  // tiles per matrix
  HOST_DEVICE Index per_matrix() const { return rows * cols; }
};

template <class Tile>
HOST_DEVICE TileGrid tile_grid(Index rows, Index cols) {
  return {ceil_div(rows, Tile::kRows), ceil_div(cols, Tile::kCols)};
}

#if defined(__CUDACC__) || defined(PROLORA_EMULATED)

// A block multiplies slices, 64 bytes deep, held in shared memory; a thread keeps 8 x 4 sums in
// registers, so that 12 shared reads feed 32 multiply-adds. Two buffers: while a slice is
// multiplied the next one is on its way from global memory, and one barrier per slice is enough.
template <class T, int kTileCols>
struct CudaTile {
  static constexpr int kRows = 64;
  static constexpr int kCols = kTileCols;
  static constexpr int kDepth = 64 / sizeof(T);  // 16 for double runs out of registers
  static constexpr int kThreadRows = 8;
  static constexpr int kThreadCols = 4;
  static constexpr int kThreads = (kRows / kThreadRows) * (kCols / kThreadCols);
  // Blocks that a multiprocessor should hold: 128 registers a thread, 255 for double.
  static constexpr int kMinBlocks = (sizeof(T) == 4 ? 512 : 256) / kThreads;

  // Rows are padded by 16 bytes or more: the transposing store of an AlongDepth operand then meets
  // at most two-way bank conflicts, and rows stay aligned for 128-bit reads.
  struct Shared {
    T a[2][kDepth][kRows + 4];
    T b[2][kDepth][kCols + 4];
  };

  Shared& shared;

  // A thread's share of a slice on its way from global to shared memory.
  template <int kSize>
  struct Slice {
    static constexpr int kShare = kDepth * kSize / kThreads;
    T values[kShare];

    // Neighbouring threads read neighbouring addresses, whichever way the operand lies.
    template <class Operand>
    static __device__ __forceinline__ void place(int n, int* p, int* i) {
      // Unsigned, so that the compiler sees which of the two stays the same.
      const unsigned e = threadIdx.x + unsigned(n * kThreads);
      *p = Operand::kAlongDepth ? e % kDepth : e / kSize;
      *i = Operand::kAlongDepth ? e / kDepth : e % kSize;
    }

    template <class Operand>
    __device__ __forceinline__ void read(const Operand& from, Index p0, Index depth) {
#pragma unroll
      for (int n = 0; n < kShare; ++n) {
        int p, i;
        place<Operand>(n, &p, &i);
        const bool inside = p0 + p < depth && i < from.size;
        values[n] = inside ? from.data[(p0 + p) * from.depth_step() + i * from.step()] : T(0);
      }
    }

    template <class Operand>
    __device__ __forceinline__ void store(T (&to)[kDepth][kSize + 4]) const {
#pragma unroll
      for (int n = 0; n < kShare; ++n) {
        int p, i;
        place<Operand>(n, &p, &i);
        to[p][i] = values[n];
      }
    }
  };

  template <class A, class B, class Use>
  __device__ __forceinline__ void product(const A& a, const B& b, Index depth, Use use) const {
    const int i0 = threadIdx.x / (kCols / kThreadCols) * kThreadRows;
    const int j0 = threadIdx.x % (kCols / kThreadCols) * kThreadCols;
    T sums[kThreadRows][kThreadCols] = {};
    Slice<kRows> next_a;
    Slice<kCols> next_b;
    int buffer = 0;
    auto fetch = [&](Index p0) {
      next_a.read(a, p0, depth);
      next_b.read(b, p0, depth);
    };
    auto deliver = [&] {
      next_a.template store<A>(shared.a[buffer]);
      next_b.template store<B>(shared.b[buffer]);
    };

    fetch(0);
    deliver();
    for (Index p0 = 0; p0 < depth; p0 += kDepth) {
      // The slice is complete, and all have left the buffer that is filled next.
      __syncthreads();
      const bool more = p0 + kDepth < depth;
      if (more) fetch(p0 + kDepth);
#pragma unroll 4
      for (int p = 0; p < kDepth; ++p) {
        const T* row_a = shared.a[buffer][p] + i0;
        const T* row_b = shared.b[buffer][p] + j0;
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadCols; ++j) sums[i][j] += row_a[i] * row_b[j];
        }
      }
      buffer ^= 1;
      if (more) deliver();
    }
    // All have left the slices: `use` may put something else in their memory.
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        if (i0 + i < a.size && j0 + j < b.size) use(i0 + i, j0 + j, sums[i][j]);
      }
    }
  }
};

#endif

}  // namespace prolora
