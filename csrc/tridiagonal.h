// clang-format off
// Leading eigenpairs of a batch of symmetric matrices, in three ops:
//
//   tridiagonalise       A = Q T Qᵀ by Householder reflections in panels (LAPACK's sytrd; Dongarra,
//                        Sorensen, Hammarling 1989): a product with the trailing submatrix for each
//                        column, and an update of rank 2 kPanel for each panel.
//   tridiagonal_values   the largest eigenvalues of T, by bisection with Sturm counts (Givens 1954).
//   tridiagonal_vectors  their eigenvectors, by twisted factorisations (Dhillon, Parlett 2004).
//
// The last two compute in float64, whatever the precision of A. Values and vectors are independent of
// each other: each is one lane of a CPU's vector registers. Vectors of eigenvalues that agree to 1e-12
// of the largest may be far from orthogonal; the Python side measures that.
//
// A [d, d] is row-major. Its upper triangle is read, and overwritten by the reflections: that of column
// j is H_j = I - tau_j v vᵀ with v_(j+1) = 1 and the other entries in row j, from column j + 2 on (which
// is LAPACK's lower form in column-major order). 4/3 d³ flops, half of them in matrix-vector products
// that read d³/6 numbers in all. Bound on a CPU: the bandwidth of its last cache, for 4 d³/6 bytes in
// float32. There is no CUDA version: on a GPU the eigenproblems go to cuSOLVER.
// clang-format on
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "block.h"
#include "ops.h"

namespace prolora {

// Columns of a panel.
constexpr int kPanel = 32;
// Halvings of an interval of twice the largest value: to 2^-47 of it.
constexpr int kHalvings = 48;

inline void check_tridiagonal_size(Index d) {
  if (d < 1 || d > kMaxTridiagonal) {
    throw std::invalid_argument("tridiagonalise: takes 1 to 16384 columns");
  }
}

// What a panel needs beside the matrix: v and w, and their products with a vector.
template <class T>
struct PanelVectors {
  T* v;              // [kPanel, stride]
  T* w;              // [kPanel, stride]
  double* products;  // [2, kPanel]
  int stride;

  // Of rows: an odd number of lines of a cache, so that the rows of a panel are not all in a few of
  // its sets.
  static PROLORA_HOST_DEVICE int stride_of(Index d) {
    constexpr int kLine = 64 / int(sizeof(T));
    const int lines = int(ceil_div(d, kLine));
    return (lines + 1 - lines % 2) * kLine;
  }
  static PROLORA_HOST_DEVICE Index bytes(Index d) {
    return 2 * kPanel * (stride_of(d) * Index(sizeof(T)) + Index(sizeof(double)));
  }
  static PROLORA_HOST_DEVICE PanelVectors at(std::byte* memory, Index d) {
    const int stride = stride_of(d);
    T* v = reinterpret_cast<T*>(memory + 2 * kPanel * sizeof(double));
    return {v, v + kPanel * stride, reinterpret_cast<double*>(memory), stride};
  }
  PROLORA_HOST_DEVICE T* v_row(int s) const { return v + s * stride; }
  PROLORA_HOST_DEVICE T* w_row(int s) const { return w + s * stride; }
};

// v, tau and the entry beside the diagonal for x = row[j + 1 ...]; v goes to row j and the panel.
template <class Block, class T>
PROLORA_HOST_DEVICE void reflect(const Block& block, T* row, T* v, T* tau, double* beside, int j,
                                 int d) {
  block.each_warp(1, [&](const auto& warp, int) {
    const T* x = row + j + 2;
    const double rest =
        warp.template sum<double>(d - j - 2, [&](int c) { return double(x[c]) * double(x[c]); });
    const double first = double(row[j + 1]);
    double length = std::sqrt(first * first + rest);
    length = first > 0 ? -length : length;
    const bool none = !(rest > 0);
    const double scale = none ? 0.0 : 1 / (first - length);
    warp.sync();
    warp.each(j + 1, [&](int c) { v[c] = 0; });
    warp.each(d - j - 2, [&](int c) {
      const T entry = T(double(x[c]) * scale);
      row[j + 2 + c] = entry;
      v[j + 2 + c] = entry;
    });
    warp.each(1, [&](int) {
      v[j + 1] = 1;
      tau[j] = none ? T(0) : T((length - first) / length);
      beside[j] = none ? first : length;
    });
  });
}

// w = tau (A v) - ..., of the matrix as the panel has left it, from p = A v of the one before it.
template <class Block, class T>
PROLORA_HOST_DEVICE void finish_product(const Block& block, const PanelVectors<T>& panel, T tau,
                                        int t, int first, int d) {
  const T* v = panel.v_row(t);
  T* w = panel.w_row(t);
  const int n = d - first;
  block.each_warp(2 * t, [&](const auto& warp, int i) {
    const T* other = i < t ? panel.w_row(i) : panel.v_row(i - t);
    panel.products[i] = double(warp.template dot<T>(n, other + first, v + first));
  });
  for (int s = 0; s < t; ++s) {
    const T by_w = T(panel.products[s]);
    const T by_v = T(panel.products[t + s]);
    const T* vs = panel.v_row(s);
    const T* ws = panel.w_row(s);
    block.each(n, [&](int c) { w[first + c] -= by_w * vs[first + c] + by_v * ws[first + c]; });
  }
  block.each_warp(1, [&](const auto& warp, int) {
    panel.products[0] = double(warp.template dot<T>(n, w + first, v + first));
  });
  const T share = T(-0.5) * tau * tau * T(panel.products[0]);
  block.each(n, [&](int c) { w[first + c] = tau * w[first + c] + share * v[first + c]; });
}

// `Products` multiplies with and updates what is left of the matrix, its rows and columns from
// `first` on: serial_products.h.
template <class Block, class Products, class T>
PROLORA_HOST_DEVICE void tridiagonalise(const Block& block, const Products& products, T* a, T* tau,
                                        double* diagonal, double* beside,
                                        const PanelVectors<T>& panel, int d) {
  for (int start = 0; start < d - 1; start += kPanel) {
    const int end = start + kPanel < d - 1 ? start + kPanel : d - 1;
    for (int j = start; j < end; ++j) {
      const int t = j - start;
      T* row = a + Index(j) * d;
      for (int s = 0; s < t; ++s) {
        const T* v = panel.v_row(s);
        const T* w = panel.w_row(s);
        const T by_v = v[j];
        const T by_w = w[j];
        block.each(d - j, [&](int c) { row[j + c] -= by_v * w[j + c] + by_w * v[j + c]; });
      }
      reflect(block, row, panel.v_row(t), tau, beside, j, d);
      products.multiply(block, a, panel.v_row(t), panel.w_row(t), j + 1, d);
      finish_product(block, panel, tau[j], t, j + 1, d);
      block.each(1, [&](int) { diagonal[j] = double(row[j]); });
    }
    products.update(block, a, panel, end - start, end, d);
  }
  block.each(1, [&](int) {
    diagonal[d - 1] = double(a[Index(d) * d - 1]);
    tau[d - 1] = 0;
    beside[d - 1] = 0;
  });
}

template <class Block, class Products, class T>
PROLORA_HOST_DEVICE void reduce_matrix(const Block& block, const Products& products,
                                       const TridiagonaliseArgs<T>& args, Index matrix) {
  const Index at = matrix * args.d;
  std::byte* scratch = args.scratch + matrix * PanelVectors<T>::bytes(args.d);
  tridiagonalise(block, products, args.a + at * args.d, args.tau + at, args.diagonal + at,
                 args.beside + at, PanelVectors<T>::at(scratch, args.d), int(args.d));
}

// One matrix's T for the two ops on it.
struct Tridiagonal {
  const double* diagonal;  // [n]
  const double* beside;    // [n - 1]
  int n;
};

template <class Args>
PROLORA_HOST_DEVICE Tridiagonal tridiagonal_of(const Args& args, Index matrix) {
  return {args.diagonal + matrix * args.d, args.beside + matrix * args.d, int(args.d)};
}

// All eigenvalues are in [-reach, reach].
PROLORA_HOST_DEVICE double gershgorin(const Tridiagonal& t) {
  double reach = 0;
  for (int i = 0; i < t.n; ++i) {
    const double left = i > 0 ? std::fabs(t.beside[i - 1]) : 0;
    const double right = i + 1 < t.n ? std::fabs(t.beside[i]) : 0;
    const double sum = std::fabs(t.diagonal[i]) + left + right;
    reach = sum > reach || !(sum == sum) ? sum : reach;  // NaN stays
  }
  return reach;
}

// Pivots smaller than this are replaced by it.
PROLORA_HOST_DEVICE double smallest_pivot(const Tridiagonal& t) {
  return 1e-300 + gershgorin(t) * 1e-32;
}

// The power of two that brings a positive number to [1, 2).
PROLORA_HOST_DEVICE double power_to_one(double number) {
  std::uint64_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  bits = 0x7fe0000000000000u - (bits & 0x7ff0000000000000u);
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// The eigenvalues number first, first + 1, ... of kLanes, descending; reach: of gershgorin. They
// are counted by the signs of the leading minors of T - s, without a division: two of these stay in
// range for kSteps steps, and are scaled then. Entries beside the diagonal are 1e-15 of the reach
// or more, so that no two minors vanish: that moves a value by as much.
template <int kLanes>
PROLORA_HOST_DEVICE void bisect(const Tridiagonal& t, double reach, int first, double* values) {
  constexpr int kSteps = 8;
  double low[kLanes], high[kLanes], middle[kLanes], minor[kLanes], before[kLanes], below[kLanes];
  const double unit = reach > 0 && reach < 1e150 ? power_to_one(reach) : 1.0;
  PROLORA_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    // Not quite symmetric, so that no number in the middle is an eigenvalue by its shape.
    low[l] = -1.0000001 * unit * reach;
    high[l] = 1.0000003 * unit * reach;
  }
  for (int step = 0; step < kHalvings; ++step) {
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      middle[l] = 0.5 * (low[l] + high[l]);
      before[l] = 1;
      minor[l] = t.diagonal[0] * unit - middle[l];
      below[l] = minor[l] < 0 ? 1.0 : 0.0;
    }
    for (int begin = 1; begin < t.n; begin += kSteps) {
      const int end = begin + kSteps < t.n ? begin + kSteps : t.n;
      for (int i = begin; i < end; ++i) {
        const double beside = t.beside[i - 1] * unit;
        const double square = beside * beside + 1e-30;
        const double next = t.diagonal[i] * unit;
        PROLORA_LANES
        for (int l = 0; l < kLanes; ++l) {
          const double now = (next - middle[l]) * minor[l] - square * before[l];
          // Signs, not a product: a minor of 0 counts as positive, and its change is not lost.
          below[l] += std::copysign(1.0, now) != std::copysign(1.0, minor[l]) ? 1.0 : 0.0;
          before[l] = minor[l];
          minor[l] = now;
        }
      }
      PROLORA_LANES
      for (int l = 0; l < kLanes; ++l) {
        const double scale = power_to_one(std::fabs(minor[l]) + std::fabs(before[l]));
        minor[l] *= scale;
        before[l] *= scale;
      }
    }
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      const bool more = t.n - below[l] > first + l;
      low[l] = more ? middle[l] : low[l];
      high[l] = more ? high[l] : middle[l];
    }
  }
  PROLORA_UNROLL
  for (int l = 0; l < kLanes; ++l) values[l] = 0.5 * (low[l] + high[l]) / unit;
}

// An entry of a unit vector. The smallest, of which there are many, are replaced by 0: they would
// be subnormal in float32, or have subnormal products, which take ten times as long.
PROLORA_HOST_DEVICE double unit_entry(double entry, double unit) {
  const double scaled = entry * unit;
  return std::fabs(scaled) < 1e-20 ? 0.0 : scaled;
}

// Unit eigenvectors of kLanes values, in scratch [n, kStride] of three: the factorisations from the
// top and from the bottom, and the vectors. Returns by `squares` what a vector's entries are to be
// divided by the root of.
template <int kLanes>
PROLORA_HOST_DEVICE void twist(const Tridiagonal& t, double tiny, const double* value, double* top,
                               double* bottom, double* vector, Index stride, double* squares) {
  double p[kLanes], best[kLanes];
  int at[kLanes];
  const int n = t.n;
  PROLORA_LANES
  for (int l = 0; l < kLanes; ++l) p[l] = t.diagonal[0] - value[l];
  for (int i = 0;; ++i) {
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      p[l] = std::fabs(p[l]) < tiny ? -tiny : p[l];
      top[i * stride + l] = p[l];
    }
    if (i + 1 == n) break;
    const double square = t.beside[i] * t.beside[i];
    const double next = t.diagonal[i + 1];
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) p[l] = next - value[l] - square / p[l];
  }
  PROLORA_LANES
  for (int l = 0; l < kLanes; ++l) {
    p[l] = t.diagonal[n - 1] - value[l];
    best[l] = 1e308;
    at[l] = n - 1;
  }
  for (int i = n - 1;; --i) {
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      p[l] = std::fabs(p[l]) < tiny ? -tiny : p[l];
      bottom[i * stride + l] = p[l];
      const double rest = top[i * stride + l] + p[l] - (t.diagonal[i] - value[l]);
      const bool better = std::fabs(rest) < best[l];
      best[l] = better ? std::fabs(rest) : best[l];
      at[l] = better ? i : at[l];
    }
    if (i == 0) break;
    const double square = t.beside[i - 1] * t.beside[i - 1];
    const double next = t.diagonal[i - 1];
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) p[l] = next - value[l] - square / p[l];
  }
  for (int l = 0; l < kLanes; ++l) {
    double sum = 1;
    double entry = 1;
    vector[at[l] * stride + l] = 1;
    for (int i = at[l] - 1; i >= 0; --i) {
      entry *= -t.beside[i] / top[i * stride + l];
      vector[i * stride + l] = entry;
      sum += entry * entry;
    }
    entry = 1;
    for (int i = at[l] + 1; i < n; ++i) {
      entry *= -t.beside[i - 1] / bottom[i * stride + l];
      vector[i * stride + l] = entry;
      sum += entry * entry;
    }
    squares[l] = sum;
  }
}

// Multiplies the kLanes columns of x [d, kLanes] by Q = H_0 H_1 ... H_(d-2) of tridiagonalise, or
// by its transpose. 2 d² kLanes flops; each reflection reads and writes its part of x once.
template <int kLanes>
PROLORA_HOST_DEVICE void apply_reflections(const double* reflections, const double* tau, int d,
                                           bool transpose, double* x) {
  constexpr int kRows = 4;  // sums of so many rows are independent of each other
  for (int step = 0; step < d - 1; ++step) {
    const int j = transpose ? step : d - 2 - step;
    if (tau[j] == 0) continue;
    const double* v = reflections + Index(j) * d;
    double sums[kRows][kLanes];
    double* head = x + Index(j + 1) * kLanes;
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      sums[0][l] = head[l];
      sums[1][l] = sums[2][l] = sums[3][l] = 0;
    }
    int c = j + 2;
    for (; c + kRows <= d; c += kRows) {
      for (int r = 0; r < kRows; ++r) {
        const double entry = v[c + r];
        const double* row = x + Index(c + r) * kLanes;
        PROLORA_LANES
        for (int l = 0; l < kLanes; ++l) sums[r][l] += entry * row[l];
      }
    }
    for (; c < d; ++c) {
      PROLORA_LANES
      for (int l = 0; l < kLanes; ++l) sums[0][l] += v[c] * x[Index(c) * kLanes + l];
    }
    double share[kLanes];
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      share[l] = tau[j] * ((sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]));
      head[l] -= share[l];
    }
    for (c = j + 2; c < d; ++c) {
      double* row = x + Index(c) * kLanes;
      PROLORA_LANES
      for (int l = 0; l < kLanes; ++l) row[l] -= v[c] * share[l];
    }
  }
}

// Multiplies the columns of x [d, kLanes] by T; y is another array of that size.
template <int kLanes>
PROLORA_HOST_DEVICE void multiply_tridiagonal(const Tridiagonal& t, const double* x, double* y) {
  for (int i = 0; i < t.n; ++i) {
    const double left = i > 0 ? t.beside[i - 1] : 0;
    const double right = i + 1 < t.n ? t.beside[i] : 0;
    const double* row = x + Index(i) * kLanes;
    const double* above = i > 0 ? row - kLanes : row;
    const double* below = i + 1 < t.n ? row + kLanes : row;
    PROLORA_LANES
    for (int l = 0; l < kLanes; ++l) {
      y[Index(i) * kLanes + l] = t.diagonal[i] * row[l] + left * above[l] + right * below[l];
    }
  }
}

}  // namespace prolora
