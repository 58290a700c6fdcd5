// panel_qr on a GPU: a block of up to 384 threads per panel, one launch a batch. The r x r matrices
// lie in shared memory if the device's opt-in limit allows it (r = 64: 34 KiB, r = 128: 133 KiB,
// which an A100, H100 or B200 has), else in scratch in global memory.
#include <cuda_runtime.h>

#include "launch.h"
#include "panel_qr.h"

namespace prolora {
namespace {

constexpr int kMaxWarps = 12;

// One block a multiprocessor: batches are smaller than the number of those.
template <class T, bool kShared>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) panel_qr_kernel(PanelQrArgs<T> args) {
  DYNAMIC_SHARED(std::byte, shared);
  const Index matrix = blockIdx.x;
  const int r = int(args.r);
  const int m = int(args.m);
  std::byte* memory = kShared ? shared : args.scratch + matrix * PanelWorkspace<T>::bytes(r);
  panel_qr(CudaBlock{}, args.panel + matrix * r * m, args.scale ? args.scale[matrix] : 0.0,
           args.q + matrix * r * m, args.l + matrix * r * r, args.rank + matrix,
           PanelWorkspace<T>::at(memory, r), r, m);
}

// As many as the sums or the substitution can use; the result does not depend on it.
template <class T>
int threads_for(Index r, Index m) {
  const Index side = ceil_div(r, 4);
  const Index sums = side * (side + 1) / 2;
  const Index columns = ceil_div(m, 32 * PanelPack<T>::kSize);
  return 32 * int(smaller(kMaxWarps, sums > columns ? sums : columns));
}

}  // namespace

Index panel_qr_scratch_cuda(Index batch, Index r, bool float64) {
  const Index bytes =
      float64 ? PanelWorkspace<double>::bytes(int(r)) : PanelWorkspace<float>::bytes(int(r));
  return bytes <= shared_bytes_limit("panel_qr: shared memory limit") ? 0 : batch * bytes;
}

template <class T>
void panel_qr_cuda(const PanelQrArgs<T>& args, std::uintptr_t stream) {
  if (args.batch == 0) return;
  const unsigned blocks = grid_size(args.batch, "panel_qr");
  const int threads = args.r > 0 ? threads_for<T>(args.r, args.m) : 32;
  if (panel_qr_scratch_cuda(args.batch, args.r, sizeof(T) == 8) == 0) {
    const int bytes = int(PanelWorkspace<T>::bytes(int(args.r)));
    auto kernel = panel_qr_kernel<T, true>;
    static SharedMemoryOptIn opt_in;
    opt_in.raise_limit(kernel, bytes, "panel_qr: shared memory");
    LAUNCH(kernel, blocks, threads, bytes, to_stream(stream), args);
  } else {
    auto kernel = panel_qr_kernel<T, false>;
    LAUNCH(kernel, blocks, threads, 0, to_stream(stream), args);
  }
  check(cudaGetLastError(), "panel_qr: launch");
}

PROLORA_INSTANTIATE_CUDA(panel_qr, PanelQrArgs)

}  // namespace prolora
