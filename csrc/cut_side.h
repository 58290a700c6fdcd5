// clang-format off
// Singular vectors of small weights on the smaller side of a cut, with a bound, one core a matrix.
//
//   G = w wᵀ = Q T Qᵀ       tridiagonal.h
//   k columns are kept      given, or the fewest that hold a share of the trace
//   rows c_i, wᵀ c_i / σ_i  of the k leading ones, or of the d - k left out, whichever are fewer
//   bound                   on the sine of the largest principal angle, as in core/svd/smaller_side.py
//                           (which explains it), but with the residual of each vector
//
// The Python version takes some ninety calls of torch and numpy. For two weights of 64 x 64 these take
// twice as long as the arithmetic.
//
// Vectors are columns of x [d, kGroup], in groups of kGroup, so that a row of a group is what a core's
// vector registers hold.
// clang-format on
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "serial_products.h"
#include "tridiagonal.h"

namespace prolora {

// Columns of a group: two vectors of AVX-512.
constexpr int kGroup = 16;

// What is found out about a matrix, beside its rows; CutSide in core/svd/smaller_side.py.
struct CutFacts {
  double leading;    // 1 if the rows are the leading ones, 0 if they are left out
  double number;     // of rows
  double count;      // columns that are kept
  double following;  // the first eigenvalue beyond the cut
  double bound;      // 1 if not proven
  double smallest;   // the smallest eigenvalue
  double energy;     // the trace
  double error;      // of the reduction and of an eigenvalue
};

constexpr double kEps = 2.220446049250313e-16;
constexpr double kEps32 = 1.1920928955078125e-07;

// Sums of the products of all columns of two groups: [kGroup, kGroup].
PROLORA_FOR_EACH_TARGET static void multiply_groups(const double* x, const double* y, Index d,
                                                    double* sums) {
  std::fill(sums, sums + kGroup * kGroup, 0.0);
  for (Index i = 0; i < d; ++i) {
    const double* row = y + i * kGroup;
    for (int a = 0; a < kGroup; ++a) {
      const double entry = x[i * kGroup + a];
      PROLORA_LANES
      for (int l = 0; l < kGroup; ++l) sums[a * kGroup + l] += entry * row[l];
    }
  }
}

// ‖X Xᵀ - I‖_F² of `count` columns in groups.
inline double square_skew(const std::vector<double>& groups, Index d, int count) {
  double sums[kGroup * kGroup], total = 0;
  const int number = (count + kGroup - 1) / kGroup;
  for (int g = 0; g < number; ++g) {
    for (int h = 0; h <= g; ++h) {
      multiply_groups(&groups[g * d * kGroup], &groups[h * d * kGroup], d, sums);
      for (int a = 0; a < kGroup && g * kGroup + a < count; ++a) {
        for (int l = 0; l < kGroup && h * kGroup + l < count; ++l) {
          const bool same = g == h && a == l;
          const double off = sums[a * kGroup + l] - (same ? 1.0 : 0.0);
          total += (g == h ? 1.0 : 2.0) * off * off;
        }
      }
    }
  }
  return total;
}

// y [rows, kGroup] = A x, of A [rows, cols]; with `transposed`, y [cols, kGroup] = Aᵀ x.
PROLORA_FOR_EACH_TARGET static void multiply_lanes(const double* a, Index rows, Index cols,
                                                   bool transposed, const double* x, double* y) {
  std::fill(y, y + (transposed ? cols : rows) * kGroup, 0.0);
  for (Index i = 0; i < rows; ++i) {
    const double* row = a + i * cols;
    double sums[4][kGroup] = {};
    Index j = 0;
    if (!transposed) {
      for (; j + 4 <= cols; j += 4) {
        for (int r = 0; r < 4; ++r) {
          PROLORA_LANES
          for (int l = 0; l < kGroup; ++l) sums[r][l] += row[j + r] * x[(j + r) * kGroup + l];
        }
      }
      for (; j < cols; ++j) {
        PROLORA_LANES
        for (int l = 0; l < kGroup; ++l) sums[0][l] += row[j] * x[j * kGroup + l];
      }
      PROLORA_LANES
      for (int l = 0; l < kGroup; ++l) {
        y[i * kGroup + l] = (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]);
      }
    } else {
      for (; j < cols; ++j) {
        PROLORA_LANES
        for (int l = 0; l < kGroup; ++l) y[j * kGroup + l] += row[j] * x[i * kGroup + l];
      }
    }
  }
}

// Scratch of one core.
struct CutScratch {
  std::vector<double> a, tau, diagonal, beside, values, twisted, product;
  std::vector<double> shorts, longs;  // groups of columns of the short and of the long side
  std::vector<std::byte> panel;
};

// kGroup eigenvalues of T from number `first` of the descending ones on.
PROLORA_FOR_EACH_TARGET static void find_values(const Tridiagonal& t, Index first, double* values) {
  bisect<kGroup>(t, gershgorin(t), int(first), values);
}

// Q of one matrix's reduction; null if vectors of T are wanted.
struct Reflections {
  const double* rows;  // [d, d]
  const double* tau;   // [d]
};

// Unit eigenvectors x [d, kGroup] of T, or of Q T Qᵀ; scratch: [2, d, kGroup].
PROLORA_FOR_EACH_TARGET static void find_vectors(const Tridiagonal& t, const Reflections& q,
                                                 const double* values, double* scratch, double* x) {
  double squares[kGroup];
  twist<kGroup>(t, smallest_pivot(t), values, scratch, scratch + t.n * kGroup, x, kGroup, squares);
  for (int l = 0; l < kGroup; ++l) squares[l] = 1 / std::sqrt(squares[l]);
  for (int i = 0; i < t.n; ++i) {
    for (int l = 0; l < kGroup; ++l) x[i * kGroup + l] = unit_entry(x[i * kGroup + l], squares[l]);
  }
  if (q.rows) apply_reflections<kGroup>(q.rows, q.tau, t.n, false, x);
}

// y = Q T Qᵀ x of x [d, kGroup], which is overwritten.
PROLORA_FOR_EACH_TARGET static void multiply_reduced(const Tridiagonal& t, const Reflections& q,
                                                     double* x, double* y) {
  apply_reflections<kGroup>(q.rows, q.tau, t.n, true, x);
  multiply_tridiagonal<kGroup>(t, x, y);
  apply_reflections<kGroup>(q.rows, q.tau, t.n, false, y);
}

// Eigenvalues of T, computed when they are wanted, in groups: number i of the descending ones.
class Values {
 public:
  Values(const Tridiagonal& t, std::vector<double>& memory) : t_(t) {
    memory.assign(std::size_t(t.n + 2 * kGroup), 0.0);
    values_ = memory.data();
    known_.assign(std::size_t(t.n / kGroup + 1), false);
  }
  double operator[](int i) {
    const int group = i / kGroup;
    if (!known_[group]) {
      find_values(t_, group * kGroup, values_ + group * kGroup);
      known_[group] = true;
    }
    return values_[i];
  }

 private:
  Tridiagonal t_;
  double* values_;
  std::vector<bool> known_;
};

// How many columns to keep; whether that is certain, which a sum next to a tie is not.
inline std::pair<int, bool> count_kept(Values& values, int d, double share, double energy,
                                       double error) {
  bool certain = energy > 0;
  const double wanted = (1 - share) * energy, margin = (d / 2 + 1) * error;
  double sum = 0;
  for (int i = d - 1; i >= (d - 1) / 2; --i) {
    sum += std::max(values[i], 0.0);
    if (std::fabs(sum - wanted) <= margin) certain = false;
    if (sum > wanted) return {i + 1, certain};
  }
  // The sum from the other end decides.
  certain = energy > 0;
  const double held = share * energy;
  sum = 0;
  for (int i = 0; i < d; ++i) {
    sum += std::max(values[i], 0.0);
    if (std::fabs(sum - held) <= margin) certain = false;
    if (sum >= held) return {i + 1, certain};
  }
  return {d, false};
}

template <class Reduce>
CutFacts find_cut_side(const Reduce& reduce, const double* w, const double* gram, Index d, Index n,
                       double share, Index rank, bool always_leading, CutScratch& scratch,
                       double* short_rows, double* long_rows, double* s) {
  const int size = int(d);
  scratch.a.assign(gram, gram + d * d);
  scratch.tau.resize(d);
  scratch.diagonal.resize(d);
  scratch.beside.resize(d);
  scratch.panel.resize(std::size_t(PanelVectors<double>::bytes(d)));
  reduce(TridiagonaliseArgs<double>{scratch.a.data(), scratch.tau.data(), scratch.diagonal.data(),
                                    scratch.beside.data(), scratch.panel.data(), 1, d});
  const Tridiagonal t = {scratch.diagonal.data(), scratch.beside.data(), size};
  const Reflections q = {scratch.a.data(), scratch.tau.data()};

  CutFacts facts = {};
  for (Index i = 0; i < d; ++i) facts.energy += gram[i * d + i];
  // G Ω - Q T Qᵀ Ω for signs Ω: three times its root mean square, as in Python.
  scratch.twisted.resize(std::size_t(2 * d * kGroup));
  scratch.product.resize(std::size_t(std::max(d, n) * kGroup));
  double* signs = scratch.twisted.data();
  double* back = signs + d * kGroup;
  std::uint64_t bits = 0x9e3779b97f4a7c15u;
  for (Index i = 0; i < d * kGroup; ++i) {
    bits ^= bits << 13;
    bits ^= bits >> 7;
    bits ^= bits << 17;
    signs[i] = bits >> 63 ? 1.0 : -1.0;
  }
  multiply_lanes(gram, d, d, false, signs, scratch.product.data());
  multiply_reduced(t, q, signs, back);
  double missed = 0;
  for (Index i = 0; i < d * kGroup; ++i) {
    const double off = scratch.product[i] - back[i];
    missed += off * off;
  }
  const double rounding = 2.0 * double(n) * kEps * facts.energy;  // of G itself
  facts.error = 3 * std::sqrt(missed / kGroup) + rounding + 2.8421709430404007e-14 * facts.energy;

  Values values(t, scratch.values);
  facts.smallest = values[size - 1];
  int kept = int(std::min(rank, d));
  bool certain = facts.energy > 0;
  if (rank == 0) {
    std::tie(kept, certain) = count_kept(values, size, share, facts.energy, facts.error);
  } else if (kept == size) {
    certain = facts.smallest > facts.error;
  }
  const bool leading = always_leading || 2 * kept <= size;
  const int count = leading ? kept : size - kept;
  facts.leading = leading;
  facts.number = count;
  facts.count = kept;
  if (leading && kept == size) {
    facts.following = -std::numeric_limits<double>::infinity();  // nothing lies beyond
  } else {
    facts.following = count == 0 ? 0 : values[leading ? kept : kept - 1];
  }

  const std::size_t groups = std::size_t((count + kGroup - 1) / kGroup);
  scratch.shorts.resize(groups * d * kGroup);
  scratch.longs.resize(groups * n * kGroup);
  const double beyond = std::sqrt(std::max(facts.following, 0.0));
  double square = 0;
  for (int first = 0; first < count; first += kGroup) {
    double value[kGroup];
    const int some = std::min(kGroup, count - first);
    for (int l = 0; l < kGroup; ++l) {
      const int i = std::min(first + l, count - 1);
      value[l] = values[leading ? i : size - 1 - i];
    }
    double* x = &scratch.shorts[std::size_t(first) * d];
    double* z = &scratch.longs[std::size_t(first) * n];
    find_vectors(t, q, value, scratch.twisted.data(), x);
    multiply_lanes(gram, d, d, false, x, scratch.product.data());
    multiply_lanes(w, d, n, true, x, z);
    double residual[kGroup] = {}, length[kGroup] = {};
    for (Index i = 0; i < d; ++i) {
      PROLORA_LANES
      for (int l = 0; l < kGroup; ++l) {
        const double off = scratch.product[i * kGroup + l] - value[l] * x[i * kGroup + l];
        residual[l] += off * off;
      }
    }
    for (Index i = 0; i < n; ++i) {
      PROLORA_LANES
      for (int l = 0; l < kGroup; ++l) length[l] += z[i * kGroup + l] * z[i * kGroup + l];
    }
    for (int l = 0; l < kGroup; ++l) length[l] = std::max(std::sqrt(length[l]), 1e-300);
    for (Index i = 0; i < n; ++i) {
      PROLORA_LANES
      for (int l = 0; l < kGroup; ++l) z[i * kGroup + l] /= length[l];
    }
    for (int l = 0; l < some; ++l) {
      const double apart = std::fabs(value[l] - facts.following) - facts.error;
      const double growth = std::max(beyond / length[l], 1.0);
      double angle = (std::sqrt(residual[l]) + facts.error) * growth / apart;
      angle = apart > 0 ? angle : 1.0;
      angle += 2.0 * double(d) * kEps * std::sqrt(facts.energy) / length[l];
      square += angle * angle;
      s[first + l] = length[l];
      for (Index i = 0; i < d; ++i) short_rows[(first + l) * d + i] = x[i * kGroup + l];
      for (Index i = 0; i < n; ++i) long_rows[(first + l) * n + i] = z[i * kGroup + l];
    }
  }
  const double skew = std::sqrt(square_skew(scratch.shorts, d, count)) +
                      std::sqrt(square_skew(scratch.longs, n, count));
  facts.bound = std::sqrt(square) + kEps32 * std::sqrt(double(count)) + skew;
  if (!(skew <= double(n) * kEps32)) certain = false;  // as of LAPACK in float32
  if (!certain || !(facts.bound < 1)) facts.bound = 1;
  return facts;
}

}  // namespace prolora
