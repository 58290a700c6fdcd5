// Thin SVD of one small matrix by one-sided Jacobi:  A = U diag(s) Vᵀ,  A: m x n, n <= m.
//
// Rotations from the right make the columns of A orthogonal pair by pair; what they become is
// U diag(s), and the product of the rotations is V. Chosen over bidiagonalisation because every
// rotation is independent work for a warp, the whole matrix stays in shared memory, and small
// singular values come out as exactly as large ones.
//
// Per sweep: n(n-1)/2 pairs, each 6m + 6(m+n) flops; 5 to 8 sweeps for n = 16 to 128. Global
// traffic: A once in; U, s, V once out. For m >> n take a QR first and give R.
//
// Promises (eps of T): |s - s_exact| <= ~n eps s_1; ‖A - U S Vᵀ‖, ‖VᵀV - I‖ and ‖UᵀU - I‖ (over the
// columns with s > 0) at most a small multiple of n eps.
// - s is descending. A value of at most n eps s_1 is rounding noise: it is given as exactly 0, with
//   a zero column in U (V stays orthonormal).
// - Any scale: A is first divided by a power of two, exactly.
// - NaN or Inf anywhere in A: NaN everywhere in U, s and V. Always ends, after kMaxSweeps at most.
#pragma once

#include <cmath>
#include <limits>

#include "block.h"
#include "ops.h"

namespace prolora {

constexpr int kMaxSweeps = 30;

template <class T>
struct Precision {
  static constexpr T kEps = std::numeric_limits<T>::epsilon();
  static constexpr T kMax = std::numeric_limits<T>::max();
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
};

// What a matrix needs while it is worked on; in shared memory where it fits.
template <class T>
struct SvdWorkspace {
  T* a;          // [n][m], a column of A after the other; becomes U diag(s), unsorted
  T* v;          // [n][n], a column of V after the other
  T* norm;       // [n], lengths of the columns
  T* inverse;    // [n], their inverses, 0 for a zero column
  int* rank;     // [n], place of each column in descending order
  int* rotated;  // [kMaxSweeps], whether a sweep rotated anything

  // Rounded up, so that the next matrix's workspace is aligned as well.
  static HOST_DEVICE Index bytes(Index m, Index n) {
    const Index exact = Index(sizeof(T)) * n * (m + n + 2) + Index(sizeof(int)) * (n + kMaxSweeps);
    return ceil_div(exact, 16) * 16;
  }

  static HOST_DEVICE SvdWorkspace at(void* memory, Index m, Index n) {
    T* a = static_cast<T*>(memory);
    T* v = a + n * m;
    T* norm = v + n * n;
    T* inverse = norm + n;
    int* rank = reinterpret_cast<int*>(inverse + n);
    return {a, v, norm, inverse, rank, rank + n};
  }
};

// Round-robin tournament over an even number of seats: the two columns that meet as pair p of round
// r. In seats - 1 rounds every column meets every other one once.
HOST_DEVICE int seated(int seats, int r, int k) {
  return k == 0 ? 0 : 1 + (k - 1 + r) % (seats - 1);
}

// A power of two as two factors, since the reciprocal of a subnormal number is none.
template <class T>
struct PowerOfTwo {
  T half, rest;
  HOST_DEVICE explicit PowerOfTwo(int exponent)
      : half(std::ldexp(T(1), exponent / 2)), rest(std::ldexp(T(1), exponent - exponent / 2)) {}
  HOST_DEVICE T operator*(T x) const { return x * half * rest; }
};

// The rotation [c s; -s c] from the right that makes two columns orthogonal, by the smaller angle.
template <class T>
struct Rotation {
  T cosine, sine;
  HOST_DEVICE explicit Rotation(const Gram<T>& g) {
    const T zeta = (g.yy - g.xx) / (2 * g.xy);
    const T size = std::fabs(zeta);
    // Beyond 1/eps the square would be lost, or overflow.
    const T tangent = size > 1 / Precision<T>::kEps
                          ? T(0.5) / zeta
                          : (zeta < 0 ? T(-1) : T(1)) / (size + std::sqrt(1 + zeta * zeta));
    cosine = 1 / std::sqrt(1 + tangent * tangent);
    sine = cosine * tangent;
  }

  template <class Warp>
  HOST_DEVICE void apply(const Warp& warp, T* x, T* y, Index length) const {
    const T c = cosine;
    const T s = sine;
    warp.each(length, [=](Index k) {
      const T left = x[k];
      const T right = y[k];
      x[k] = c * left - s * right;
      y[k] = s * left + c * right;
    });
  }
};

// One sweep: every pair of columns once. Sets *rotated if any pair was not yet orthogonal.
template <class Block, class T>
HOST_DEVICE void sweep_pairs(const Block& block, const SvdWorkspace<T>& w, Index m, int n,
                             int* rotated) {
  const T converged = std::sqrt(T(m)) * Precision<T>::kEps;  // cosine between two columns
  // Columns this short (A's largest entry is about 1) end as zeros whatever their angle; their
  // squares are still far from underflow.
  const T eps_squared = Precision<T>::kEps * Precision<T>::kEps;
  const T negligible = eps_squared * eps_squared;
  const int seats = n + n % 2;  // with n odd one column a round meets the empty seat n
  for (int round = 0; round < seats - 1; ++round) {
    block.each_warp(seats / 2, [&](const auto& warp, Index pair) {
      const int i = seated(seats, round, int(pair));
      const int j = seated(seats, round, seats - 1 - int(pair));
      if (i >= n || j >= n) return;
      T* x = w.a + i * m;
      T* y = w.a + j * m;
      const Gram<T> g = warp.gram(m, x, y);
      if (!(g.xx > negligible && g.yy > negligible)) return;
      if (!(std::fabs(g.xy) > converged * std::sqrt(g.xx) * std::sqrt(g.yy))) return;
      const Rotation<T> rotation(g);
      rotation.apply(warp, x, y, m);
      rotation.apply(warp, w.v + i * n, w.v + j * n, n);
      warp.each(1, [&](Index) { *rotated = 1; });
    });
  }
}

// input, u: [m, n]; s: [n]; v: [n, n], all row-major.
template <class Block, class T>
HOST_DEVICE void small_svd(const Block& block, const T* input, T* u, T* s, T* v,
                           const SvdWorkspace<T>& w, Index m, int n) {
  block.each_warp(m, [&](const auto& warp, Index i) {
    warp.each(n, [&](Index j) { w.a[j * m + i] = input[i * n + j]; });
  });
  block.each_warp(n, [&](const auto& warp, Index j) {
    const T* column = w.a + j * m;
    const T largest = warp.template max<T>(m, [&](Index i) {
      const T size = std::fabs(column[i]);
      return size <= Precision<T>::kMax ? size : Precision<T>::kInfinity;  // NaN too
    });
    warp.each(1, [&](Index) { w.norm[j] = largest; });
  });
  T largest = 0;
  for (int j = 0; j < n; ++j) largest = w.norm[j] > largest ? w.norm[j] : largest;
  if (!(largest <= Precision<T>::kMax)) {
    const T nan = Precision<T>::kInfinity - Precision<T>::kInfinity;
    block.each(m * n, [&](Index i) { u[i] = nan; });
    block.each(n, [&](Index i) { s[i] = nan; });
    block.each(n * n, [&](Index i) { v[i] = nan; });
    return;
  }

  const int exponent = largest > 0 ? std::ilogb(largest) : 0;
  const PowerOfTwo<T> scale_down(-exponent);
  block.each_warp(n, [&](const auto& warp, Index j) {
    T* column = w.a + j * m;
    warp.each(m, [&](Index i) { column[i] = scale_down * column[i]; });
    warp.each(n, [&](Index i) { w.v[j * n + i] = T(i == j); });
    if (j == 0) warp.each(kMaxSweeps, [&](Index i) { w.rotated[i] = 0; });
  });
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    sweep_pairs(block, w, m, n, w.rotated + sweep);
    if (w.rotated[sweep] == 0) break;
  }

  block.each_warp(n, [&](const auto& warp, Index j) {
    const T* column = w.a + j * m;
    const T square = warp.template sum<T>(m, [&](Index i) { return column[i] * column[i]; });
    warp.each(1, [&](Index) { w.norm[j] = std::sqrt(square); });
  });
  const PowerOfTwo<T> scale_up(exponent);
  block.each(n, [&](Index j) {
    const T mine = w.norm[j];
    T first = 0;
    int rank = 0;
    for (int i = 0; i < n; ++i) {
      first = w.norm[i] > first ? w.norm[i] : first;
      rank += w.norm[i] > mine || (w.norm[i] == mine && i < j);
    }
    const bool noise = !(mine > n * Precision<T>::kEps * first);
    w.rank[j] = rank;
    w.inverse[j] = noise ? T(0) : 1 / mine;
    s[rank] = noise ? T(0) : scale_up * mine;
  });
  block.each_warp(m, [&](const auto& warp, Index i) {
    warp.each(n, [&](Index j) { u[i * n + w.rank[j]] = w.a[j * m + i] * w.inverse[j]; });
  });
  block.each_warp(n, [&](const auto& warp, Index i) {
    warp.each(n, [&](Index j) { v[i * n + w.rank[j]] = w.v[j * n + i]; });
  });
}

}  // namespace prolora
