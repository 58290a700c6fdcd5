// small_svd on a GPU: a block per matrix, a warp per pair of columns, up to 8 warps. The matrix and
// V live in shared memory if the device's opt-in limit allows it (float up to 128 x 128 on an A100,
// H100 or B200), else in scratch in global memory, which the L2 cache mostly holds.
#include <cuda_runtime.h>

#include "launch.h"
#include "small_svd.h"

namespace prolora {
namespace {

constexpr int kMaxThreads = 256;

// Two blocks per multiprocessor are as many as shared memory lets in for large matrices. Saying so
// also keeps ptxas from aiming at more and spilling registers for it.
template <class T, bool kShared>
__global__ void __launch_bounds__(kMaxThreads, 2) small_svd_kernel(SmallSvdArgs<T> args) {
  DYNAMIC_SHARED(std::byte, shared);
  const Index matrix = blockIdx.x;
  const Index m = args.m;
  const Index n = args.n;
  std::byte* memory = kShared ? shared : args.scratch + matrix * SvdWorkspace<T>::bytes(m, n);
  small_svd(CudaBlock{}, args.a + matrix * m * n, args.u + matrix * m * n, args.s + matrix * n,
            args.v + matrix * n * n, SvdWorkspace<T>::at(memory, m, n), m, int(n));
}

// Whole warps, one for each of the n/2 pairs that rotate at the same time.
int threads_for(Index n) { return 32 * int(smaller(ceil_div(n, 2), kMaxThreads / 32)); }

}  // namespace

template <class T>
Index small_svd_scratch_cuda(Index batch, Index m, Index n) {
  const Index bytes = SvdWorkspace<T>::bytes(m, n);
  return bytes <= shared_bytes_limit("small_svd: shared memory limit") ? 0 : batch * bytes;
}

template <class T>
void small_svd_cuda(const SmallSvdArgs<T>& args, std::uintptr_t stream) {
  if (args.batch == 0 || args.n == 0) return;
  const unsigned blocks = grid_size(args.batch, "small_svd");
  const int threads = threads_for(args.n);
  if (small_svd_scratch_cuda<T>(args.batch, args.m, args.n) == 0) {
    const int bytes = int(SvdWorkspace<T>::bytes(args.m, args.n));
    auto kernel = small_svd_kernel<T, true>;
    static SharedMemoryOptIn opt_in;
    opt_in.raise_limit(kernel, bytes, "small_svd: shared memory");
    LAUNCH(kernel, blocks, threads, bytes, to_stream(stream), args);
  } else {
    auto kernel = small_svd_kernel<T, false>;
    LAUNCH(kernel, blocks, threads, 0, to_stream(stream), args);
  }
  check(cudaGetLastError(), "small_svd: launch");
}

template Index small_svd_scratch_cuda<float>(Index, Index, Index);
template Index small_svd_scratch_cuda<double>(Index, Index, Index);
PROLORA_INSTANTIATE_CUDA(small_svd, SmallSvdArgs)

}  // namespace prolora
