// Thin SVD of one small matrix by one-sided Jacobi:  A = U diag(s) Vᵀ,  A: m x n, n <= m; or s
// alone.
//
// Rotations from the right make the columns of A orthogonal pair by pair; what they become is
// U diag(s), and the product of the rotations is V. Chosen over bidiagonalisation because every
// rotation is independent work for a warp, the whole matrix stays in shared memory, and small
// singular values come out as exactly as large ones.
//
// Per sweep: n(n-1)/2 pairs, each 2m flops to find the angle and 6(m+n) to rotate, 6m without V;
// 5 to 8 sweeps for n = 16 to 128. As in LAPACK's gesvj the squared lengths of the columns are
// kept: a rotation shifts t x·y from one to the other. They are taken anew where that cancels, and
// at the start of every sweep, so that the sweep that finds nothing to rotate, and ends it all, has
// judged by fresh ones. Global traffic: A once in; U, s, V once out. For m >> n take a QR first and
// give R. One launch, a block a matrix. Bound: shared memory, of which a sweep moves 3 n² (m + n)
// numbers, 3 n² m without V.
//
// Promises (eps of T): |s - s_exact| <= ~n eps s_1; ‖A - U S Vᵀ‖, ‖VᵀV - I‖ and ‖UᵀU - I‖ (over the
// columns with s > 0) at most a small multiple of n eps.
// - s is descending, and the same bits with and without U and V. A value of at most n eps s_1 is
//   rounding noise: it is given as exactly 0, with a zero column in U (V stays orthonormal).
// - Any scale: A is first divided by a power of two, exactly.
// - NaN or Inf anywhere in A: NaN everywhere in U, s and V. Always ends, after kMaxSweeps at most.
#pragma once

#include <climits>
#include <cmath>
#include <limits>
#include <stdexcept>

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

// Indices within a matrix have 32 bits.
inline void check_svd_size(Index m, Index n) {
  if (n > kMaxSvdColumns || m * n > INT_MAX) {
    throw std::invalid_argument("small_svd: more than 128 columns or 2^31 - 1 entries");
  }
}

// What a matrix needs while it is worked on; in shared memory where it fits.
template <class T>
struct SvdWorkspace {
  T* a;          // [n][m], a column of A after the other; becomes U diag(s), unsorted
  T* v;          // [n][n], a column of V after the other; not there without vectors
  T* length;     // [n], squared lengths of the columns; at the end the lengths
  T* inverse;    // [n], their inverses, 0 for a zero column
  int* rank;     // [n], place of each column in descending order
  int* rotated;  // [kMaxSweeps], whether a sweep rotated anything

  // Rounded up, so that the next matrix's workspace is aligned as well.
  static PROLORA_HOST_DEVICE Index bytes(Index m, Index n, bool vectors) {
    const Index exact =
        Index(sizeof(T)) * n * (m + (vectors ? n : 0) + 2) + Index(sizeof(int)) * (n + kMaxSweeps);
    return ceil_div(exact, 16) * 16;
  }

  static PROLORA_HOST_DEVICE SvdWorkspace at(void* memory, int m, int n, bool vectors) {
    T* a = static_cast<T*>(memory);
    T* v = a + n * m;
    T* length = v + (vectors ? n * n : 0);
    T* inverse = length + n;
    int* rank = reinterpret_cast<int*>(inverse + n);
    return {a, v, length, inverse, rank, rank + n};
  }
};

// Round-robin tournament over an even number of seats: the two columns that meet as pair p of round
// r. In seats - 1 rounds every column meets every other one once.
PROLORA_HOST_DEVICE int seated(int seats, int r, int k) {
  return k == 0 ? 0 : 1 + (k - 1 + r) % (seats - 1);
}

// A power of two as two factors, since the reciprocal of a subnormal number is none.
template <class T>
struct PowerOfTwo {
  T half, rest;
  PROLORA_HOST_DEVICE explicit PowerOfTwo(int exponent)
      : half(std::ldexp(T(1), exponent / 2)), rest(std::ldexp(T(1), exponent - exponent / 2)) {}
  PROLORA_HOST_DEVICE T operator*(T x) const { return x * half * rest; }
};

// The rotation [c s; -s c] from the right that makes two columns orthogonal, by the smaller angle.
template <class T>
struct Rotation {
  T cosine, sine, tangent;
  PROLORA_HOST_DEVICE Rotation(T xx, T xy, T yy) {
    const T zeta = (yy - xx) / (2 * xy);
    const T size = std::fabs(zeta);
    // Beyond 1/eps the square would be lost, or overflow.
    tangent = size > 1 / Precision<T>::kEps
                  ? T(0.5) / zeta
                  : (zeta < 0 ? T(-1) : T(1)) / (size + std::sqrt(1 + zeta * zeta));
    cosine = 1 / std::sqrt(1 + tangent * tangent);
    sine = cosine * tangent;
  }

  template <class Warp>
  PROLORA_HOST_DEVICE void apply(const Warp& warp, T* x, T* y, int length) const {
    const T c = cosine;
    const T s = sine;
    warp.each(length, [=](int k) {
      const T left = x[k];
      const T right = y[k];
      x[k] = c * left - s * right;
      y[k] = s * left + c * right;
    });
  }
};

// Rotates columns i and j if they are not orthogonal yet, and says so in *rotated.
template <bool kVectors, class Warp, class T>
PROLORA_HOST_DEVICE void rotate_pair(const Warp& warp, const SvdWorkspace<T>& w, int m, int n,
                                     int i, int j, int* rotated) {
  const T converged = std::sqrt(T(m)) * Precision<T>::kEps;  // cosine between two columns
  // Columns this short (A's largest entry is about 1) end as zeros whatever their angle; their
  // squares are still far from underflow.
  const T eps_squared = Precision<T>::kEps * Precision<T>::kEps;
  const T negligible = eps_squared * eps_squared;
  // Below this share of a squared length before, what the rotation left has lost half its digits.
  const T cancelled = std::sqrt(Precision<T>::kEps);
  T* x = w.a + i * m;
  T* y = w.a + j * m;
  const T xx = w.length[i];
  const T yy = w.length[j];
  if (!(xx > negligible && yy > negligible)) return;
  const T xy = warp.dot(m, x, y);
  if (!(std::fabs(xy) > converged * std::sqrt(xx) * std::sqrt(yy))) return;
  const Rotation<T> rotation(xx, xy, yy);
  rotation.apply(warp, x, y, m);
  if constexpr (kVectors) rotation.apply(warp, w.v + i * n, w.v + j * n, n);
  T left = xx - rotation.tangent * xy;
  T right = yy + rotation.tangent * xy;
  if (!(left > cancelled * xx)) left = warp.dot(m, x, x);
  if (!(right > cancelled * yy)) right = warp.dot(m, y, y);
  warp.sync();  // every lane has read the two lengths
  warp.each(1, [&](int) {
    w.length[i] = left;
    w.length[j] = right;
    *rotated = 1;
  });
}

template <class Block, class T>
PROLORA_HOST_DEVICE void measure_columns(const Block& block, const SvdWorkspace<T>& w, int m,
                                         int n) {
  block.each_warp(n, [&](const auto& warp, int j) {
    const T square = warp.dot(m, w.a + j * m, w.a + j * m);
    warp.each(1, [&](int) { w.length[j] = square; });
  });
}

// One sweep: every pair of columns once. Sets *rotated if any pair was not yet orthogonal.
template <bool kVectors, class Block, class T>
PROLORA_HOST_DEVICE void sweep_pairs(const Block& block, const SvdWorkspace<T>& w, int m, int n,
                                     int* rotated) {
  measure_columns(block, w, m, n);
  const int seats = n + n % 2;  // with n odd one column a round meets the empty seat n
  for (int round = 0; round < seats - 1; ++round) {
    block.each_warp(seats / 2, [&](const auto& warp, int pair) {
      const int i = seated(seats, round, pair);
      const int j = seated(seats, round, seats - 1 - pair);
      if (i < n && j < n) rotate_pair<kVectors>(warp, w, m, n, i, j, rotated);
    });
  }
}

// The largest |entry| of a matrix whose columns are in w.a; infinity where one is NaN.
template <class Block, class T>
PROLORA_HOST_DEVICE T largest_entry(const Block& block, const SvdWorkspace<T>& w, int m, int n) {
  block.each_warp(n, [&](const auto& warp, int j) {
    const T* column = w.a + j * m;
    const T largest = warp.template max<T>(m, [&](int i) {
      const T size = std::fabs(column[i]);
      return size <= Precision<T>::kMax ? size : Precision<T>::kInfinity;  // NaN too
    });
    warp.each(1, [&](int) { w.length[j] = largest; });
  });
  T largest = 0;
  for (int j = 0; j < n; ++j) largest = w.length[j] > largest ? w.length[j] : largest;
  return largest;
}

// input, u: [m, n]; s: [n]; v: [n, n], all row-major. u and v are not touched without kVectors.
template <bool kVectors, class Block, class T>
PROLORA_HOST_DEVICE void small_svd(const Block& block, const T* input, T* u, T* s, T* v,
                                   const SvdWorkspace<T>& w, int m, int n) {
  block.each_warp(m, [&](const auto& warp, int i) {
    warp.each(n, [&](int j) { w.a[j * m + i] = input[i * n + j]; });
  });
  const T largest = largest_entry(block, w, m, n);
  if (!(largest <= Precision<T>::kMax)) {
    const T nan = Precision<T>::kInfinity - Precision<T>::kInfinity;
    block.each(n, [&](int i) { s[i] = nan; });
    if constexpr (kVectors) {
      block.each(m * n, [&](int i) { u[i] = nan; });
      block.each(n * n, [&](int i) { v[i] = nan; });
    }
    return;
  }

  const int exponent = largest > 0 ? std::ilogb(largest) : 0;
  const PowerOfTwo<T> scale_down(-exponent);
  block.each_warp(n, [&](const auto& warp, int j) {
    T* column = w.a + j * m;
    warp.each(m, [&](int i) { column[i] = scale_down * column[i]; });
    if constexpr (kVectors) warp.each(n, [&](int i) { w.v[j * n + i] = T(i == j); });
    if (j == 0) warp.each(kMaxSweeps, [&](int i) { w.rotated[i] = 0; });
  });
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    sweep_pairs<kVectors>(block, w, m, n, w.rotated + sweep);
    if (w.rotated[sweep] == 0) break;
  }

  measure_columns(block, w, m, n);
  block.each(n, [&](int j) { w.length[j] = std::sqrt(w.length[j]); });
  const PowerOfTwo<T> scale_up(exponent);
  block.each(n, [&](int j) {
    const T mine = w.length[j];
    T first = 0;
    int rank = 0;
    for (int i = 0; i < n; ++i) {
      first = w.length[i] > first ? w.length[i] : first;
      rank += w.length[i] > mine || (w.length[i] == mine && i < j);
    }
    const bool noise = !(mine > n * Precision<T>::kEps * first);
    w.rank[j] = rank;
    w.inverse[j] = noise ? T(0) : 1 / mine;
    s[rank] = noise ? T(0) : scale_up * mine;
  });
  if constexpr (kVectors) {
    block.each_warp(m, [&](const auto& warp, int i) {
      warp.each(n, [&](int j) { u[i * n + w.rank[j]] = w.a[j * m + i] * w.inverse[j]; });
    });
    block.each_warp(n, [&](const auto& warp, int i) {
      warp.each(n, [&](int j) { v[i * n + w.rank[j]] = w.v[j * n + i]; });
    });
  }
}

}  // namespace prolora
