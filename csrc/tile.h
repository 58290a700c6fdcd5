// Tiles of a matrix product, sum(i, j) = Σ_p a(p, i) b(p, j), for GPU and CPU.
//
// An algorithm is written against a tile that offers
//   kRows, kCols               the size of the tile
//   product(a, b, depth, use)  calls use(i, j, sum(i, j)) for i < a.size, j < b.size
//   stage()                    memory for a product: (i, j) at stage()[j * kStageStride + i]
//   each_pack(rows, cols, aligned, f)  once all have called `use`: f(i, j, pack) for the stage's
//                              numbers, neighbours along i together where memory is aligned
// CudaTile and TensorTile (tensor_tile.h) are a block of threads; SerialTile (serial.h), one CPU
// core, is the oracle that the tests compare them with.
#pragma once

#include <cstdint>

#include "block.h"
#include "stored.h"

namespace prolora {

// An operand whose neighbours along the tile lie side by side: element (p, i) = data[p*stride + i].
template <class T>
struct AlongTile {
  using Number = T;
  static constexpr bool kAlongDepth = false;
  const T* data;
  Index stride;
  Index size;  // i < size; the rest of the tile counts as 0
  PROLORA_HOST_DEVICE Index depth_step() const { return stride; }
  PROLORA_HOST_DEVICE Index step() const { return 1; }
  PROLORA_HOST_DEVICE AlongTile from(Index p) const { return {data + p * stride, stride, size}; }
};

// An operand whose neighbours along the sum lie side by side: element (p, i) = data[i*stride + p].
template <class T>
struct AlongDepth {
  using Number = T;
  static constexpr bool kAlongDepth = true;
  const T* data;
  Index stride;
  Index size;
  PROLORA_HOST_DEVICE Index depth_step() const { return 1; }
  PROLORA_HOST_DEVICE Index step() const { return stride; }
  PROLORA_HOST_DEVICE AlongDepth from(Index p) const { return {data + p, stride, size}; }
};

// Within a slice of an operand indices are 32-bit numbers, which 64 rows of this stride fit in.
constexpr Index kMaxStride = Index(1) << 24;

// Numbers side by side that are loaded and stored at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T values[kCount];

  static PROLORA_HOST_DEVICE Pack load(const T* from) {
    return *reinterpret_cast<const Pack*>(from);
  }
  PROLORA_HOST_DEVICE void store(T* to) const { *reinterpret_cast<Pack*>(to) = *this; }
  friend PROLORA_HOST_DEVICE Pack operator+(Pack a, const Pack& b) {
    for (int n = 0; n < kCount; ++n) a.values[n] += b.values[n];
    return a;
  }
  friend PROLORA_HOST_DEVICE Pack operator-(Pack a, const Pack& b) {
    for (int n = 0; n < kCount; ++n) a.values[n] -= b.values[n];
    return a;
  }
};

// As many as 16 bytes hold: the widest load and store of a GPU.
template <class T>
constexpr int kWidest = 16 / sizeof(T);

// Whether rows of this stride that begin here can be moved 16 bytes at a time.
template <class T>
PROLORA_HOST_DEVICE bool in_packs(const T* data, Index stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % kWidest<T> == 0;
}

// Where a tile lies in a batch of rows x cols matrices cut into tiles.
struct TileGrid {
  Index rows, cols;  // tiles per matrix
  PROLORA_HOST_DEVICE Index per_matrix() const { return rows * cols; }
};

template <class Tile>
PROLORA_HOST_DEVICE TileGrid tile_grid(Index rows, Index cols) {
  return {ceil_div(rows, Tile::kRows), ceil_div(cols, Tile::kCols)};
}

// Whether what is compiled now may use csrc/ptx.h; the tiles that do are empty where not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;
#else
constexpr bool kHasTensorCores = true;
#endif

// Three TF32 products for one of float32 (tensor_tile.h) pay where tensor cores do TF32 at many
// times the rate of float32: data centre GPUs. On 8.6, 8.9 and 12.x the rate is the same (GeForce)
// or twice as high.
inline bool tensor_cores_pay(int major, int minor) {
  return major == 9 || major == 10 || (major == 8 && minor == 0);
}

// The depth of products cut into parts of `length`, the last one shorter, each a block's.
struct DepthParts {
  Index count, length;
};

// So many parts that `tiles` products become `blocks` blocks, or nearly: a few tiles of great depth
// would leave a GPU idle. A part is 256 deep or more, so that its sums, which are written and read
// once more, stay small beside what it reads.
inline DepthParts depth_parts(Index tiles, Index depth, Index blocks) {
  constexpr Index kShortest = 256;
  constexpr Index kStep = 32;  // a tile's slices, and 16 bytes
  const Index most = tiles > 0 ? min_index(blocks / tiles, depth / kShortest) : 1;
  if (most <= 1) return {1, depth};
  const Index length = ceil_div(ceil_div(depth, most), kStep) * kStep;
  return {ceil_div(depth, length), length};
}

#if defined(__CUDACC__) || defined(PROLORA_EMULATED)

// What the two kinds of blocks do after a product: its numbers lie in shared memory as [j][i], rows
// padded by 16 bytes, and leave it 16 bytes a thread, neighbouring threads side by side.
template <class T, int kRows, int kCols, int kThreads>
struct StagedTile {
  static constexpr int kStageStride = kRows + kWidest<T>;

  template <class F>
  static __device__ __forceinline__ void each_pack(const T* stage, Index rows, Index cols,
                                                   bool aligned, F f) {
    using Wide = Pack<T, kWidest<T>>;
    using One = Pack<T, 1>;
    constexpr int kPacks = kRows / kWidest<T>;
    __syncthreads();
    for (int e = threadIdx.x; e < kCols * kPacks; e += kThreads) {
      const int j = e / kPacks;
      const int i = e % kPacks * kWidest<T>;
      const T* from = stage + j * kStageStride + i;
      if (j >= cols) continue;
      if (aligned && i + kWidest<T> <= rows) {
        f(Index(i), Index(j), Wide::load(from));
      } else {
        for (int n = 0; n < kWidest<T> && i + n < rows; ++n) {
          f(Index(i + n), Index(j), One::load(from + n));
        }
      }
    }
  }
};

// A block multiplies slices, 64 bytes deep, held in shared memory; a thread keeps 8 x 4 sums in
// registers, so that 12 shared reads feed 32 multiply-adds. Two buffers: while a slice is
// multiplied the next one is on its way from global memory, and one barrier per slice is enough.
// For double, and for float where tensor cores are missing or no faster.
template <class T, int kTileCols>
struct CudaTile {
  using Number = T;
  static constexpr bool kCompiled = true;
  static constexpr int kRows = 64;
  static constexpr int kCols = kTileCols;
  static constexpr int kDepth = 64 / sizeof(T);  // 16 for double runs out of registers
  static constexpr int kThreadRows = 8;
  static constexpr int kThreadCols = 4;
  static constexpr int kThreads = (kRows / kThreadRows) * (kCols / kThreadCols);
  // Blocks that a multiprocessor should hold: 128 registers a thread, 168 for 32 columns, whose
  // threads are fewer and move more each, 255 for double.
  static constexpr int kMinBlocks = (sizeof(T) == 8 ? 256 : kCols == 64 ? 512 : 384) / kThreads;
  using Staged = StagedTile<T, kRows, kCols, kThreads>;
  static constexpr int kStageStride = Staged::kStageStride;

  // Rows are padded by 16 bytes: the transposing store of an AlongDepth operand then meets at most
  // two-way bank conflicts, and rows stay aligned for 128-bit reads. The stage takes the slices'
  // place; a thread's 8 x 4 sums enter it with eight-way conflicts, once a product.
  struct Slices {
    T a[2][kDepth][kRows + kWidest<T>];
    T b[2][kDepth][kCols + kWidest<T>];
  };
  union Shared {
    Slices slices;
    alignas(16) T stage[kCols * kStageStride];
  };

  Shared& shared;

  __device__ __forceinline__ T* stage() const { return shared.stage; }

  template <class F>
  __device__ __forceinline__ void each_pack(Index rows, Index cols, bool aligned, F f) const {
    Staged::each_pack(shared.stage, rows, cols, aligned, f);
  }

  // A thread's share of a slice on its way from global to shared memory.
  template <int kSize>
  struct Slice {
    static constexpr int kWide = kWidest<T>;
    static constexpr int kPacks = kDepth * kSize / kThreads / kWide;
    Pack<T, kWide> packs[kPacks];

    // Neighbouring threads read neighbouring addresses, whichever way the operand lies.
    template <class Operand>
    static __device__ __forceinline__ void place(int n, int* p, int* i) {
      // Unsigned, so that the compiler sees which of the two stays the same.
      const unsigned e = threadIdx.x + unsigned(n * kThreads);
      constexpr unsigned kAcross = (Operand::kAlongDepth ? kDepth : kSize) / kWide;
      *p = Operand::kAlongDepth ? e % kAcross * kWide : e / kAcross;
      *i = Operand::kAlongDepth ? e / kAcross : e % kAcross * kWide;
    }

    template <class Operand>
    __device__ __forceinline__ void read(const Operand& from, Index p0, Index depth, bool aligned) {
      using Stored = typename Operand::Number;
      const Stored* data = from.data + p0 * from.depth_step();
      const int left = int(min_index(depth - p0, kDepth));
      const int size = int(from.size);
      const int stride = int(from.stride);
#pragma unroll
      for (int n = 0; n < kPacks; ++n) {
        int p, i;
        place<Operand>(n, &p, &i);
        const Stored* first = data + (Operand::kAlongDepth ? i * stride + p : p * stride + i);
        // How many of the pack lie in the operand.
        const int along = Operand::kAlongDepth ? left - p : size - i;
        const int there = (Operand::kAlongDepth ? i < size : p < left) ? along : 0;
        if (aligned && there >= kWide) {
          const auto stored = Pack<Stored, kWide>::load(first);
#pragma unroll
          for (int q = 0; q < kWide; ++q) packs[n].values[q] = value_of(stored.values[q]);
        } else {
#pragma unroll
          for (int q = 0; q < kWide; ++q) {
            packs[n].values[q] = q < there ? value_of(first[q]) : T(0);
          }
        }
      }
    }

    template <class Operand>
    __device__ __forceinline__ void store(T (&to)[kDepth][kSize + kWide]) const {
#pragma unroll
      for (int n = 0; n < kPacks; ++n) {
        int p, i;
        place<Operand>(n, &p, &i);
        if (Operand::kAlongDepth) {
#pragma unroll
          for (int q = 0; q < kWide; ++q) to[p + q][i] = packs[n].values[q];
        } else {
          packs[n].store(&to[p][i]);
        }
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
    const bool a_aligned = in_packs(a.data, a.stride);
    const bool b_aligned = in_packs(b.data, b.stride);
    auto fetch = [&](Index p0) {
      next_a.read(a, p0, depth, a_aligned);
      next_b.read(b, p0, depth, b_aligned);
    };
    auto deliver = [&] {
      next_a.template store<A>(shared.slices.a[buffer]);
      next_b.template store<B>(shared.slices.b[buffer]);
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
        const T* row_a = shared.slices.a[buffer][p] + i0;
        const T* row_b = shared.slices.b[buffer][p] + j0;
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
