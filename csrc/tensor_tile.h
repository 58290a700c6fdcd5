// The tile of float32 on tensor cores: three TF32 products for one of float32, two where an operand
// is stored in 16 bits, which TF32 holds as they are.
//
// x = hi + lo, hi the nearest number of 11 bits, lo the rest without its last 13 bits, leaves 2^-23
// of x or less, and a b is taken as lo hi + hi lo + hi hi. One product of rounded numbers would not
// do: columns of equal numbers, as a Hadamard basis has, all round the same way, and an overlap is
// then off by up to 1e-3. Tensor cores cut sums towards zero: 12 products, a slice's, add up there,
// and the slices' sums in float32 arithmetic.
//
// A warp has 32 x 32 sums: per 8 of depth 24 mma for 16 numbers a lane from shared memory, which
// take four instructions each to split.
#pragma once

#include "ptx.h"
#include "tile.h"

namespace prolora {

#if defined(__CUDACC__) || defined(PROLORA_EMULATED)

template <int kTileCols>
struct TensorTile {
  using Number = float;
  static constexpr bool kCompiled = kHasTensorCores;
  static constexpr int kRows = 64;
  static constexpr int kCols = kTileCols;
  static constexpr int kDepth = 32;
  static constexpr int kWarpSize = 32;  // rows and columns of a warp, too
  static constexpr int kThreads = (kRows / kWarpSize) * (kCols / kWarpSize) * 32;
  static constexpr int kMinBlocks = (kCols == 64 ? 384 : 512) / kThreads;  // 168, 128 registers
  using Staged = StagedTile<float, kRows, kCols, kThreads>;
  static constexpr int kStageStride = Staged::kStageStride;

  // A slice lies in shared memory as it does in global memory, so that 16 bytes go from one to the
  // other as they are. Lanes read (p, i) for p = t, i = g (t < 4, g < 8): with rows padded to 8
  // modulo 32 numbers where neighbours are along the tile, to 4 where they are along the sum, they
  // meet 32 different banks.
  // Numbers of 16 bits lie two to a bank, and neighbours in one bank are read at once: rows padded
  // to 4 modulo 32 banks, or to 20, keep the others apart.
  template <class Operand, int kSize>
  struct Layout {
    static constexpr int kPadding = sizeof(typename Operand::Number) == 2 ? 8 : 4;
    static constexpr int kStride = Operand::kAlongDepth ? kDepth + kPadding : kSize + 8;
    static __device__ __forceinline__ int at(int p, int i) {
      return Operand::kAlongDepth ? i * kStride + p : p * kStride + i;
    }
  };
  template <int kSize>
  static constexpr int kSliceSize = kDepth * (kSize + 8);
  static_assert(kRows * (kDepth + 4) <= kSliceSize<kRows>, "both layouts fit");

  struct Slices {
    alignas(16) float a[2][kSliceSize<kRows>];
    alignas(16) float b[2][kSliceSize<kCols>];
  };
  union Shared {
    Slices slices;
    alignas(16) float stage[kCols * kStageStride];
  };

  Shared& shared;

  __device__ __forceinline__ float* stage() const { return shared.stage; }

  template <class F>
  __device__ __forceinline__ void each_pack(Index rows, Index cols, bool aligned, F f) const {
    Staged::each_pack(shared.stage, rows, cols, aligned, f);
  }

  // Begins the copy of this thread's share of a slice; what lies outside the operand is 0.
  template <int kSize, class Operand>
  static __device__ __forceinline__ void begin_copies(float* room, const Operand& from, Index p0,
                                                      Index depth, bool aligned) {
    using Stored = typename Operand::Number;
    constexpr int kWide = kWidest<Stored>;
    Stored* slice = reinterpret_cast<Stored*>(room);
    const Stored* data = from.data + p0 * from.depth_step();
    const int stride = int(from.stride);
    const int left = int(min_index(depth - p0, kDepth));
    const int length = Operand::kAlongDepth ? left : int(from.size);
    const int rows = Operand::kAlongDepth ? int(from.size) : left;
    // The threads take whole rows, so that only the row changes from one copy to the next.
    constexpr int kAcross = (Operand::kAlongDepth ? kDepth : kSize) / kWide;
    constexpr int kStep = kThreads / kAcross;
    const int column = int(threadIdx.x) % kAcross * kWide;
    auto copy_row = [&](int row, auto copy) {
      const int there = row < rows ? length - column : 0;
      copy(slice + row * Layout<Operand, kSize>::kStride + column, data + row * stride + column,
           there < 0       ? 0
           : there < kWide ? there
                           : kWide);
    };
    if (aligned) {
#pragma unroll
      for (int n = 0; n < kDepth * kSize / kWide / kThreads; ++n) {
        copy_row(int(threadIdx.x) / kAcross + n * kStep,
                 [&](Stored* to, const Stored* source, int there) {
                   ptx::copy_16_bytes(to, there > 0 ? source : data, int(sizeof(Stored)) * there);
                 });
      }
      return;
    }
    // Rare, and not worth registers.
#pragma unroll 1
    for (int row = int(threadIdx.x) / kAcross; row < kDepth * kSize / kWide / kAcross;
         row += kStep) {
      copy_row(row, [&](Stored* to, const Stored* source, int there) {
        for (int q = 0; q < kWide; ++q) {
          if constexpr (sizeof(Stored) == 4) {
            ptx::copy_4_bytes(to + q, q < there ? source + q : data, q < there ? 4 : 0);
          } else {  // too short for an asynchronous copy
            to[q] = q < there ? source[q] : Stored{};
          }
        }
      });
    }
  }

  // A warp's operands, 8 deep: as many fragments of 16 rows or 8 columns as its sums have.
  template <int kFragments, int kRegisters>
  struct Operands {
    unsigned high[kFragments][kRegisters];
    unsigned low[kFragments][kRegisters];

    // Register n of fragment f: row or column `first` + f * kStep + n % (kStep / 8) * 8, depth
    // p + 4 * (n / (kStep / 8)). Nothing is in `low` of numbers that TF32 holds.
    template <class Layout, class Stored>
    __device__ __forceinline__ void read(const Stored* slice, int p, int first) {
      constexpr int kStep = 32 / kFragments;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int n = 0; n < kRegisters; ++n) {
          const int across = f * kStep + n % (kStep / 8) * 8;
          const float x = value_of(slice[Layout::at(p + n / (kStep / 8) * 4, first + across)]);
          if constexpr (kExactInTf32<Stored>) {
            high[f][n] = ptx::as_bits(x);
          } else {
            // cvt.rna.tf32 takes five instructions, for NaN and infinity; here these leave NaN in
            // low.
            high[f][n] = (ptx::as_bits(x) + 0x1000u) & ~0x1fffu;
            low[f][n] = ptx::as_bits(x - ptx::as_float(high[f][n])) & ~0x1fffu;
          }
        }
      }
    }
  };

  using Sums = float[2][4][4];

  // A slice as the numbers of its operand.
  template <class Operand>
  static __device__ __forceinline__ const typename Operand::Number* stored(const float* slice) {
    return reinterpret_cast<const typename Operand::Number*>(slice);
  }

  template <class A, class B>
  __device__ __forceinline__ void multiply_slice(int buffer, int i0, int j0, Sums& sums) const {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    Sums slice = {};
#pragma unroll 1
    for (int p = 0; p < kDepth; p += 8) {
      Operands<2, 4> a;
      Operands<4, 2> b;
      a.template read<Layout<A, kRows>>(stored<A>(shared.slices.a[buffer]), p + t, i0 + g);
      b.template read<Layout<B, kCols>>(stored<B>(shared.slices.b[buffer]), p + t, j0 + g);
      auto add = [&](const unsigned(&left)[2][4], const unsigned(&right)[4][2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) ptx::multiply_add_tf32(slice[i][j], left[i], right[j]);
        }
      };
      if constexpr (!kExactInTf32<typename A::Number>) add(a.low, b.high);
      add(a.high, b.low);
      add(a.high, b.high);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[i][j][n] += slice[i][j][n];
      }
    }
  }

  template <class A, class B, class Use>
  __device__ __forceinline__ void product(const A& a, const B& b, Index depth, Use use) const {
    constexpr int kAcross = kCols / kWarpSize;
    const int i0 = int(threadIdx.x) / 32 / kAcross * kWarpSize;
    const int j0 = int(threadIdx.x) / 32 % kAcross * kWarpSize;
    const bool a_aligned = in_packs(a.data, a.stride);
    const bool b_aligned = in_packs(b.data, b.stride);
    auto begin = [&](Index p0, int buffer) {
      begin_copies<kRows>(shared.slices.a[buffer], a, p0, depth, a_aligned);
      begin_copies<kCols>(shared.slices.b[buffer], b, p0, depth, b_aligned);
      ptx::end_copy_group();
    };
    Sums sums = {};
    int buffer = 0;
    if (depth > 0) begin(0, buffer);
    for (Index p0 = 0; p0 < depth; p0 += kDepth) {
      ptx::wait_for_copies<0>();
      // The slice is complete, and all have left the buffer that is filled next.
      __syncthreads();
      if (p0 + kDepth < depth) begin(p0 + kDepth, buffer ^ 1);
      multiply_slice<A, B>(buffer, i0, j0, sums);
      buffer ^= 1;
    }
    // All have left the slices: `use` may put something else in their memory.
    __syncthreads();

    const int i1 = i0 + int(threadIdx.x) % 32 / 4;
    const int j1 = j0 + int(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int h = 0; h < 4; ++h) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int i = i1 + 16 * f + n / 2 * 8;
          const int j = j1 + 8 * h + n % 2;
          if (i < a.size && j < b.size) use(Index(i), Index(j), sums[f][h][n]);
        }
      }
    }
  }
};

#endif

}  // namespace prolora
