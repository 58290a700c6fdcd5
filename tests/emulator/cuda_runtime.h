// Stands in for CUDA's own <cuda_runtime.h> where the .cu files are compiled for the host.
// Add functions as kernels need them.
#pragma once

#include "emulator.h"
#include "ptx_model.h"

#define PROLORA_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Kernels here hold shared memory through PROLORA_DYNAMIC_SHARED alone, because that can be filled
// with NaN before every block; a static variable would keep what the block before it left.
#define __shared__ use_PROLORA_DYNAMIC_SHARED_instead_of_static_shared_memory

#define threadIdx (prolora::emulator::running.current->thread)
#define blockIdx (prolora::emulator::running.index)
#define blockDim (prolora::emulator::running.size)
#define gridDim (prolora::emulator::running.grid_size)

#define PROLORA_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(prolora::emulator::running.dynamic_shared.data())
#define PROLORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  prolora::emulator::launch(grid, block, shared_bytes, reinterpret_cast<const void*>(+(kernel)), \
                            [&] {                                                                \
                              (void)(stream);                                                    \
                              kernel(__VA_ARGS__);                                               \
                            })

#define __align__(bytes) alignas(bytes)

inline void __syncthreads() { prolora::emulator::suspend(prolora::emulator::Wait::Block, 0); }

inline int __syncthreads_count(int predicate) {
  return prolora::emulator::wait_and_count(predicate != 0);
}

inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }

inline void __syncwarp(unsigned mask = ~0u) { prolora::emulator::wait_for_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return prolora::emulator::shuffle(mask, value, source % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const int lane = prolora::emulator::running.current->lane;
  return prolora::emulator::shuffle(mask, value, lane ^ lane_mask);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int lane = prolora::emulator::running.current->lane;
  return prolora::emulator::shuffle(mask, value, lane + delta < 32 ? lane + delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return prolora::emulator::collective(mask, predicate != 0, [&](auto value_of) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (prolora::emulator::takes_part(mask, lane)) votes |= unsigned(value_of(lane)) << lane;
    }
    return votes;
  });
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid value (emulated)";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(prolora::emulator::max_shared_bytes());
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = int(prolora::emulator::from_environment("EMU_PROCESSORS", 132));
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = prolora::emulator::compute_capability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = prolora::emulator::compute_capability() % 10;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int attribute, int value) {
  const bool fits = value >= 0 && std::size_t(value) <= prolora::emulator::max_shared_bytes();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || !fits) {
    return cudaErrorInvalidValue;
  }
  prolora::emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}
