// panel_qr on a GPU: a block of up to 384 threads per panel, one launch a batch. The r x r matrices
// lie in shared memory if the device's opt-in limit allows it (r = 64: 34 KiB, r = 128: 133 KiB,
// which an A100, H100 or B200 has), else in scratch in global memory.
#include <cuda_runtime.h>

#include "launch.h"
#include "panel_qr.h"

namespace prolora {
namespace {

// One block a multiprocessor: batches are smaller than the number of those.
template <bool kShared>
__global__ void __launch_bounds__(32 * kPanelWarps, 1) panel_qr_kernel(PanelQrArgs<float> args) {
  PROLORA_DYNAMIC_SHARED(std::byte, shared);
  const Index matrix = blockIdx.x;
  const int r = int(args.r);
  const int m = int(args.m);
  std::byte* memory = kShared ? shared : args.scratch + matrix * PanelWorkspace::bytes(r);
  panel_qr(CudaBlock{}, args.panel + matrix * r * m, args.scale ? args.scale[matrix] : 0.0,
           args.q + matrix * r * m, args.l + matrix * r * r, args.rank + matrix,
           PanelWorkspace::at(memory, r), r, m);
}

}  // namespace

Index panel_qr_scratch_cuda(Index batch, Index r) {
  const Index bytes = PanelWorkspace::bytes(int(r));
  return bytes <= shared_bytes_limit("panel_qr: shared memory limit") ? 0 : batch * bytes;
}

template <>
void panel_qr_cuda(const PanelQrArgs<float>& args, std::uintptr_t stream) {
  if (args.batch == 0) return;
  const unsigned blocks = grid_size(args.batch, "panel_qr");
  const int threads = args.r > 0 ? panel_threads(args.r, args.m) : 32;
  if (panel_qr_scratch_cuda(args.batch, args.r) == 0) {
    const int bytes = int(PanelWorkspace::bytes(int(args.r)));
    auto kernel = panel_qr_kernel<true>;
    static SharedMemoryOptIn opt_in;
    opt_in.raise_limit(kernel, bytes, "panel_qr: shared memory");
    PROLORA_LAUNCH(kernel, blocks, threads, bytes, to_stream(stream), args);
  } else {
    auto kernel = panel_qr_kernel<false>;
    PROLORA_LAUNCH(kernel, blocks, threads, 0, to_stream(stream), args);
  }
  check(cudaGetLastError(), "panel_qr: launch");
}

}  // namespace prolora
