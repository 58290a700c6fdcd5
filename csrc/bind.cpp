// The only file that knows Python: addresses and sizes in, nothing of torch included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "ops.h"
#include "tile.h"

#ifndef PROLORA_MODULE_NAME
#define PROLORA_MODULE_NAME _C
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

// Of the functions in float and in double those that there are.
#define PROLORA_BOTH(op) op<float>, op<double>
#define PROLORA_FLOAT(op) op<float>, nullptr
#define PROLORA_DOUBLE(op) nullptr, op<double>
#define PROLORA_NONE(op) nullptr, nullptr
#ifdef PROLORA_CUDA
constexpr const char* kMissing = "there are no kernels for this precision";
#define PROLORA_ON_CUDA(there, op) PROLORA_##there(op)
#else
// A build without CUDA must not even name the functions of the GPU.
constexpr const char* kMissing = "this build has no CUDA kernels";
#define PROLORA_ON_CUDA(there, op) PROLORA_NONE(op)
#endif

template <class Args>
using OnCpu = void (*)(const Args&);
template <class Args>
using OnCuda = void (*)(const Args&, Address);

struct Request {
  const Numbers& numbers;
  bool float64, cuda;
  Address stream;
};

template <class Args>
void start(const Request& request, OnCpu<Args> on_cpu, OnCuda<Args> on_cuda) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) % sizeof(Index) == 0);
  if (request.numbers.size() != sizeof(Args) / sizeof(Index)) {
    throw std::invalid_argument(
        "run: this op takes " + std::to_string(sizeof(Args) / sizeof(Index)) +
        " addresses and sizes, not " + std::to_string(request.numbers.size()));
  }
  if (request.cuda ? on_cuda == nullptr : on_cpu == nullptr) {
    throw std::runtime_error(request.cuda ? kMissing : "run: not in this precision");
  }
  Args args;
  std::memcpy(&args, request.numbers.data(), sizeof(Args));
  py::gil_scoped_release release;
  if (request.cuda) {
    on_cuda(args, request.stream);
  } else {
    on_cpu(args);
  }
}

template <template <class> class Args>
void start_in(const Request& request, OnCpu<Args<float>> cpu32, OnCpu<Args<double>> cpu64,
              OnCuda<Args<float>> cuda32, OnCuda<Args<double>> cuda64) {
  if (request.float64) {
    start(request, cpu64, cuda64);
  } else {
    start(request, cpu32, cuda32);
  }
}

// Runs the op of this name on the addresses and sizes of its struct, in the struct's order.
void run(const std::string& op, const Numbers& numbers, bool float64, bool cuda, Address stream) {
  const Request request{numbers, float64, cuda, stream};
#define PROLORA_START(name, Args, CPU, CUDA)                                                       \
  if (op == #name) {                                                                               \
    return start_in<Args>(request, PROLORA_##CPU(name##_cpu), PROLORA_ON_CUDA(CUDA, name##_cuda)); \
  }
  PROLORA_OPS(PROLORA_START)
#undef PROLORA_START
  throw std::invalid_argument("run: there is no op " + op);
}

py::tuple devices() {
#ifdef PROLORA_CUDA
  std::string why;
  const auto capabilities = cuda_devices(&why);
#else
  const std::string why = kMissing;
  const std::vector<std::pair<int, int>> capabilities;
#endif
  return py::make_tuple(capabilities, why);
}

Index krylov_block_scratch(Index batch, Index d, Index n, Index size, Index width, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return krylov_block_scratch_cuda(batch, d, n, size, width);
#endif
  (void)batch, (void)d, (void)n, (void)size, (void)width, (void)cuda;
  return 0;
}

Index panel_qr_scratch(Index batch, Index r, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return panel_qr_scratch_cuda(batch, r);
#endif
  (void)batch, (void)r, (void)cuda;
  return 0;
}

Index small_svd_scratch(Index batch, Index m, Index n, bool vectors, bool float64, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return small_svd_scratch_cuda(batch, m, n, vectors, float64);
#endif
  (void)batch, (void)m, (void)n, (void)vectors, (void)float64, (void)cuda;
  return 0;
}

Index project_pair_scratch(Index batch, Index m, Index ks, Index kt, Index r, bool cuda) {
#ifdef PROLORA_CUDA
  if (cuda) return project_pair_scratch_cuda(batch, m, ks, kt, r);
#endif
  (void)m, (void)cuda;
  return batch * 2 * r * std::max(ks, kt);
}

std::pair<Index, Index> cut_depth(Index tiles, Index depth, Index blocks) {
  const DepthParts parts = depth_parts(tiles, depth, blocks);
  return {parts.count, parts.length};
}

}  // namespace

PYBIND11_MODULE(PROLORA_MODULE_NAME, m) {
  m.attr("interface") = PROLORA_INTERFACE;
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
  m.def("panel_qr_scratch", &panel_qr_scratch, arg("batch"), arg("r"), arg("cuda"),
        "Bytes of scratch that panel_qr needs.");
  m.def("small_svd_scratch", &small_svd_scratch, arg("batch"), arg("m"), arg("n"), arg("vectors"),
        arg("float64"), arg("cuda"), "Bytes of scratch that small_svd needs, or the values alone.");
  m.def("project_pair_scratch", &project_pair_scratch, arg("batch"), arg("m"), arg("ks"), arg("kt"),
        arg("r"), arg("cuda"), "Numbers of scratch that project_pair needs.");
  m.def("tridiagonalise_scratch", &tridiagonalise_scratch, arg("batch"), arg("d"), arg("float64"),
        "Bytes of scratch that tridiagonalise needs.");
  m.def("depth_parts", &cut_depth, arg("tiles"), arg("depth"), arg("blocks"),
        "The number and length of the parts that the depth of a product is cut into.");
  m.def("tensor_cores_pay", &tensor_cores_pay, arg("major"), arg("minor"),
        "Whether GPUs of this compute capability multiply float32 on tensor cores.");
}
