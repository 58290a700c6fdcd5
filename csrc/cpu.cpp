// The CPU backend: the same algorithms, spread over the cores where the compiler has OpenMP.
// Loops are written for OpenMP 2.0, which is what MSVC has.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "cut_side.h"
#include "krylov_block.h"
#include "panel_qr.h"
#include "precise_product.h"
#include "project_pair.h"
#include "serial.h"
#include "serial_products.h"
#include "small_svd.h"
#include "subspace_overlap.h"
#include "tridiagonal.h"

namespace prolora {
namespace {

// Below this many flops waking other threads costs more than they bring. (Unused without OpenMP.)
[[maybe_unused]] constexpr double kParallelFlops = 2e5;

// f(tile row, tile column) for the tiles of a matrix.
template <class F>
void each_tile(TileGrid grid, F f) {
  for (Index tile = 0; tile < grid.per_matrix(); ++tile) f(tile / grid.cols, tile % grid.cols);
}

template <class T>
double overlap_block(const SubspaceOverlapArgs<T>& args, Index block) {
  const OverlapPlace place = overlap_place(args, block);
  const OverlapGroup<T>& group = args.groups[place.group];
  T c[kOverlapBlock * kOverlapBlock];
  overlap_product(SerialTile<T>{nullptr}, group, place, c, kOverlapBlock);
  const Index rows = min_index(kOverlapBlock, group.ks - place.row * kOverlapBlock);
  const Index cols = min_index(kOverlapBlock, group.kt - place.col * kOverlapBlock);
  double total = 0;
  for (Index i = 0; i < rows; ++i) total += row_square(c + i * kOverlapBlock, cols);
  return total;
}

template <bool kVectors, class T>
void svd_on_cores(const SmallSvdArgs<T>& args) {
  check_svd_size(args.m, args.n);
  const int m = int(args.m);
  const int n = int(args.n);
  const Index entries = args.m * args.n;
  bool enough_memory = true;
#pragma omp parallel if (50.0 * args.batch * m * n * n > kParallelFlops)
  {
    const std::unique_ptr<std::byte[]> memory(
        new (std::nothrow) std::byte[SvdWorkspace<T>::bytes(m, n, kVectors)]);
    if (!memory) {
#pragma omp critical
      enough_memory = false;
    }
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < args.batch; ++b) {
      if (!memory) continue;
      small_svd<kVectors>(SerialBlock{}, args.a + b * entries,
                          kVectors ? args.u + b * entries : nullptr, args.s + b * n,
                          kVectors ? args.v + b * n * n : nullptr,
                          SvdWorkspace<T>::at(memory.get(), m, n, kVectors), m, n);
    }
  }
  if (!enough_memory) throw std::bad_alloc{};
}

}  // namespace

template <class T>
void subspace_overlap_cpu(const SubspaceOverlapArgs<T>& args) {
#pragma omp parallel for schedule(dynamic) if (args.blocks > 1)
  for (Index block = 0; block < args.blocks; ++block) args.sums[block] = overlap_block(args, block);
}

// A step for one matrix.
template <class T>
void project_matrix(const ProjectPairArgs<T>& args, ProjectStep step, Index matrix) {
  const ProjectRows<T> rows = project_rows(args, step);
  if (rows.had != nullptr) {
    bool any = false;
    for (Index row = 0; row < rows.rows; ++row) {
      any |= row_cancelled(SerialWarp{}, rows, matrix, row);
    }
    if (!any) return;
  }
  using Tile = SerialTile<T>;
  T stage[Tile::kCols * Tile::kStageStride];
  each_tile(tile_grid<Tile>(rows.k, rows.rows), [&](Index row, Index col) {
    project_coefficients(Tile{stage}, rows, matrix, row, col, DepthParts{1, rows.m}, 0,
                         args.coefficients + matrix * rows.rows * rows.k);
  });
  each_tile(tile_grid<Tile>(args.m, rows.rows), [&](Index row, Index col) {
    project_apply(Tile{stage}, args, step, matrix, row, col);
  });
}

template <class T>
void project_pair_cpu(const ProjectPairArgs<T>& args) {
  for (const ProjectStep step : kProjectSteps) {
#pragma omp parallel for schedule(static) if (args.batch > 1)
    for (Index matrix = 0; matrix < args.batch; ++matrix) project_matrix(args, step, matrix);
  }
}

// A product for one matrix.
template <class Operand>
void multiply_thin(const ThinProduct<typename Operand::Number>& product, Index matrix) {
  using Tile = SerialTile<float>;
  float stage[Tile::kCols * Tile::kStageStride];
  each_tile(tile_grid<Tile>(product.rows, product.cols), [&](Index row, Index col) {
    thin_product<Operand>(Tile{stage}, product, matrix, row, col, DepthParts{1, product.depth}, 0,
                          product.y + matrix * product.rows * product.cols, product.subtract);
  });
}

template <class Stored>
void multiply_block(const KrylovBlockArgs<float>& args, Index matrix,
                    const PanelWorkspace& workspace) {
  const auto with_w = product_with_w<Stored>(args);
  const auto back = product_back<Stored>(args);
  if (args.transposed) {
    multiply_thin<AlongDepth<Stored>>(with_w, matrix);
    multiply_thin<AlongTile<Stored>>(back, matrix);
  } else {
    multiply_thin<AlongTile<Stored>>(with_w, matrix);
    multiply_thin<AlongDepth<Stored>>(back, matrix);
  }
  const auto take_out = [&] {
    multiply_thin<AlongDepth<float>>(product_with_basis(args), matrix);
    multiply_thin<AlongTile<float>>(rest_of_basis(args), matrix);
  };
  take_out();
  normalise_image(SerialBlock{}, args, matrix, workspace);
  if (args.size + args.width > args.room) return;
  take_out();
  make_block(SerialBlock{}, args, matrix, workspace);
}

template <>
void krylov_block_cpu(const KrylovBlockArgs<float>& args) {
  check_krylov_size(args);
  const Index bytes = PanelWorkspace::bytes(int(args.width));
  const std::unique_ptr<std::byte[]> memory(new std::byte[args.batch * bytes]);
#pragma omp parallel for schedule(static) if (args.batch > 1)
  for (Index matrix = 0; matrix < args.batch; ++matrix) {
    const PanelWorkspace workspace =
        PanelWorkspace::at(memory.get() + matrix * bytes, int(args.width));
    StoredAs(args.stored) == StoredAs::kFloat16 ? multiply_block<Half>(args, matrix, workspace)
                                                : multiply_block<Bfloat>(args, matrix, workspace);
  }
}

template <>
void panel_qr_cpu(const PanelQrArgs<float>& args) {
  const int r = int(args.r);
  const int m = int(args.m);
  bool enough_memory = true;
#pragma omp parallel if (20.0 * args.batch * m * r * r > kParallelFlops)
  {
    const std::unique_ptr<std::byte[]> memory(new (std::nothrow)
                                                  std::byte[PanelWorkspace::bytes(r)]);
    if (!memory) {
#pragma omp critical
      enough_memory = false;
    }
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < args.batch; ++b) {
      if (!memory) continue;
      panel_qr(SerialBlock{}, args.panel + b * r * m, args.scale ? args.scale[b] : 0.0,
               args.q + b * r * m, args.l + b * r * r, args.rank + b,
               PanelWorkspace::at(memory.get(), r), r, m);
    }
  }
  if (!enough_memory) throw std::bad_alloc{};
}

template <>
void precise_product_cpu(const PreciseProductArgs<float>& args) {
  check_precise_size(args);
  const auto split = [](const auto& rows) {
    for (Index row = 0; row < rows.count; ++row) split_row(SerialWarp{}, rows, row);
  };
  as_stored(args.x_stored, [&](auto x) { split(rows_of_x<decltype(x)>(args)); });
  if (args.y) as_stored(args.y_stored, [&](auto y) { split(rows_of_y<decltype(y)>(args)); });
#pragma omp parallel for schedule(static) if (args.batch > 1)
  for (Index matrix = 0; matrix < args.batch; ++matrix) {
    each_tile(tile_grid<SerialDigitTile>(args.rows, args.cols), [&](Index row, Index col) {
      precise_product(SerialDigitTile{}, args, matrix, row, col);
    });
  }
}

template <class T>
void small_svd_cpu(const SmallSvdArgs<T>& args) {
  svd_on_cores<true>(args);
}

template <class T>
void small_singular_values_cpu(const SmallSingularValuesArgs<T>& args) {
  svd_on_cores<false>(without_vectors(args));
}

namespace {

PROLORA_FOR_EACH_TARGET void reduce(const TridiagonaliseArgs<float>& args, Index matrix) {
  reduce_matrix(WideBlock{}, SerialProducts{}, args, matrix);
}

PROLORA_FOR_EACH_TARGET void reduce(const TridiagonaliseArgs<double>& args, Index matrix) {
  reduce_matrix(WideBlock{}, SerialProducts{}, args, matrix);
}

}  // namespace

template <class T>
void tridiagonalise_cpu(const TridiagonaliseArgs<T>& args) {
  check_tridiagonal_size(args.d);
#pragma omp parallel for schedule(dynamic) if (args.batch > 1)
  for (Index matrix = 0; matrix < args.batch; ++matrix) reduce(args, matrix);
}

// f(T, matrix, first value, how many) for groups of values of one matrix.
template <class Args, class F>
void each_group(const Args& args, F f) {
  const Index groups = ceil_div(args.count, kGroup);
#pragma omp parallel for schedule(dynamic) if (100.0 * args.batch * args.count * args.d > \
                                                   kParallelFlops)
  for (Index job = 0; job < args.batch * groups; ++job) {
    const Index first = job % groups * kGroup;
    f(tridiagonal_of(args, job / groups), job / groups, first,
      min_index(kGroup, args.count - first));
  }
}

template <>
void tridiagonal_values_cpu(const TridiagonalValuesArgs<double>& args) {
  each_group(args, [&](const Tridiagonal& t, Index matrix, Index first, Index count) {
    double values[kGroup];
    find_values(t, first, values);
    std::copy(values, values + count, args.values + matrix * args.count + first);
  });
}

template <>
void tridiagonal_vectors_cpu(const TridiagonalVectorsArgs<double>& args) {
  each_group(args, [&](const Tridiagonal& t, Index matrix, Index first, Index count) {
    const std::unique_ptr<double[]> scratch(new double[3 * kGroup * t.n]);
    const Index at = matrix * args.count + first;
    const Reflections q =
        args.reflections
            ? Reflections{args.reflections + matrix * args.d * args.d, args.tau + matrix * args.d}
            : Reflections{nullptr, nullptr};
    double values[kGroup];
    double* x = scratch.get() + 2 * kGroup * t.n;
    for (Index l = 0; l < kGroup; ++l) values[l] = args.values[at + min_index(l, count - 1)];
    find_vectors(t, q, values, scratch.get(), x);
    for (Index l = 0; l < count; ++l) {
      double* row = args.vectors + (at + l) * t.n;
      for (int i = 0; i < t.n; ++i) row[i] = x[i * kGroup + l];
    }
  });
}

template <>
void multiply_reduced_cpu(const MultiplyReducedArgs<double>& args) {
  each_group(args, [&](const Tridiagonal& t, Index matrix, Index first, Index count) {
    const std::unique_ptr<double[]> x(new double[2 * kGroup * t.n]);
    double* y = x.get() + kGroup * t.n;
    const Reflections q = {args.reflections + matrix * args.d * args.d, args.tau + matrix * args.d};
    for (int i = 0; i < t.n; ++i) {
      for (Index l = 0; l < kGroup; ++l) {
        x[i * kGroup + l] = l < count ? args.x[(first + l) * t.n + i] : 0;
      }
    }
    multiply_reduced(t, q, x.get(), y);
    for (Index l = 0; l < count; ++l) {
      double* row = args.products + (matrix * args.count + first + l) * t.n;
      for (int i = 0; i < t.n; ++i) row[i] = y[i * kGroup + l];
    }
  });
}

template <>
void cut_side_cpu(const CutSideArgs<double>& args) {
  static_assert(sizeof(CutFacts) == kCutFacts * sizeof(double));
  check_tridiagonal_size(args.d);
  const auto reduce_one = [](const TridiagonaliseArgs<double>& one) { reduce(one, 0); };
  bool enough_memory = true;
#pragma omp parallel if (args.batch > 1)
  {
    CutScratch scratch;
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < args.batch; ++b) {
      try {
        const CutFacts facts =
            find_cut_side(reduce_one, args.w + b * args.d * args.n, args.gram + b * args.d * args.d,
                          args.d, args.n, args.share[0], args.rank, args.leading != 0, scratch,
                          args.shorts + b * args.rows * args.d, args.longs + b * args.rows * args.n,
                          args.s + b * args.rows);
        std::memcpy(args.facts + b * kCutFacts, &facts, sizeof(facts));
      } catch (const std::bad_alloc&) {  // must not leave the parallel region
#pragma omp critical
        enough_memory = false;
      }
    }
  }
  if (!enough_memory) throw std::bad_alloc{};
}

Index tridiagonalise_scratch(Index batch, Index d, bool float64) {
  return batch * (float64 ? PanelVectors<double>::bytes(d) : PanelVectors<float>::bytes(d));
}

template void subspace_overlap_cpu(const SubspaceOverlapArgs<float>&);
template void subspace_overlap_cpu(const SubspaceOverlapArgs<double>&);
template void project_pair_cpu(const ProjectPairArgs<float>&);
template void project_pair_cpu(const ProjectPairArgs<double>&);
template void small_singular_values_cpu(const SmallSingularValuesArgs<float>&);
template void small_singular_values_cpu(const SmallSingularValuesArgs<double>&);
template void small_svd_cpu(const SmallSvdArgs<float>&);
template void small_svd_cpu(const SmallSvdArgs<double>&);
template void tridiagonalise_cpu(const TridiagonaliseArgs<float>&);
template void tridiagonalise_cpu(const TridiagonaliseArgs<double>&);

}  // namespace prolora
