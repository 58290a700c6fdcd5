// panel_qr on a GPU: a block of 256 threads per panel, a warp per inner product.
#include <cuda_runtime.h>

#include "launch.h"
#include "panel_qr.h"

namespace prolora {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads, 2) panel_qr_kernel(PanelQrArgs<T> args) {
  const Index matrix = blockIdx.x;
  const Index r = args.r;
  const Index m = args.m;
  panel_qr(CudaBlock{}, args.panel + matrix * r * m, args.q + matrix * r * m,
           args.l + matrix * r * r, args.rank + matrix,
           PanelWorkspace::at(args.scratch + matrix * PanelWorkspace::doubles(r), r), r, m);
}

}  // namespace

template <class T>
void panel_qr_cuda(const PanelQrArgs<T>& args, std::uintptr_t stream) {
  if (args.batch == 0) return;
  LAUNCH(panel_qr_kernel<T>, grid_size(args.batch, "panel_qr"), kThreads, 0, to_stream(stream),
         args);
  check(cudaGetLastError(), "panel_qr: launch");
}

PROLORA_INSTANTIATE_CUDA(panel_qr, PanelQrArgs)

}  // namespace prolora
