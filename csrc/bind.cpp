// The only file that knows Python: addresses and sizes in, nothing of torch included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "ops.h"
#include "tile.h"

#ifndef MODULE_NAME
#define MODULE_NAME _C
#endif
#ifndef PROLORA_SOURCES
#define PROLORA_SOURCES ""
#endif
#ifndef PROLORA_CUDA_ARCHITECTURES
#define PROLORA_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;
using namespace prolora;
using py::arg;
using Address = std::uintptr_t;
using Numbers = std::vector<Index>;

namespace {

#ifdef PROLORA_CUDA
#define ON_CUDA(op, T) (&op##_cuda<T>)
#else
// A build without CUDA must not even name the functions of the GPU.
#define ON_CUDA(op, T) nullptr
constexpr const char* kNoCuda = "this build has no CUDA kernels";

std::vector<std::pair<int, int>> no_devices(std::string* why) {
  *why = kNoCuda;
  return {};
}
#define cuda_devices no_devices
#endif

template <class Args>
void start(const Numbers& numbers, void (*on_cpu)(const Args&),
           void (*on_cuda)(const Args&, Address), bool cuda, Address stream) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) % sizeof(Index) == 0);
  if (numbers.size() != sizeof(Args) / sizeof(Index)) {
    throw std::invalid_argument("run: this op takes " +
                                std::to_string(sizeof(Args) / sizeof(Index)) +
                                " addresses and sizes, not " + std::to_string(numbers.size()));
  }
  Args args;
  std::memcpy(&args, numbers.data(), sizeof(Args));
  py::gil_scoped_release release;
  if (!cuda) {
    on_cpu(args);
  } else if (on_cuda != nullptr) {
    on_cuda(args, stream);
  } else {
    throw std::runtime_error("prolora: this build has no CUDA kernels");
  }
}

// Runs the op of this name on the addresses and sizes of its struct, in the struct's order.
void run(const std::string& op, const Numbers& numbers, bool float64, bool cuda, Address stream) {
#define PROLORA_START(name, Args)                                                                \
  if (op == #name) {                                                                             \
    return float64 ? start<Args<double>>(numbers, &name##_cpu<double>, ON_CUDA(name, double),    \
                                         cuda, stream)                                           \
                   : start<Args<float>>(numbers, &name##_cpu<float>, ON_CUDA(name, float), cuda, \
                                        stream);                                                 \
  }
  PROLORA_OPS(PROLORA_START)
#undef PROLORA_START
  throw std::invalid_argument("run: there is no op " + op);
}

py::tuple devices() {
  std::string why;
  const auto capabilities = cuda_devices(&why);
  return py::make_tuple(capabilities, why);
}

Index krylov_block_scratch(Index batch, Index d, Index n, Index size, Index width, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return krylov_block_scratch_cuda(batch, d, n, size, width);
#endif
  (void)batch, (void)d, (void)n, (void)size, (void)width, (void)cuda;
  return 0;
}

Index panel_qr_scratch(Index batch, Index r, bool float64, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return panel_qr_scratch_cuda(batch, r);
#endif
  (void)batch, (void)r, (void)float64, (void)cuda;
  return 0;
}

Index small_svd_scratch(Index batch, Index m, Index n, bool vectors, bool float64, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return small_svd_scratch_cuda(batch, m, n, vectors, float64);
#endif
  (void)batch, (void)m, (void)n, (void)vectors, (void)float64, (void)cuda;
  return 0;
}

Index project_pair_scratch(Index batch, Index m, Index ks, Index kt, Index r, bool float64,
                           bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) {
    return float64 ? 0 : project_pair_scratch_cuda<float>(batch, m, ks, kt, r);
  }
#endif
  (void)m, (void)float64, (void)cuda;
  return batch * 2 * r * std::max(ks, kt);
}

std::pair<Index, Index> cut_depth(Index tiles, Index depth, Index blocks) {
  const DepthParts parts = depth_parts(tiles, depth, blocks);
  return {parts.count, parts.length};
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.attr("interface") = kInterface;
  m.attr("sources") = PROLORA_SOURCES;
  m.attr("cuda_architectures") = PROLORA_CUDA_ARCHITECTURES;
  m.attr("max_krylov_width") = kMaxKrylovWidth;
  m.attr("max_precise_depth") = kMaxPreciseDepth;
  m.attr("max_svd_columns") = kMaxSvdColumns;
  m.attr("max_tridiagonal") = kMaxTridiagonal;
  m.attr("overlap_block") = kOverlapBlock;
  m.def("cuda_devices", &devices,
        "The compute capabilities of the CUDA devices; why there are none.");
  m.def("run", &run, arg("op"), arg("numbers"), arg("float64"), arg("cuda"), arg("stream"),
        "Runs an op on the addresses and sizes of its struct in csrc/ops.h, in that order.");
  m.def("krylov_block_scratch", &krylov_block_scratch, arg("batch"), arg("d"), arg("n"),
        arg("size"), arg("width"), arg("cuda"), "Numbers of scratch that krylov_block needs.");
  m.def("panel_qr_scratch", &panel_qr_scratch, arg("batch"), arg("r"), arg("float64"), arg("cuda"),
        "Bytes of scratch that panel_qr needs.");
  m.def("small_svd_scratch", &small_svd_scratch, arg("batch"), arg("m"), arg("n"), arg("vectors"),
        arg("float64"), arg("cuda"), "Bytes of scratch that small_svd needs, or the values alone.");
  m.def("project_pair_scratch", &project_pair_scratch, arg("batch"), arg("m"), arg("ks"), arg("kt"),
        arg("r"), arg("float64"), arg("cuda"), "Numbers of scratch that project_pair needs.");
  m.def("tridiagonalise_scratch", &tridiagonalise_scratch, arg("batch"), arg("d"), arg("float64"),
        "Bytes of scratch that tridiagonalise needs.");
  m.def("depth_parts", &cut_depth, arg("tiles"), arg("depth"), arg("blocks"),
        "The number and length of the parts that the depth of a product is cut into.");
  m.def("tensor_cores_pay", &tensor_cores_pay, arg("major"), arg("minor"),
        "Whether GPUs of this compute capability multiply float32 on tensor cores.");
}
