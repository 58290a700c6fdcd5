// Says whether a GPU can be used, and if not why.
#include <cuda_runtime.h>

#include "launch.h"
#include "ops.h"

namespace prolora {

int cuda_device_count(std::string* why) {
  int count = 0;
  int driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) {
    *why = count > 0 ? "" : "no device found";
    return count;
  }
  // With no driver at all the runtime reports one that is too old.
  const bool no_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0;
  *why = no_driver ? "no NVIDIA driver is installed" : cudaGetErrorString(error);
  return 0;
}

}  // namespace prolora
