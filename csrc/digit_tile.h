// The tile of precise_product.h on tensor cores: a block of 256 threads, a warp 16 x 32 results.
//
// Per 32 of depth a warp reads six digits of 16 rows and of 32 columns, and has 88 mma: 72 reads of
// shared memory. All seven sums by weight stay in registers, 112 a thread, so that a digit comes
// from memory once.
#pragma once

#include "precise_product.h"
#include "ptx.h"

namespace prolora {

#if defined(__CUDACC__) || defined(PROLORA_EMULATED)

struct DigitTile {
  static constexpr bool kCompiled = kHasTensorCores;
  static constexpr int kRows = 64;
  static constexpr int kCols = 64;
  static constexpr int kThreads = 256;
  static constexpr int kDepth = kDigitStep;
  // Lanes read 4 bytes at row g, byte 4 t (g < 8, t < 4): rows of 12 words meet 32 banks.
  static constexpr int kStride = kDepth + 16;

  using Slices = std::int8_t[kDigits][kRows * kStride];
  struct Shared {
    alignas(16) Slices x[2];
    alignas(16) Slices y[2];
  };

  Shared& shared;

  // Begins the copies of half of the threads: 16 bytes of a row each, of all digits.
  static __device__ __forceinline__ void begin_copies(Slices& to, const DigitRows& from, Index p0) {
    const int thread = int(threadIdx.x) % (kThreads / 2);
    const int row = thread / 2;
    const int at = thread % 2 * 16;
    const bool there = row < from.size;
    const std::int8_t* source = from.data + (there ? row * from.pitch : 0) + p0 + at;
#pragma unroll
    for (int s = 0; s < kDigits; ++s) {
      ptx::copy_16_bytes(to[s] + row * kStride + at, source + s * from.step, there ? 16 : 0);
    }
  }

  // Four numbers' digits.
  static __device__ __forceinline__ unsigned four(const std::int8_t* slice, int row, int p) {
    return *reinterpret_cast<const unsigned*>(slice + row * kStride + p);
  }

  using Sums = int[kDigits + 1][4][4];

  __device__ __forceinline__ void multiply_slices(int buffer, int i0, int j0, Sums& sums) const {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4 * 4;
    unsigned x[kDigits][4];
#pragma unroll
    for (int s = 0; s < kDigits; ++s) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        x[s][n] = four(shared.x[buffer][s], i0 + g + n % 2 * 8, t + n / 2 * 16);
      }
    }
#pragma unroll
    for (int s = 0; s < kDigits; ++s) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const unsigned y[2] = {four(shared.y[buffer][s], j0 + 8 * f + g, t),
                               four(shared.y[buffer][s], j0 + 8 * f + g, t + 16)};
#pragma unroll
        for (int r = 0; r < kDigits - s; ++r) ptx::multiply_add_s8(sums[r + s][f], x[r], y);
        if (s == 3) ptx::multiply_add_s8(sums[kDigits][f], x[3], y);
      }
    }
  }

  template <class Use>
  __device__ __forceinline__ void product(const DigitRows& x, const DigitRows& y, Use use) const {
    const int i0 = int(threadIdx.x) / 64 * 16;
    const int j0 = int(threadIdx.x) / 32 % 2 * 32;
    // Half of the threads copy x, the others y; chosen by the field, so that it stays in registers.
    const bool first = threadIdx.x < kThreads / 2;
    const DigitRows mine{first ? x.data : y.data, x.step, x.pitch, first ? x.size : y.size};
    const auto begin = [&](Index p0, int buffer) {
      begin_copies(first ? shared.x[buffer] : shared.y[buffer], mine, p0);
      ptx::end_copy_group();
    };
    Sums sums = {};
    int buffer = 0;
    if (x.pitch > 0) begin(0, buffer);
    for (Index p0 = 0; p0 < x.pitch; p0 += kDepth) {
      ptx::wait_for_copies<0>();
      // The slices are complete, and all have left the buffer that is filled next.
      __syncthreads();
      if (p0 + kDepth < x.pitch) begin(p0 + kDepth, buffer ^ 1);
      multiply_slices(buffer, i0, j0, sums);
      buffer ^= 1;
    }
    const int i1 = i0 + int(threadIdx.x) % 32 / 4;
    const int j1 = j0 + int(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = i1 + n / 2 * 8;
        const int j = j1 + 8 * f + n % 2;
        if (i < x.size && j < y.size) {
          use(i, j, weigh_sums([&](int weight) { return sums[weight][f][n]; }));
        }
      }
    }
  }
};

#endif

}  // namespace prolora
