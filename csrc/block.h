// One algorithm text for GPU and CPU. Algorithms are written against a block that offers
//   each(n, f)       run f(i) for i in [0, n), then wait for all of them
//   each_warp(n, f)  run f(warp, i) for n independent jobs, a warp each, then wait for all
// Both end with the block's barrier, whatever n is. So every thread of the block must reach them,
// with the same n, and what f wrote is there for all threads afterwards; within a call no f may
// read what another one writes.
// and a warp that offers
//   each(n, f)       run f(i) for i in [0, n); lane l takes i = l, l + 32, ... and nobody waits
//   max(n, f)        the largest f(i), known to every lane; 0 if n is 0
//   sum(n, f)        the sum of f(i), known to every lane
//   dot(n, x, y)     x·y, known to every lane
//   sync()           wait until every lane is here; what they wrote is there for all of them
//   in_order(n, f)   as each, one i of a lane after the other: f may add to variables of its lane,
//                    or hold many registers
//   total(x)         the sum over the lanes, known to every lane
//   partner(x, d)    the x of the lane whose number differs in bit d; a warp has kWidth lanes
// i has the type of n: int keeps the arithmetic of addresses at 32 bits.
// The Serial versions (serial.h) are the CPU backend; the Cuda versions run on a GPU or in the
// emulator. Every sum is taken in an order that depends on n alone, so results repeat bit by bit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(PROLORA_EMULATED)
#define PROLORA_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PROLORA_HOST_DEVICE inline __attribute__((always_inline))
#else
#define PROLORA_HOST_DEVICE inline
#endif

// Unrolls the next loop in full, so that what it indexes can stay in registers.
#ifdef __CUDACC__
#define PROLORA_UNROLL _Pragma("unroll")
#else
#define PROLORA_UNROLL
#endif

// The next loop is over lanes: of a CPU's vectors, or one of a GPU's threads alone.
#if defined(__CUDACC__) || !defined(__GNUC__)
#define PROLORA_LANES PROLORA_UNROLL
#else
#define PROLORA_LANES _Pragma("omp simd")
#endif

namespace prolora {

using Index = std::int64_t;

PROLORA_HOST_DEVICE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
// nvcc calls std::min and std::max in device code only with --expt-relaxed-constexpr.
PROLORA_HOST_DEVICE Index min_index(Index a, Index b) { return a < b ? a : b; }
PROLORA_HOST_DEVICE Index max_index(Index a, Index b) { return a > b ? a : b; }

// Quotient and remainder of a number of blocks, which fits in 32 bits as a grid does: a GPU divides
// 64 bits in a hundred instructions.
struct Division {
  Index quotient, rest;
};

PROLORA_HOST_DEVICE Division divide(Index number, Index by) {
  const auto n = static_cast<std::uint32_t>(number);
  const auto d = static_cast<std::uint32_t>(by);
  return {n / d, n % d};
}

#if defined(__CUDACC__) || defined(PROLORA_EMULATED)

struct CudaWarp {
  static constexpr unsigned kAll = 0xffffffffu;
  static constexpr int kWidth = 32;

  template <class I, class F>
  __device__ __forceinline__ void each(I n, F f) const {
#pragma unroll 2
    for (I i = I(threadIdx.x % 32); i < n; i += 32) f(i);
  }

  template <class I, class F>
  __device__ __forceinline__ void in_order(I n, F f) const {
#pragma unroll 1
    for (I i = I(threadIdx.x % 32); i < n; i += 32) f(i);
  }

  template <class T>
  static __device__ __forceinline__ T partner(T value, int d) {
    return __shfl_xor_sync(kAll, value, d);
  }

  __device__ __forceinline__ void sync() const { __syncwarp(); }

  // Butterfly: both partners add the same two numbers, so all lanes end with the same bits.
  template <class T>
  static __device__ __forceinline__ T total(T value) {
    for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAll, value, d);
    return value;
  }

  template <class T, class I, class F>
  __device__ __forceinline__ T sum(I n, F f) const {
    T partial = 0;
    each(n, [&](I i) { partial += f(i); });
    return total(partial);
  }

  template <class T, class I, class F>
  __device__ __forceinline__ T max(I n, F f) const {
    T largest = 0;
    auto take = [&](T value) { largest = value > largest ? value : largest; };
    each(n, [&](I i) { take(f(i)); });
    for (int d = 16; d > 0; d /= 2) take(__shfl_xor_sync(kAll, largest, d));
    return largest;
  }

  template <class T, class I>
  __device__ __forceinline__ T dot(I n, const T* x, const T* y) const {
    return sum<T>(n, [&](I i) { return x[i] * y[i]; });
  }
};

// Both calls are barriers (the contract above): never where threads of the block may be absent.
struct CudaBlock {
  template <class I, class F>
  __device__ __forceinline__ void each(I n, F f) const {
#pragma unroll 2
    for (I i = I(threadIdx.x); i < n; i += I(blockDim.x)) f(i);
    __syncthreads();
  }

  template <class I, class F>
  __device__ __forceinline__ void each_warp(I n, F f) const {
    for (I i = I(threadIdx.x / 32); i < n; i += I(blockDim.x / 32)) f(CudaWarp{}, i);
    __syncthreads();
  }
};

#endif

}  // namespace prolora
