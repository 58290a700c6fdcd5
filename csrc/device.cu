// Which GPUs there are, and if none why.
#include <cuda_runtime.h>

#include "launch.h"
#include "ops.h"

namespace prolora {

std::vector<std::pair<int, int>> cuda_devices(std::string* why) {
  int count = 0;
  int driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    // With no driver at all the runtime reports one that is too old.
    const bool no_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0;
    *why = no_driver ? "no NVIDIA driver is installed" : cudaGetErrorString(error);
    count = 0;
  } else if (count == 0) {
    *why = "no device found";
  }
  std::vector<std::pair<int, int>> capabilities(static_cast<std::size_t>(count));
  for (int device = 0; device < count; ++device) {
    auto& [major, minor] = capabilities[static_cast<std::size_t>(device)];
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "capability");
  }
  return capabilities;
}

}  // namespace prolora
