// The native ops as plain C++ functions: what bind.cpp offers to Python. Every pointer is to dense,
// row-major memory on the device the function is named after; T is float or double. Nothing here
// allocates device memory: outputs and scratch come from the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace prolora {

using Index = std::int64_t;

template <class T>
struct SplitProjectArgs {
  const T* u;       // [batch, m, k], orthonormal columns (zero columns allowed)
  const T* x;       // [batch, m, r]
  T* coefficients;  // [batch, k, r], scratch: uᵀx
  T* par;           // [batch, m, r], u uᵀx
  T* perp;          // [batch, m, r], x - par
  Index batch, m, k, r;
};

template <class T>
struct OverlapArgs {
  const T* us;      // [batch, m, ks]
  const T* ut;      // [batch, m, kt]
  double* partial;  // [batch, overlap_tiles_*(ks, kt)], scratch
  double* out;      // [batch], ‖usᵀut‖_F²
  Index batch, m, ks, kt;
};

template <class T>
struct ProjectPairArgs {
  const T* us;      // [batch, m, ks], orthonormal columns (zero columns allowed)
  const T* ut;      // [batch, m, kt]
  const T* x;       // [batch, r, m]
  T* coefficients;  // [batch, 2 r, max(ks, kt)], scratch
  T* split;         // [batch, 2 r, m]: x in the range of us, and in its complement
  T* moved;         // [batch, 2 r, m]: the first in the range of ut, the second in its complement
  Index batch, m, ks, kt, r;
};

template <class T>
struct PanelQrArgs {
  const T* panel;   // [batch, r, m]
  T* q;             // [batch, r, m], orthonormal rows, or zero where a row was dropped
  T* l;             // [batch, r, r], lower, panel = l q
  Index* rank;      // [batch], rows kept; -1: not found this way
  double* scratch;  // [batch, panel_qr_scratch(r)]
  Index batch, r, m;
};

// overlap_table cuts Usᵀ Ut into blocks of this many rows and columns.
constexpr Index kOverlapBlock = 64;

// A stack of pairs of one shape; laid out as the int64 numbers that Python writes.
template <class T>
struct OverlapGroup {
  const T* us;  // [batch, m, ks]
  const T* ut;  // [batch, m, kt]
  Index batch, m, ks, kt;
  // Where the group begins, counted over all groups: blocks of Usᵀ Ut, strips of 64 shells, shells.
  Index first_block, first_strip, first_shell;
};
static_assert(sizeof(OverlapGroup<float>) == 9 * sizeof(Index));

template <class T>
struct OverlapTableArgs {
  const OverlapGroup<T>* groups;  // [count], on the device too
  double* table;                  // [blocks], block sums of squares: group, matrix, row, column
  double* edges;                  // [blocks, 64], scratch
  double* shells;                 // [Σ batch min(ks, kt)]
  Index count, blocks, strips;
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
void split_project_cpu(const SplitProjectArgs<T>& args);
template <class T>
void split_project_cuda(const SplitProjectArgs<T>& args, std::uintptr_t stream);

template <class T>
void overlap_cpu(const OverlapArgs<T>& args);
template <class T>
void overlap_cuda(const OverlapArgs<T>& args, std::uintptr_t stream);
template <class T>
void overlap_table_cpu(const OverlapTableArgs<T>& args);
template <class T>
void overlap_table_cuda(const OverlapTableArgs<T>& args, std::uintptr_t stream);

template <class T>
void project_pair_cpu(const ProjectPairArgs<T>& args);
template <class T>
void project_pair_cuda(const ProjectPairArgs<T>& args, std::uintptr_t stream);

template <class T>
void panel_qr_cpu(const PanelQrArgs<T>& args);
template <class T>
void panel_qr_cuda(const PanelQrArgs<T>& args, std::uintptr_t stream);
// Numbers of scratch for a panel of r rows.
Index panel_qr_scratch(Index r);

// How many partial sums a matrix has.
template <class T>
Index overlap_tiles_cpu(Index ks, Index kt);
template <class T>
Index overlap_tiles_cuda(Index ks, Index kt);

template <class T>
void small_svd_cpu(const SmallSvdArgs<T>& args);
template <class T>
void small_svd_cuda(const SmallSvdArgs<T>& args, std::uintptr_t stream);
// Bytes of scratch for a batch: 0 if a matrix fits in the current device's shared memory.
template <class T>
Index small_svd_scratch_cuda(Index batch, Index m, Index n);

// The instruction set the CPU ops run with: the best this machine has, or the one that the
// environment variable PROLORA_ISA names, if the machine has it.
const char* cpu_isa();

// Whether overlap_table runs in the matrix tiles (AMX) of this processor, for float32.
bool cpu_has_tiles();

// The number of usable CUDA devices; if it is 0, `why` says what is missing.
int cuda_device_count(std::string* why);

}  // namespace prolora
