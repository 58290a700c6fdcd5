// Orthonormal rows of a panel of few long rows, for a batch:  P = L Q,  Q Qᵀ = I, L lower.
//
// panel [r, m], r <= kMaxPanelRows, row-major; q [r, m], l [r, r]; rank [1], int64.
//
// Cholesky QR, twice: with C = D⁻¹ P Pᵀ D⁻¹ (rows scaled to length 1, sums in double) and its
// Cholesky factor L, Q = L⁻¹ D⁻¹ P. A product of thin matrices in place of reflections: every sum
// is as long as the rows, and the sequential part is r x r. One pass leaves rows orthonormal to eps
// cond(P), the second to eps. The first C gets a shift of r 2^-52, so that no pivot is negative by
// rounding alone. A pivot is the squared sine between a row and those before it: at kDrop = (8
// eps)² or less the row holds nothing that its rounding does not, so it is dropped: zero in Q, zero
// column in L, P = L Q still to 8 eps of that row. `rank` counts what is left. Rows that the first
// pass leaves too far from orthonormal for the second (a pivot below 1/4), NaN and Inf give rank
// -1, and the caller takes Householder reflections.
//
// float32 only in effect: a double panel has sums no better than its numbers, so that rows closer
// than 1e-7 to each other are dropped. Per pass 2 r² m flops in double; global
// traffic: the panel in, q out, what lies between stays in the cache (r m numbers).
#pragma once

#include <cfloat>
#include <cmath>

#include "block.h"
#include "ops.h"

namespace prolora {

// A panel's r x r matrices, in global memory (they stay in the cache).
struct PanelWorkspace {
  double* gram;     // [r][r], then L of this pass
  double* inverse;  // [r][r], L⁻¹ D⁻¹
  double* product;  // [r][r], L of both passes
  double* scale;    // [r], lengths of the rows
  double* pivot;    // [r]

  static HOST_DEVICE Index doubles(Index r) { return 3 * r * r + 2 * r; }
  static HOST_DEVICE PanelWorkspace at(double* memory, Index r) {
    double* scale = memory + 3 * r * r;
    return {memory, memory + r * r, memory + 2 * r * r, scale, scale + r};
  }
};

template <class T>
struct PanelLimits;
template <>
struct PanelLimits<float> {
  static constexpr double kDrop = 64.0 * FLT_EPSILON * FLT_EPSILON;
};
template <>
struct PanelLimits<double> {
  static constexpr double kDrop = 64.0 * DBL_EPSILON;  // what is left of a sum of squares
};

// One pass: q [r, m] in place; w.gram becomes D L. Pivots stay in w.pivot.
template <class Block, class T>
HOST_DEVICE void panel_pass(const Block& block, T* q, const PanelWorkspace& w, Index r, Index m,
                            double shift) {
  block.each_warp(r * r, [&](const auto& warp, Index entry) {
    const Index i = entry / r;
    const Index j = entry % r;
    if (j > i) return;
    const T* x = q + i * m;
    const T* y = q + j * m;
    const double sum =
        warp.template sum<double>(m, [&](Index p) { return double(x[p]) * double(y[p]); });
    warp.each(1, [&](Index) { w.gram[i * r + j] = sum; });
  });
  block.each(r, [&](Index i) { w.scale[i] = std::sqrt(w.gram[i * r + i]); });
  block.each_warp(r, [&](const auto& warp, Index i) {
    warp.each(i + 1, [&](Index j) {
      const double both = w.scale[i] * w.scale[j];
      double& entry = w.gram[i * r + j];
      entry = both > 0 ? entry / both : 0.0 * both;  // NaN stays
      if (i == j && both > 0) entry = 1 + shift;
    });
  });
  for (Index j = 0; j < r; ++j) {
    const double pivot = w.gram[j * r + j];
    const bool kept = !(pivot <= PanelLimits<T>::kDrop);  // NaN too
    const double inverse = kept ? 1 / std::sqrt(pivot) : 0.0;
    block.each(r - j, [&](Index n) {
      const Index i = j + n;
      if (n == 0) w.pivot[j] = pivot;
      w.inverse[i * r + j] = w.gram[i * r + j] * inverse;  // a column of L, for now
    });
    block.each_warp(r - j - 1, [&](const auto& warp, Index n) {
      const Index i = j + 1 + n;
      const double own = w.inverse[i * r + j];
      double* row = w.gram + i * r + j + 1;
      const double* column = w.inverse + (j + 1) * r + j;
      warp.each(n + 1, [&](Index k) { row[k] -= own * column[k * r]; });
    });
  }
  block.each_warp(r, [&](const auto& warp, Index i) {
    warp.each(i + 1, [&](Index j) { w.gram[i * r + j] = w.inverse[i * r + j]; });
  });
  // Columns of L⁻¹ by forward substitution, a dropped row being zero; D goes to the right of L⁻¹.
  block.each(r, [&](Index j) {
    for (Index i = j; i < r; ++i) {
      const double diagonal = w.gram[i * r + i];
      double sum = i == j ? 1.0 : 0.0;
      for (Index k = j; k < i; ++k) sum -= w.gram[i * r + k] * w.inverse[k * r + j];
      w.inverse[i * r + j] = diagonal == 0 ? 0.0 : sum / diagonal;
    }
  });
  block.each_warp(r, [&](const auto& warp, Index i) {
    warp.each(i + 1, [&](Index j) {
      double& entry = w.inverse[i * r + j];
      entry = w.scale[j] > 0 ? entry / w.scale[j] : 0.0 * w.scale[j];
      w.gram[i * r + j] *= w.scale[i];
    });
  });
  // q = L⁻¹ D⁻¹ q, rows from the last to the first, so that those above are still what they were.
  // Sums in double: in T, the rounding of rows that cancel would come back through L.
  constexpr Index kChunk = 256;
  block.each_warp(ceil_div(m, kChunk), [&](const auto& warp, Index chunk) {
    const Index first = chunk * kChunk;
    const Index width = smaller(kChunk, m - first);
    for (Index i = r - 1; i >= 0; --i) {
      const double* factors = w.inverse + i * r;
      warp.each(width, [&](Index p) {
        T* column = q + first + p;
        double sum = 0;
        for (Index j = 0; j <= i; ++j) sum += factors[j] * double(column[j * m]);
        column[i * m] = T(sum);
      });
    }
  });
}

template <class Block, class T>
HOST_DEVICE void panel_qr(const Block& block, const T* panel, T* q, T* l, Index* rank,
                          const PanelWorkspace& w, Index r, Index m) {
  block.each(r * m, [&](Index i) { q[i] = panel[i]; });
  panel_pass(block, q, w, r, m, double(r) * DBL_EPSILON);
  block.each(r * r, [&](Index i) { w.product[i] = i % r <= i / r ? w.gram[i] : 0.0; });
  panel_pass(block, q, w, r, m, 0.0);
  block.each(r * r, [&](Index entry) {
    const Index i = entry / r;
    const Index j = entry % r;
    double sum = 0;
    for (Index k = j; k <= i; ++k) sum += w.product[i * r + k] * w.gram[k * r + j];
    l[entry] = T(sum);
  });
  block.each(1, [&](Index) {
    Index count = 0;
    bool good = true;
    for (Index i = 0; i < r; ++i) {
      const bool zero = w.product[i * r + i] == 0;
      count += !zero;
      good = good && (zero || w.pivot[i] >= 0.25) && w.scale[i] - w.scale[i] == 0;
    }
    *rank = good ? count : -1;
  });
}

}  // namespace prolora
