// The only file that knows Python: addresses and sizes in, nothing of torch included or linked.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "ops.h"

#ifndef MODULE_NAME
#define MODULE_NAME _C
#endif

namespace py = pybind11;
using namespace prolora;
using py::arg;
using Address = std::uintptr_t;

namespace {

#ifdef PROLORA_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
constexpr const char* kNoCuda =
    "prolora was built without CUDA (PROLORA_CUDA=OFF, or no nvcc at build time)";
#endif

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

py::tuple cuda_status() {
#ifdef PROLORA_CUDA
  std::string why;
  const int count = cuda_device_count(&why);
  return py::make_tuple(count, why);
#else
  return py::make_tuple(0, kNoCuda);
#endif
}

// cpu() or cuda(), whichever is asked for and there. A macro, since a build without CUDA must not
// even name the functions of the other one.
#ifdef PROLORA_CUDA
#define ON_DEVICE(cuda, on_cpu, on_cuda) ((cuda) ? (on_cuda) : (on_cpu))
#else
#define ON_DEVICE(cuda, on_cpu, on_cuda) \
  ((cuda) ? throw std::runtime_error(kNoCuda) : (void)stream, (on_cpu))
#endif

template <class T>
void split_project_of(Address u, Address x, Address coefficients, Address par, Address perp,
                      Index batch, Index m, Index k, Index r, bool cuda, Address stream) {
  const SplitProjectArgs<T> args{pointer<const T>(u),
                                 pointer<const T>(x),
                                 pointer<T>(coefficients),
                                 pointer<T>(par),
                                 pointer<T>(perp),
                                 batch,
                                 m,
                                 k,
                                 r};
  py::gil_scoped_release release;
  ON_DEVICE(cuda, split_project_cpu(args), split_project_cuda(args, stream));
}

void split_project(Address u, Address x, Address coefficients, Address par, Address perp,
                   Index batch, Index m, Index k, Index r, bool float64, bool cuda,
                   Address stream) {
  auto run = float64 ? split_project_of<double> : split_project_of<float>;
  run(u, x, coefficients, par, perp, batch, m, k, r, cuda, stream);
}

template <class T>
void overlap_of(Address us, Address ut, Address partial, Address out, Index batch, Index m,
                Index ks, Index kt, bool cuda, Address stream) {
  const OverlapArgs<T> args{pointer<const T>(us),
                            pointer<const T>(ut),
                            pointer<double>(partial),
                            pointer<double>(out),
                            batch,
                            m,
                            ks,
                            kt};
  py::gil_scoped_release release;
  ON_DEVICE(cuda, overlap_cpu(args), overlap_cuda(args, stream));
}

void overlap(Address us, Address ut, Address partial, Address out, Index batch, Index m, Index ks,
             Index kt, bool float64, bool cuda, Address stream) {
  auto run = float64 ? overlap_of<double> : overlap_of<float>;
  run(us, ut, partial, out, batch, m, ks, kt, cuda, stream);
}

template <class T>
Index overlap_tiles_of(Index ks, Index kt, bool cuda) {
  constexpr Address stream = 0;
  (void)stream;
  return ON_DEVICE(cuda, overlap_tiles_cpu<T>(ks, kt), overlap_tiles_cuda<T>(ks, kt));
}

Index overlap_tiles(Index ks, Index kt, bool float64, bool cuda) {
  return float64 ? overlap_tiles_of<double>(ks, kt, cuda) : overlap_tiles_of<float>(ks, kt, cuda);
}

template <class T>
void overlap_table_of(Address groups, Address table, Address edges, Address shells, Index count,
                      Index blocks, Index strips, bool cuda, Address stream) {
  const OverlapTableArgs<T> args{pointer<const OverlapGroup<T>>(groups),
                                 pointer<double>(table),
                                 pointer<double>(edges),
                                 pointer<double>(shells),
                                 count,
                                 blocks,
                                 strips};
  py::gil_scoped_release release;
  ON_DEVICE(cuda, overlap_table_cpu(args), overlap_table_cuda(args, stream));
}

void overlap_table(Address groups, Address table, Address edges, Address shells, Index count,
                   Index blocks, Index strips, bool float64, bool cuda, Address stream) {
  auto run = float64 ? overlap_table_of<double> : overlap_table_of<float>;
  run(groups, table, edges, shells, count, blocks, strips, cuda, stream);
}

template <class T>
void project_pair_of(Address us, Address ut, Address x, Address coefficients, Address split,
                     Address moved, Index batch, Index m, Index ks, Index kt, Index r, bool cuda,
                     Address stream) {
  const ProjectPairArgs<T> args{pointer<const T>(us),
                                pointer<const T>(ut),
                                pointer<const T>(x),
                                pointer<T>(coefficients),
                                pointer<T>(split),
                                pointer<T>(moved),
                                batch,
                                m,
                                ks,
                                kt,
                                r};
  py::gil_scoped_release release;
  ON_DEVICE(cuda, project_pair_cpu(args), project_pair_cuda(args, stream));
}

void project_pair(Address us, Address ut, Address x, Address coefficients, Address split,
                  Address moved, Index batch, Index m, Index ks, Index kt, Index r, bool float64,
                  bool cuda, Address stream) {
  auto run = float64 ? project_pair_of<double> : project_pair_of<float>;
  run(us, ut, x, coefficients, split, moved, batch, m, ks, kt, r, cuda, stream);
}

template <class T>
void panel_qr_of(Address panel, Address q, Address l, Address rank, Address scratch, Index batch,
                 Index r, Index m, bool cuda, Address stream) {
  const PanelQrArgs<T> args{pointer<const T>(panel),
                            pointer<T>(q),
                            pointer<T>(l),
                            pointer<Index>(rank),
                            pointer<double>(scratch),
                            batch,
                            r,
                            m};
  py::gil_scoped_release release;
  ON_DEVICE(cuda, panel_qr_cpu(args), panel_qr_cuda(args, stream));
}

void panel_qr(Address panel, Address q, Address l, Address rank, Address scratch, Index batch,
              Index r, Index m, bool float64, bool cuda, Address stream) {
  auto run = float64 ? panel_qr_of<double> : panel_qr_of<float>;
  run(panel, q, l, rank, scratch, batch, r, m, cuda, stream);
}

template <class T>
void small_svd_of(Address a, Address u, Address s, Address v, Address scratch, Index batch, Index m,
                  Index n, bool cuda, Address stream) {
  const SmallSvdArgs<T> args{pointer<const T>(a),
                             pointer<T>(u),
                             pointer<T>(s),
                             pointer<T>(v),
                             pointer<std::byte>(scratch),
                             batch,
                             m,
                             n};
  py::gil_scoped_release release;
  ON_DEVICE(cuda, small_svd_cpu(args), small_svd_cuda(args, stream));
}

void small_svd(Address a, Address u, Address s, Address v, Address scratch, Index batch, Index m,
               Index n, bool float64, bool cuda, Address stream) {
  auto run = float64 ? small_svd_of<double> : small_svd_of<float>;
  run(a, u, s, v, scratch, batch, m, n, cuda, stream);
}

template <class T>
Index small_svd_scratch_of(Index batch, Index m, Index n, bool cuda) {
  constexpr Address stream = 0;
  (void)stream;
  return ON_DEVICE(cuda, Index(0), small_svd_scratch_cuda<T>(batch, m, n));
}

Index small_svd_scratch(Index batch, Index m, Index n, bool float64, bool cuda) {
  return float64 ? small_svd_scratch_of<double>(batch, m, n, cuda)
                 : small_svd_scratch_of<float>(batch, m, n, cuda);
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  m.attr("built_with_cuda") = kBuiltWithCuda;
  m.attr("max_svd_columns") = kMaxSvdColumns;
  m.attr("overlap_block") = kOverlapBlock;
  m.def("cuda_status", &cuda_status, "(number of usable devices, why there is none)");
  m.def("cpu_isa", &cpu_isa, "The instruction set that the CPU ops use.");
  m.def("cpu_has_tiles", &cpu_has_tiles,
        "Whether overlap_table uses the processor's matrix tiles.");
  m.def("split_project", &split_project, arg("u"), arg("x"), arg("coefficients"), arg("par"),
        arg("perp"), arg("batch"), arg("m"), arg("k"), arg("r"), arg("float64"), arg("cuda"),
        arg("stream"));
  m.def("overlap", &overlap, arg("us"), arg("ut"), arg("partial"), arg("out"), arg("batch"),
        arg("m"), arg("ks"), arg("kt"), arg("float64"), arg("cuda"), arg("stream"));
  m.def("overlap_tiles", &overlap_tiles, arg("ks"), arg("kt"), arg("float64"), arg("cuda"),
        "How many partial sums overlap() writes per matrix.");
  m.def("overlap_table", &overlap_table, arg("groups"), arg("table"), arg("edges"), arg("shells"),
        arg("count"), arg("blocks"), arg("strips"), arg("float64"), arg("cuda"), arg("stream"));
  m.def("project_pair", &project_pair, arg("us"), arg("ut"), arg("x"), arg("coefficients"),
        arg("split"), arg("moved"), arg("batch"), arg("m"), arg("ks"), arg("kt"), arg("r"),
        arg("float64"), arg("cuda"), arg("stream"));
  m.def("panel_qr", &panel_qr, arg("panel"), arg("q"), arg("l"), arg("rank"), arg("scratch"),
        arg("batch"), arg("r"), arg("m"), arg("float64"), arg("cuda"), arg("stream"));
  m.def("panel_qr_scratch", &panel_qr_scratch, arg("r"),
        "Doubles of scratch that panel_qr() needs for a panel.");
  m.def("small_svd", &small_svd, arg("a"), arg("u"), arg("s"), arg("v"), arg("scratch"),
        arg("batch"), arg("m"), arg("n"), arg("float64"), arg("cuda"), arg("stream"));
  m.def("small_svd_scratch", &small_svd_scratch, arg("batch"), arg("m"), arg("n"), arg("float64"),
        arg("cuda"), "Bytes of scratch that small_svd() needs.");
}
