// What a .cu file needs to start a kernel: the two CUDA spellings that plain C++ cannot parse, the
// error check, the grid, shared memory. Include it after <cuda_runtime.h>: the emulator's version
// of that header brings its own two macros.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifndef PROLORA_LAUNCH
// One untyped array behind every instance of a kernel template: differently typed ones would clash.
#define PROLORA_DYNAMIC_SHARED(T, name)                         \
  extern __shared__ __align__(16) unsigned char shared_bytes[]; \
  T* name = reinterpret_cast<T*>(shared_bytes)
#define PROLORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
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

inline int current_device(const char* what) {
  int device = 0;
  check(cudaGetDevice(&device), what);
  return device;
}

// An attribute of the current device, asked for once. The emulator's change from call to call.
inline int device_attribute(cudaDeviceAttr attribute, const char* what) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;
  const int device = current_device(what);
  const std::pair<int, int> key(device, int(attribute));
  const std::lock_guard<std::mutex> lock(mutex);
#ifndef PROLORA_EMULATED
  if (const auto found = known.find(key); found != known.end()) return found->second;
#endif
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return known[key] = value;
}

// The most shared memory that a block may opt in to on the current device.
inline int shared_bytes_limit(const char* what) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, what);
}

// Lets one kernel take more shared memory than the 48 KB it has without asking. Keep one of these
// beside each kernel: the limit goes to the device's maximum, once per device, so that a launch
// never meets the smaller limit that another thread has just set.
class SharedMemoryOptIn {
 public:
  template <class Kernel>
  void raise_limit(Kernel* kernel, int bytes, const char* what) {
    if (bytes <= kWithoutAsking) return;
    const std::size_t device = static_cast<std::size_t>(current_device(what));
    const std::lock_guard<std::mutex> lock(mutex_);
    if (device < raised_.size() && raised_[device]) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes_limit(what)),
          what);
    if (raised_.size() <= device) raised_.resize(device + 1);
    raised_[device] = true;
  }

 private:
  static constexpr int kWithoutAsking = 48 << 10;
  std::mutex mutex_;
  std::vector<bool> raised_;  // by device
};

}  // namespace prolora
