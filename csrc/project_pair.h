// Moves rows X through two subspaces, the range of one to the range of the other and the complement
// to the complement; for a batch:
//   split = [X Us Usᵀ ; X - X Us Usᵀ],   moved = [split_1 Ut Utᵀ ; split_2 - split_2 Ut Utᵀ].
//
// us [m, ks], ut [m, kt] orthonormal columns, x [r, m], c [2 r, max(ks, kt)] scratch, split and
// moved [2 r, m]; all row-major. Rows, since that is how the factor of a LoRA lies that reads.
//
// Two products a step (C = Y U, then C Uᵀ, which leaves as both of its results at once), so that
// nothing is read to be subtracted later; the second step takes range and complement as one operand
// of 2 r rows. Then the complements go through a second time: where X lies almost within a
// subspace, what is left of it is cancellation, orthogonal to the subspace only to eps / |rest|,
// and twice is enough. 12 m (ks + kt) r flops, 8 of them before the second time: U is read from
// memory once a product, X-sized data twice.
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

// A step's subspace, its rows, and where they lie.
template <class T>
struct ProjectRows {
  const T* u;  // [batch, m, k]
  const T* y;  // [batch, stride], the first of `rows` rows of m
  Index k, rows, stride;
};

template <class T>
HOST_DEVICE ProjectRows<T> project_rows(const ProjectPairArgs<T>& args, ProjectStep step) {
  const Index size = args.r * args.m;
  switch (step) {
    case ProjectStep::kSplit:
      return {args.us, args.x, args.ks, args.r, size};
    case ProjectStep::kSplitAgain:
      return {args.us, args.split + size, args.ks, args.r, 2 * size};
    case ProjectStep::kMove:
      return {args.ut, args.split, args.kt, 2 * args.r, 2 * size};
    default:
      return {args.ut, args.moved + size, args.kt, args.r, 2 * size};
  }
}

HOST_DEVICE Index larger(Index a, Index b) { return a > b ? a : b; }

// Tile (tile_row, tile_col) of Cᵀ = Uᵀ Yᵀ for one matrix.
template <class Tile, class T>
HOST_DEVICE void project_coefficients(const Tile& tile, const ProjectPairArgs<T>& args,
                                      ProjectStep step, Index matrix, Index tile_row,
                                      Index tile_col) {
  const ProjectRows<T> rows = project_rows(args, step);
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const Index k = rows.k;
  const AlongTile<T> u{rows.u + matrix * args.m * k + i0, k, smaller(Tile::kRows, k - i0)};
  const AlongDepth<T> y{rows.y + matrix * rows.stride + j0 * args.m, args.m,
                        smaller(Tile::kCols, rows.rows - j0)};
  T* c = args.coefficients + matrix * 2 * args.r * larger(args.ks, args.kt) + j0 * k + i0;
  tile.product(u, y, args.m, [&](Index i, Index j, T sum) { c[j * k + i] = sum; });
}

// Tile (tile_row, tile_col) of Pᵀ = U Cᵀ for one matrix, and what the step makes of it.
template <class Tile, class T>
HOST_DEVICE void project_apply(const Tile& tile, const ProjectPairArgs<T>& args, ProjectStep step,
                               Index matrix, Index tile_row, Index tile_col) {
  const ProjectRows<T> rows = project_rows(args, step);
  const Index i0 = tile_row * Tile::kRows;
  const Index j0 = tile_col * Tile::kCols;
  const Index m = args.m;
  const Index r = args.r;
  const Index k = rows.k;
  const AlongDepth<T> u{rows.u + (matrix * m + i0) * k, k, smaller(Tile::kRows, m - i0)};
  const AlongDepth<T> c{args.coefficients + matrix * 2 * r * larger(args.ks, args.kt) + j0 * k, k,
                        smaller(Tile::kCols, rows.rows - j0)};
  const T* x = args.x + matrix * r * m;
  T* split = args.split + matrix * 2 * r * m;
  T* moved = args.moved + matrix * 2 * r * m;
  const Index rest = r * m;  // from a row of the range to that of the complement
  tile.product(u, c, k, [&](Index i, Index j, T sum) {
    const Index row = j0 + j;
    const Index at = row * m + i0 + i;
    switch (step) {
      case ProjectStep::kSplit:
        split[at] = sum;
        split[at + rest] = x[at] - sum;
        break;
      case ProjectStep::kSplitAgain:
        split[at] += sum;
        split[at + rest] -= sum;
        break;
      case ProjectStep::kMove:
        moved[at] = row < r ? sum : split[at] - sum;
        break;
      case ProjectStep::kMoveAgain:
        moved[at + rest] -= sum;
        break;
    }
  });
}

constexpr ProjectStep kProjectSteps[] = {ProjectStep::kSplit, ProjectStep::kSplitAgain,
                                         ProjectStep::kMove, ProjectStep::kMoveAgain};

}  // namespace prolora
