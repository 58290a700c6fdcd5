// The native ops as plain C++ functions: what bind.cpp offers to Python. Every pointer is to dense,
// row-major memory on the device the function is named after; T is float or double. Nothing here
// allocates device memory: outputs and scratch come from the caller.
//
// An op is its struct of arguments, a line in PROLORA_OPS, its algorithm (<op>.h), its kernels
// (<op>.cu), its loop over the cores (cpu.cpp) and its Python side (core/ops/<op>.py). Python knows
// this file by its hash (INTERFACE in core/ops/native.py), so that it notices an extension that was
// built from another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// The one list of ops: name, struct of arguments, what there is of it on a CPU and on a GPU.
#define PROLORA_OPS(OP)                                          \
  OP(cut_side, CutSideArgs, DOUBLE, NONE)                        \
  OP(krylov_block, KrylovBlockArgs, FLOAT, FLOAT)                \
  OP(multiply_reduced, MultiplyReducedArgs, DOUBLE, NONE)        \
  OP(panel_qr, PanelQrArgs, FLOAT, FLOAT)                        \
  OP(precise_product, PreciseProductArgs, FLOAT, FLOAT)          \
  OP(project_pair, ProjectPairArgs, BOTH, FLOAT)                 \
  OP(small_singular_values, SmallSingularValuesArgs, BOTH, BOTH) \
  OP(small_svd, SmallSvdArgs, BOTH, BOTH)                        \
  OP(subspace_overlap, SubspaceOverlapArgs, BOTH, FLOAT)         \
  OP(tridiagonal_values, TridiagonalValuesArgs, DOUBLE, NONE)    \
  OP(tridiagonal_vectors, TridiagonalVectorsArgs, DOUBLE, NONE)  \
  OP(tridiagonalise, TridiagonaliseArgs, BOTH, NONE)

namespace prolora {

using Index = std::int64_t;

// The structs hold pointers and Index alone: Python writes them as a row of int64 numbers.
static_assert(sizeof(void*) == sizeof(Index), "prolora needs a 64-bit machine");

// subspace_overlap cuts Usᵀ Ut into blocks of this many rows and columns.
constexpr Index kOverlapBlock = 64;

// A stack of pairs of one shape.
template <class T>
struct OverlapGroup {
  const T* us;  // [batch, m, ks]
  const T* ut;  // [batch, m, kt]
  Index batch, m, ks, kt;
  Index first_block;  // of the group, counted over the blocks of Usᵀ Ut of all groups
};

template <class T>
struct SubspaceOverlapArgs {
  const OverlapGroup<T>* groups;  // [count], on the device too
  double* sums;                   // [blocks], of squares: group, matrix, row, column
  Index count, blocks;
};

// The widest block of krylov_block: its panel's matrices fit in any GPU's shared memory.
constexpr Index kMaxKrylovWidth = 64;

// How an operand is stored: krylov_block takes the first two, precise_product all.
enum class StoredAs : Index { kFloat16, kBfloat16, kFloat32, kFloat64 };

template <class T>
struct KrylovBlockArgs {
  const void* w;    // [batch, d, n], or [batch, n, d] where it is transposed
  T* rows;          // [batch, room, d], `size` of them known; the next `width` are written
  T* projected;     // [batch, room, room], rows size - width to size of it are written
  double* length;   // [batch], of what G adds
  double* lengths;  // [batch, 2, width], scratch: of its rows, and of the coefficients'
  T* images;        // [batch, width, n], scratch: the block times W
  T* image;         // [batch, width, d], scratch: what G adds
  T* coefficients;  // [batch, width, size], scratch
  T* parts;         // krylov_block_scratch_cuda numbers of scratch
  T* l;             // [batch, width, width], scratch
  Index* rank;      // [batch], scratch
  Index batch, d, n, room, size, width, stored, transposed;
};

template <class T>
struct PanelQrArgs {
  const T* panel;       // [batch, r, m], r <= 128, r m < 2^31
  const double* scale;  // [batch], what is left of a row must be longer than 1e-6 of; may be null
  T* q;                 // [batch, r, m], orthonormal rows, or zero where a row was dropped
  T* l;                 // [batch, r, r], lower, panel = l q
  Index* rank;          // [batch], rows kept; -1: not found this way
  std::byte* scratch;   // panel_qr_scratch_cuda bytes; the CPU brings its own
  Index batch, r, m;
};

// The most numbers that a sum of precise_product has.
constexpr Index kMaxPreciseDepth = 21824;

template <class T>
struct PreciseProductArgs {
  const void* x;        // [batch, rows, depth]
  const void* y;        // [batch, cols, depth], or null: x
  double* product;      // [batch, rows, cols]
  std::int8_t* digits;  // [6, batch (rows + cols), pitch], scratch; without y of the rows alone
  double* scales;       // [batch (rows + cols)], scratch; the same
  Index batch, rows, cols, depth, pitch, x_stored, y_stored;
};

template <class T>
struct ProjectPairArgs {
  const T* us;       // [batch, m, ks], orthonormal columns (zero columns allowed)
  const T* ut;       // [batch, m, kt]
  const T* x;        // [batch, r, m]
  T* coefficients;   // scratch: [batch, 2 r, max(ks, kt)], and parts of it on a GPU
  Index* cancelled;  // [batch, r], scratch
  T* split;          // [batch, 2 r, m]: x in the range of us, and in its complement
  T* moved;          // [batch, 2 r, m]: the first in the range of ut, the second in its complement
  Index batch, m, ks, kt, r;
};

// The most columns small_svd takes: its working set then still fits in a GPU's shared memory.
constexpr Index kMaxSvdColumns = 128;

template <class T>
struct SmallSvdArgs {
  const T* a;          // [batch, m, n], n <= m, n <= kMaxSvdColumns
  T* u;                // [batch, m, n]
  T* s;                // [batch, n], descending
  T* v;                // [batch, n, n], a = u diag(s) vᵀ
  std::byte* scratch;  // small_svd_scratch_cuda bytes; the CPU brings its own
  Index batch, m, n;
};

template <class T>
struct SmallSingularValuesArgs {
  const T* a;          // as in SmallSvdArgs
  T* s;                // [batch, n], descending
  std::byte* scratch;  // small_svd_scratch_cuda bytes, those without vectors
  Index batch, m, n;
};

// The most columns of a matrix that tridiagonalise takes.
constexpr Index kMaxTridiagonal = 16384;

template <class T>
struct TridiagonaliseArgs {
  T* a;                // [batch, d, d], symmetric; overwritten by reflections
  T* tau;              // [batch, d]
  double* diagonal;    // [batch, d]
  double* beside;      // [batch, d], of which the last is 0
  std::byte* scratch;  // tridiagonalise_scratch bytes
  Index batch, d;
};

template <class T>
struct TridiagonalValuesArgs {
  const T* diagonal;  // [batch, d]
  const T* beside;    // [batch, d]
  T* values;          // [batch, count], the largest, descending
  Index batch, d, count;
};

// Eigenvectors of T, or of A = Q T Qᵀ if reflections are given.
template <class T>
struct TridiagonalVectorsArgs {
  const T* diagonal;     // [batch, d]
  const T* beside;       // [batch, d]
  const T* values;       // [batch, count]
  const T* reflections;  // [batch, d, d] of tridiagonalise, or null
  const T* tau;          // [batch, d], or null
  T* vectors;            // [batch, count, d], unit rows
  Index batch, d, count;
};

// Products of Q T Qᵀ with the same rows for every matrix: what a reduction implies, to be compared
// with products of the matrix that was reduced.
template <class T>
struct MultiplyReducedArgs {
  const T* reflections;  // [batch, d, d] of tridiagonalise
  const T* tau;          // [batch, d]
  const T* diagonal;     // [batch, d]
  const T* beside;       // [batch, d]
  const T* x;            // [count, d]
  T* products;           // [batch, count, d]
  Index batch, d, count;
};

// Numbers of CutFacts in cut_side.h.
constexpr Index kCutFacts = 8;

template <class T>
struct CutSideArgs {
  const T* w;      // [batch, d, n], d <= n
  const T* gram;   // [batch, d, d], w wᵀ
  const T* share;  // [1], of the trace that the kept columns hold, if rank is 0
  T* shorts;       // [batch, rows, d], unit rows; those behind a matrix's number are not written
  T* longs;        // [batch, rows, n]
  T* s;            // [batch, rows], singular values of the rows
  T* facts;        // [batch, kCutFacts]
  Index batch, d, n, rows, rank;  // rows: d, or d / 2 if the smaller side is wanted
  Index leading;                  // 1: the leading side, whichever is smaller
};

template <class T>
SmallSvdArgs<T> without_vectors(const SmallSingularValuesArgs<T>& args) {
  return {args.a, nullptr, args.s, nullptr, args.scratch, args.batch, args.m, args.n};
}

// <op>_cpu(args) and <op>_cuda(args, stream), for the precisions in the list.
#define PROLORA_DECLARE(op, Args, CPU, CUDA) \
  template <class T>                         \
  void op##_cpu(const Args<T>& args);        \
  template <class T>                         \
  void op##_cuda(const Args<T>& args, std::uintptr_t stream);
PROLORA_OPS(PROLORA_DECLARE)
#undef PROLORA_DECLARE

// Bytes of scratch for a batch: 0 if a matrix fits in the current device's shared memory.
Index panel_qr_scratch_cuda(Index batch, Index r);
Index small_svd_scratch_cuda(Index batch, Index m, Index n, bool vectors, bool float64);

// Bytes of scratch of tridiagonalise.
Index tridiagonalise_scratch(Index batch, Index d, bool float64);

// Numbers of `parts` that krylov_block needs on the current device.
Index krylov_block_scratch_cuda(Index batch, Index d, Index n, Index size, Index width);

// Numbers of `coefficients` that project_pair needs on the current device.
Index project_pair_scratch_cuda(Index batch, Index m, Index ks, Index kt, Index r);

// The compute capabilities (major, minor) of the CUDA devices there are; `why` says what is missing
// where there are none.
std::vector<std::pair<int, int>> cuda_devices(std::string* why);

}  // namespace prolora
