// What a .cu file needs to start a kernel: the two CUDA spellings that plain C++ cannot parse, the
// error check, the grid. Include it after <cuda_runtime.h>: the emulator's version of that header
// brings its own two macros.
#pragma once

#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef LAUNCH
// One untyped array behind every instance of a kernel template: differently typed ones would clash.
#define DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char shared_bytes[]; \
  T* name = reinterpret_cast<T*>(shared_bytes)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace prolora {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline cudaStream_t to_stream(std::uintptr_t address) {
  return reinterpret_cast<cudaStream_t>(address);
}

// The x dimension of a grid; the only one in use, since the others end at 65,535.
inline unsigned grid_size(std::int64_t blocks, const char* what) {
  if (blocks > INT_MAX) {
    throw std::runtime_error(std::string(what) + ": more than 2^31 - 1 blocks; split the batch");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace prolora
