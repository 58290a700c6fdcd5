// The ops of tridiagonal.h on a GPU: a block reduces a matrix, which the L2 cache mostly holds; a
// thread finds an eigenvalue and its vector. Threads side by side read and write side by side.
#include <cuda_runtime.h>

#include <stdexcept>
#include <type_traits>

#include "launch.h"
#include "tridiagonal.h"

namespace prolora {
namespace {

constexpr int kReduceThreads = 512;
constexpr int kValueThreads = 64;

// A warp a row of the product. The matrix stays whole, so that rows are read side by side.
struct CudaProducts {
  template <class Block, class T>
  __device__ void multiply(const Block& block, const T* a, const T* v, T* p, int first,
                           int d) const {
    block.each_warp(d - first, [&](const auto& warp, int i) {
      const T* row = a + Index(first + i) * d + first;
      const T sum = warp.template dot<T>(d - first, row, v + first);
      warp.each(1, [&](int) { p[first + i] = sum; });
    });
  }

  template <class Block, class T>
  __device__ void update(const Block& block, T* a, const PanelVectors<T>& panel, int count,
                         int first, int d) const {
    block.each_warp(d - first, [&](const auto& warp, int i) {
      T* row = a + Index(first + i) * d + first;
      warp.in_order(d - first, [&](int c) {
        T sum = 0;
        for (int s = 0; s < count; ++s) {
          const T* v = panel.v_row(s) + first;
          const T* w = panel.w_row(s) + first;
          sum += v[i] * w[c] + w[i] * v[c];
        }
        row[c] -= sum;
      });
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kReduceThreads, 1) reduce_kernel(TridiagonaliseArgs<T> args) {
  reduce_matrix(CudaBlock{}, CudaProducts{}, args, blockIdx.x);
}

__global__ void __launch_bounds__(kValueThreads) values_kernel(TridiagonalValuesArgs<double> args) {
  const Index job = Index(blockIdx.x) * kValueThreads + threadIdx.x;
  if (job >= args.batch * args.count) return;
  const Division at = divide(job, args.count);
  const Tridiagonal t = tridiagonal_of(args, at.quotient);
  bisect<1>(t, gershgorin(t), int(at.rest), args.values + job);
}

__global__ void __launch_bounds__(kValueThreads)
    vectors_kernel(TridiagonalVectorsArgs<double> args) {
  const Index jobs = args.batch * args.count;
  const Index job = Index(blockIdx.x) * kValueThreads + threadIdx.x;
  if (job >= jobs) return;
  const Tridiagonal t = tridiagonal_of(args, divide(job, args.count).quotient);
  double* top = args.scratch + job;
  double* vector = top + 2 * jobs * t.n;
  double square = 1;
  twist<1>(t, smallest_pivot(t), args.values + job, top, top + jobs * t.n, vector, jobs, &square);
  const double unit = 1 / std::sqrt(square);
  for (int i = 0; i < t.n; ++i) args.vectors[job * t.n + i] = unit_entry(vector[i * jobs], unit);
}

template <class T>
void require_float64() {
  if (std::is_same_v<T, float>) throw std::runtime_error("tridiagonal: float64 alone");
}

}  // namespace

template <class T>
void tridiagonalise_cuda(const TridiagonaliseArgs<T>& args, std::uintptr_t stream) {
  if (args.batch == 0) return;
  check_tridiagonal_size(args.d);
  auto kernel = reduce_kernel<T>;
  LAUNCH(kernel, grid_size(args.batch, "tridiagonalise"), kReduceThreads, 0, to_stream(stream),
         args);
  check(cudaGetLastError(), "tridiagonalise: launch");
}

template <class T>
void tridiagonal_values_cuda(const TridiagonalValuesArgs<T>& args, std::uintptr_t stream) {
  require_float64<T>();
  if constexpr (std::is_same_v<T, double>) {
    if (args.batch * args.count == 0) return;
    const unsigned blocks =
        grid_size(ceil_div(args.batch * args.count, kValueThreads), "tridiagonal_values");
    LAUNCH(values_kernel, blocks, kValueThreads, 0, to_stream(stream), args);
    check(cudaGetLastError(), "tridiagonal_values: launch");
  }
}

template <class T>
void tridiagonal_vectors_cuda(const TridiagonalVectorsArgs<T>& args, std::uintptr_t stream) {
  require_float64<T>();
  if constexpr (std::is_same_v<T, double>) {
    if (args.batch * args.count == 0) return;
    const unsigned blocks =
        grid_size(ceil_div(args.batch * args.count, kValueThreads), "tridiagonal_vectors");
    LAUNCH(vectors_kernel, blocks, kValueThreads, 0, to_stream(stream), args);
    check(cudaGetLastError(), "tridiagonal_vectors: launch");
  }
}

PROLORA_INSTANTIATE_CUDA(tridiagonalise, TridiagonaliseArgs)
PROLORA_INSTANTIATE_CUDA(tridiagonal_values, TridiagonalValuesArgs)
PROLORA_INSTANTIATE_CUDA(tridiagonal_vectors, TridiagonalVectorsArgs)

}  // namespace prolora
