// Moves rows X through two subspaces, the range of one to the range of the other and the complement
// to the complement; for a batch:
//   split = [X Us Usᵀ ; X - X Us Usᵀ],   moved = [split_1 Ut Utᵀ ; split_2 - split_2 Ut Utᵀ].
//
// us [m, ks], ut [m, kt] orthonormal columns, x [r, m], split and moved [2 r, m]; all row-major.
// Rows, since that is how the factor of a LoRA lies that reads.
//
// Two products a step (C = Y U, then C Uᵀ, which leaves as both of its results at once), so that
// nothing is read to be subtracted later; the second step takes range and complement as one operand
// of 2 r rows. 8 m (ks + kt) r flops; U is read from memory once a product, X-sized data twice.
// Two launches a step, and those for cancelled rows. Bound: 8 m (ks + kt) bytes of U in float32, so
// r flops a byte: memory for the ranks of LoRAs, up to 64 on tensor cores.
// Where a row of a complement lost nearly all of its length, its matrix goes through a step again:
// what is left is cancellation, orthogonal to the subspace only to eps / |rest|, and twice is
// enough. The blocks find that out for themselves; the host does not wait.
#pragma once

#include "ops.h"
#include "tile.h"

namespace prolora {

// What becomes of P = Y U Uᵀ for the rows Y of a step.
enum class ProjectStep {
  kSplit,       // split = [P ; x - P]
  kSplitAgain,  // of the complement: split += [P ; -P]
  kMove,        // moved = [P of the range ; complement - P]
  kMoveAgain,   // of the complement: moved_2 -= P
};

// A row that keeps less than this share of its squared length: CANCELLED in
// core/ops/project_pair.py.
constexpr double kCancelled = 1e-2;

// A step's subspace, its rows, and where they lie.
template <class T>
struct ProjectRows {
  const T* u;  // [batch, m, k]
  const T* y;  // [batch, stride], the first of `rows` rows of m
  Index m, k, rows, stride;
  const T* had;  // what y was before it lost a part, where only cancelled matrices take part
  Index had_stride;
};

template <class T>
PROLORA_HOST_DEVICE ProjectRows<T> project_rows(const ProjectPairArgs<T>& args, ProjectStep step) {
  const Index m = args.m;
  const Index size = args.r * m;
  switch (step) {
    case ProjectStep::kSplit:
      return {args.us, args.x, m, args.ks, args.r, size, nullptr, 0};
    case ProjectStep::kSplitAgain:
      return {args.us, args.split + size, m, args.ks, args.r, 2 * size, args.x, size};
    case ProjectStep::kMove:
      return {args.ut, args.split, m, args.kt, 2 * args.r, 2 * size, nullptr, 0};
    default:
      return {args.ut,  args.moved + size, m,       args.kt, args.r,
              2 * size, args.split + size, 2 * size};
  }
}

// Whether a row of a step's matrix lost nearly all of its length.
template <class Warp, class T>
PROLORA_HOST_DEVICE bool row_cancelled(const Warp& warp, const ProjectRows<T>& rows, Index matrix,
                                       Index row) {
  auto squared_length = [&](const T* x) {
    return warp.template sum<double>(rows.m, [&](Index p) { return double(x[p]) * double(x[p]); });
  };
  const double left = squared_length(rows.y + matrix * rows.stride + row * rows.m);
  const double had = squared_length(rows.had + matrix * rows.had_stride + row * rows.m);
  return left < kCancelled * had;
}

// Tile (tile_row, tile_col) of Cᵀ = Uᵀ Yᵀ for one matrix, summed over a part of the depth, into
// c [rows, k].
template <class Tile, class T>
PROLORA_HOST_DEVICE void project_coefficients(const Tile& tile, const ProjectRows<T>& rows,
                                              Index matrix, Index tile_row, Index tile_col,
                                              DepthParts parts, Index part, T* c) {
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const Index m = rows.m;
  const Index k = rows.k;
  const Index first = part * parts.length;
  const AlongTile<T> u{rows.u + (matrix * m + first) * k + i0, k, min_index(Tile::kRows, k - i0)};
  const AlongDepth<T> y{rows.y + matrix * rows.stride + j0 * m + first, m,
                        min_index(Tile::kCols, rows.rows - j0)};
  T* stage = tile.stage();
  tile.product(u, y, min_index(parts.length, m - first),
               [&](Index i, Index j, T sum) { stage[j * Tile::kStageStride + i] = sum; });
  T* to = c + j0 * k + i0;
  tile.each_pack(u.size, y.size, in_packs(to, k),
                 [&](Index i, Index j, auto sum) { sum.store(to + j * k + i); });
}

// Tile (tile_row, tile_col) of Pᵀ = U Cᵀ for one matrix, and what the step makes of it.
template <class Tile, class T>
PROLORA_HOST_DEVICE void project_apply(const Tile& tile, const ProjectPairArgs<T>& args,
                                       ProjectStep step, Index matrix, Index tile_row,
                                       Index tile_col) {
  const ProjectRows<T> rows = project_rows(args, step);
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const Index m = args.m;
  const Index r = args.r;
  const Index k = rows.k;
  const AlongDepth<T> u{rows.u + (matrix * m + i0) * k, k, min_index(Tile::kRows, m - i0)};
  const AlongDepth<T> c{args.coefficients + (matrix * rows.rows + j0) * k, k,
                        min_index(Tile::kCols, rows.rows - j0)};
  const Index rest = r * m;  // from a row of the range to that of the complement
  const T* x = args.x + matrix * rest;
  T* split = args.split + 2 * matrix * rest;
  T* moved = args.moved + 2 * matrix * rest;
  T* stage = tile.stage();
  tile.product(u, c, k, [&](Index i, Index j, T sum) { stage[j * Tile::kStageStride + i] = sum; });
  const bool aligned = in_packs(x, m) && in_packs(split, m) && in_packs(moved, m);
  tile.each_pack(u.size, c.size, aligned, [&](Index i, Index j, auto sum) {
    using Sum = decltype(sum);
    const Index at = (j0 + j) * m + i0 + i;
    switch (step) {
      case ProjectStep::kSplit:
        sum.store(split + at);
        (Sum::load(x + at) - sum).store(split + at + rest);
        break;
      case ProjectStep::kSplitAgain:
        (Sum::load(split + at) + sum).store(split + at);
        (Sum::load(split + at + rest) - sum).store(split + at + rest);
        break;
      case ProjectStep::kMove:
        (j0 + j < r ? sum : Sum::load(split + at) - sum).store(moved + at);
        break;
      case ProjectStep::kMoveAgain:
        (Sum::load(moved + at + rest) - sum).store(moved + at + rest);
        break;
    }
  });
}

constexpr ProjectStep kProjectSteps[] = {ProjectStep::kSplit, ProjectStep::kSplitAgain,
                                         ProjectStep::kMove, ProjectStep::kMoveAgain};

}  // namespace prolora
