// The CPU backend: the same algorithms, spread over the cores. Compiled once per instruction set,
// so nothing of the standard library's templates may be used here: the linker keeps one copy of
// those, and it could be one with instructions that the machine lacks.
#include "cpu.h"

#include <omp.h>

#include <cstdlib>
#include <new>

#include "overlap.h"
#include "overlap_serial.h"
#include "overlap_table.h"
#include "panel_qr.h"
#include "project_pair.h"
#include "serial.h"
#include "small_svd.h"
#include "split_project.h"

namespace prolora {
namespace {

// Below this many flops waking other threads costs more than they bring.
constexpr double kParallelFlops = 2e5;

// f(matrix, tile row, tile column) for the tiles of matrices [first, end).
template <class F>
void each_tile(TileGrid grid, Index first, Index end, bool parallel, F f) {
#pragma omp parallel for schedule(static) if (parallel)
  for (Index tile = first * grid.per_matrix(); tile < end * grid.per_matrix(); ++tile) {
    const Index in_matrix = tile % grid.per_matrix();
    f(tile / grid.per_matrix(), in_matrix / grid.cols, in_matrix % grid.cols);
  }
}

template <class T>
void split_project(const SplitProjectArgs<T>& args) {
  using Tile = SerialTile<T>;
  const TileGrid first = tile_grid<Tile>(args.k, args.r);
  const TileGrid second = tile_grid<Tile>(args.m, args.r);
  auto both = [&](Index matrix, bool parallel) {
    each_tile(first, matrix, matrix + 1, parallel,
              [&](Index b, Index row, Index col) { coefficients_tile(Tile{}, args, b, row, col); });
    each_tile(second, matrix, matrix + 1, parallel,
              [&](Index b, Index row, Index col) { split_tile(Tile{}, args, b, row, col); });
  };
  // Whole matrices where there are enough of them: U is then still cached for its second use.
  const double flops = 4.0 * args.m * args.k * args.r;
  if (args.batch >= omp_get_max_threads()) {
#pragma omp parallel for schedule(static) if (flops * args.batch > kParallelFlops)
    for (Index matrix = 0; matrix < args.batch; ++matrix) both(matrix, false);
  } else {
    for (Index matrix = 0; matrix < args.batch; ++matrix) both(matrix, flops > kParallelFlops);
  }
}

template <class T>
Index overlap_tiles(Index ks, Index kt) {
  return tile_grid<SerialTile<T>>(ks, kt).per_matrix();
}

template <class T>
void overlap(const OverlapArgs<T>& args) {
  const TileGrid grid = tile_grid<SerialTile<T>>(args.ks, args.kt);
  const double flops = 2.0 * args.batch * args.m * args.ks * args.kt;
  each_tile(grid, 0, args.batch, flops > kParallelFlops, [&](Index matrix, Index row, Index col) {
    args.partial[matrix * grid.per_matrix() + row * grid.cols + col] =
        overlap_tile(SerialTile<T>{}, args, matrix, row, col);
  });
  for (Index matrix = 0; matrix < args.batch; ++matrix) {
    const double* mine = args.partial + matrix * grid.per_matrix();
    args.out[matrix] =
        SerialWarp{}.sum<double>(grid.per_matrix(), [&](Index i) { return mine[i]; });
  }
}

template <class T>
void overlap_table(const OverlapTableArgs<T>& args) {
#pragma omp parallel for schedule(dynamic) if (args.blocks > 1)
  for (Index block = 0; block < args.blocks; ++block) {
    const OverlapPlace place = overlap_place(args, block);
    const OverlapGroup<T>& group = args.groups[place.group];
    T c[kOverlapBlock * kOverlapBlock];
    overlap_product(SerialTile<T>{}, group, place, c, kOverlapBlock);
    finish_block(args, group, place.matrix, place.row, place.col, c, kOverlapBlock);
  }
  add_shells(args);
}

template <class T>
void project_pair(const ProjectPairArgs<T>& args) {
  using Tile = SerialTile<T>;
  const double flops = 12.0 * args.batch * args.m * args.ks * args.r;
  for (const ProjectStep step : kProjectSteps) {
    const ProjectRows<T> rows = project_rows(args, step);
    const bool parallel = flops > kParallelFlops;
    each_tile(tile_grid<Tile>(rows.k, rows.rows), 0, args.batch, parallel,
              [&](Index b, Index row, Index col) {
                project_coefficients(Tile{}, args, step, b, row, col);
              });
    each_tile(
        tile_grid<Tile>(args.m, rows.rows), 0, args.batch, parallel,
        [&](Index b, Index row, Index col) { project_apply(Tile{}, args, step, b, row, col); });
  }
}

template <class T>
void panel_qr(const PanelQrArgs<T>& args) {
  const Index r = args.r;
  const Index m = args.m;
  const double flops = 8.0 * args.batch * m * r * r;
#pragma omp parallel for schedule(dynamic) if (flops > kParallelFlops)
  for (Index b = 0; b < args.batch; ++b) {
    panel_qr(SerialBlock{}, args.panel + b * r * m, args.q + b * r * m, args.l + b * r * r,
             args.rank + b, PanelWorkspace::at(args.scratch + b * PanelWorkspace::doubles(r), r), r,
             m);
  }
}

template <class T>
void small_svd(const SmallSvdArgs<T>& args) {
  const Index m = args.m;
  const Index n = args.n;
  const double flops = 50.0 * args.batch * m * n * n;
  bool enough_memory = true;
#pragma omp parallel if (flops > kParallelFlops)
  {
    void* memory = std::malloc(SvdWorkspace<T>::bytes(m, n));
    if (memory == nullptr) {
#pragma omp atomic write
      enough_memory = false;
    }
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < args.batch; ++b) {
      if (memory == nullptr) continue;
      small_svd(SerialBlock{}, args.a + b * m * n, args.u + b * m * n, args.s + b * n,
                args.v + b * n * n, SvdWorkspace<T>::at(memory, m, n), m, int(n));
    }
    std::free(memory);
  }
  if (!enough_memory) throw std::bad_alloc{};
}

template <class T>
constexpr CpuOps<T> kOps = {split_project<T>, overlap<T>,  overlap_tiles<T>, overlap_table<T>,
                            project_pair<T>,  panel_qr<T>, small_svd<T>};

}  // namespace

namespace PROLORA_ISA {
#define TEXT(x) #x
#define NAME_OF(x) TEXT(x)
extern const CpuIsa isa = {NAME_OF(PROLORA_ISA), kOps<float>, kOps<double>};
}  // namespace PROLORA_ISA

}  // namespace prolora
