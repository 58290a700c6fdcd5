// small_svd and small_singular_values on a GPU: a block per matrix, a warp per pair of columns. The
// matrix and V live in shared memory if the device's opt-in limit allows it, else in scratch in
// global memory, which the L2 cache mostly holds. At 128 x 128 an A100, H100 or B200 has room for
// both in float, and for the matrix without V in double.
#include <cuda_runtime.h>

#include "launch.h"
#include "small_svd.h"

namespace prolora {
namespace {

// Addresses of global memory take registers that 1024 threads do not have.
template <bool kShared>
constexpr int kMaxThreads = kShared ? 1024 : 512;

template <class T, bool kShared, bool kVectors>
__global__ void __launch_bounds__(kMaxThreads<kShared>, 1) small_svd_kernel(SmallSvdArgs<T> args) {
  PROLORA_DYNAMIC_SHARED(std::byte, shared);
  const Index matrix = blockIdx.x;
  const int m = int(args.m);
  const int n = int(args.n);
  std::byte* memory =
      kShared ? shared : args.scratch + matrix * SvdWorkspace<T>::bytes(m, n, kVectors);
  const Index entries = Index(m) * n;
  small_svd<kVectors>(CudaBlock{}, args.a + matrix * entries,
                      kVectors ? args.u + matrix * entries : nullptr, args.s + matrix * n,
                      kVectors ? args.v + matrix * n * n : nullptr,
                      SvdWorkspace<T>::at(memory, m, n, kVectors), m, n);
}

// Whole warps, at most one for each of the n/2 pairs that rotate at the same time. A large matrix
// fills a multiprocessor's shared memory alone, so it brings all the threads that can use it; of
// small ones several share it.
int threads_for(Index n, int max_threads) {
  const Index most = n > 64 ? 32 : n > 32 ? 16 : 8;
  return int(min_index(32 * min_index(ceil_div(n, 2), most), max_threads));
}

template <class T>
Index svd_scratch(Index batch, Index m, Index n, bool vectors) {
  const Index bytes = SvdWorkspace<T>::bytes(m, n, vectors);
  return bytes <= shared_bytes_limit("small_svd: shared memory limit") ? 0 : batch * bytes;
}

template <bool kVectors, class T>
void launch_svd(const SmallSvdArgs<T>& args, std::uintptr_t stream) {
  if (args.batch == 0 || args.n == 0) return;
  check_svd_size(args.m, args.n);
  const unsigned blocks = grid_size(args.batch, "small_svd");
  if (svd_scratch<T>(args.batch, args.m, args.n, kVectors) == 0) {
    const int bytes = int(SvdWorkspace<T>::bytes(args.m, args.n, kVectors));
    auto kernel = small_svd_kernel<T, true, kVectors>;
    static SharedMemoryOptIn opt_in;
    opt_in.raise_limit(kernel, bytes, "small_svd: shared memory");
    PROLORA_LAUNCH(kernel, blocks, threads_for(args.n, kMaxThreads<true>), bytes, to_stream(stream),
                   args);
  } else {
    auto kernel = small_svd_kernel<T, false, kVectors>;
    PROLORA_LAUNCH(kernel, blocks, threads_for(args.n, kMaxThreads<false>), 0, to_stream(stream),
                   args);
  }
  check(cudaGetLastError(), "small_svd: launch");
}

}  // namespace

Index small_svd_scratch_cuda(Index batch, Index m, Index n, bool vectors, bool float64) {
  return float64 ? svd_scratch<double>(batch, m, n, vectors)
                 : svd_scratch<float>(batch, m, n, vectors);
}

template <class T>
void small_svd_cuda(const SmallSvdArgs<T>& args, std::uintptr_t stream) {
  launch_svd<true>(args, stream);
}

template <class T>
void small_singular_values_cuda(const SmallSingularValuesArgs<T>& args, std::uintptr_t stream) {
  launch_svd<false>(without_vectors(args), stream);
}

template void small_svd_cuda(const SmallSvdArgs<float>&, std::uintptr_t);
template void small_svd_cuda(const SmallSvdArgs<double>&, std::uintptr_t);
template void small_singular_values_cuda(const SmallSingularValuesArgs<float>&, std::uintptr_t);
template void small_singular_values_cuda(const SmallSingularValuesArgs<double>&, std::uintptr_t);

}  // namespace prolora
