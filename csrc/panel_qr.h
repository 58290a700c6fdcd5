// Orthonormal rows of a panel of few long rows, for a batch:  P = L Q,  Q Qᵀ = I, L lower.
//
// panel [r, m], r <= 128, row-major; q [r, m], l [r, r]; rank [1], int64. One block a matrix.
//
// Cholesky QR, twice: with C = D⁻¹ P Pᵀ D⁻¹ (rows scaled to length 1) and its Cholesky factor L,
// Q = L⁻¹ D⁻¹ P. A product of thin matrices in place of reflections: every sum is as long as the
// rows, and the sequential part is r x r. One pass leaves rows orthonormal to the error of C times
// cond(P)², the second to eps.
// - C comes from float products without rounding errors (below), so that a condition of 1e6 leaves
//   the first pass at 1e-2 or better, and needs no float64, which most cards have little of. The
//   r x r Cholesky alone is in double.
// - Q comes by substitution, row after row: P = L Q holds to eps of each row whatever the
// condition.
// - A pivot is the squared sine between a row and those before it. At kDrop, (8 eps)², or less the
//   row holds nothing that its rounding does not; with `scale` given, neither does a row of which
//   kDependent * scale or less is left. Such a row is dropped: zero in Q, zero column in L; P = L Q
//   still to what was left of it. `rank` counts the rows kept.
// - A pivot below 1/4 in the second pass takes a third one, and a fourth. NaN, Inf, lengths beyond
//   the range of float, and what four passes cannot do: NaN in q and l, rank -1.
// - Rows of any size: they are first divided by a power of two, exactly.
//
// Two passes: r² m products of 10 flops for the sums and 2 r² m flops for the substitutions; in
// double r³/3 for the Cholesky. One launch, r + 8 barriers a pass. Global traffic: the panel in, q
// out; in between q stays in the caches, from where a pass reads it r/4 times for the sums (4 rows
// meet 4 others at a time) and r/16 times for the substitution.
// Bound: the float32 units of one multiprocessor a matrix, and the chain of the Cholesky.
// Time of [64, 32, 1280], a multiprocessor a matrix, counted in clocks: sums 2 x 58 k, substitution
// 2 x 10 k, Cholesky 2 x 15 k, the rest 8 k: 174 k, that is 0.10 ms on an H100 and 0.07 ms on a RTX
// 4090 [E: estimated, good to a factor of two; not measured]. The same sums in float64 would take
// 0.5 ms on a RTX 4090 [E].
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "block.h"
#include "ops.h"

namespace prolora {

// A sum of products as if in twice the precision and then rounded, errors about 2^-46 of the sum of
// magnitudes (Ogita, Rump, Oishi 2005, Dot2), as a sum and what rounding took from it.
struct PreciseSum {
  float sum = 0;
  float rest = 0;

  // Knuth's TwoSum: sum + x, and its error exactly.
  PROLORA_HOST_DEVICE void add(float x, float more) {
    const float total = sum + x;
    const float part = total - sum;
    const float error = (sum - (total - part)) + (x - part);
    sum = total;
    rest += error + more;
  }

  PROLORA_HOST_DEVICE void add_product(float x, float y) {
#ifdef __CUDA_ARCH__
    const float product = __fmul_rn(x, y);  // never contracted with the sum
    add(product, __fmaf_rn(x, y, -product));
#else
    const double exact = double(x) * double(y);
    const float product = float(exact);
    add(product, float(exact - double(product)));
#endif
  }

  PROLORA_HOST_DEVICE double value() const { return double(sum) + double(rest); }

  template <class Warp>
  PROLORA_HOST_DEVICE void add_lanes(const Warp& warp) {
    for (int d = Warp::kWidth / 2; d > 0; d /= 2) add(warp.partner(sum, d), warp.partner(rest, d));
  }
};

// 128 bits: what a thread reads or writes at once.
struct alignas(16) PanelPack {
  static constexpr int kSize = 16 / sizeof(float);
  float v[kSize];

  // From and to an address that 16 divides: one instruction on a GPU. A host compiler gets a loop,
  // which it makes into what its processor has.
  static PROLORA_HOST_DEVICE PanelPack load(const float* from) {
#ifdef __CUDA_ARCH__
    return *reinterpret_cast<const PanelPack*>(from);
#else
    check_aligned(from);
    PanelPack values;
    for (int k = 0; k < kSize; ++k) values.v[k] = from[k];
    return values;
#endif
  }

  PROLORA_HOST_DEVICE void store(float* to) const {
#ifdef __CUDA_ARCH__
    *reinterpret_cast<PanelPack*>(to) = *this;
#else
    check_aligned(to);
    for (int k = 0; k < kSize; ++k) to[k] = v[k];
#endif
  }

  static PROLORA_HOST_DEVICE bool is_aligned(const float* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
  }

  static PROLORA_HOST_DEVICE void check_aligned([[maybe_unused]] const float* address) {
#ifdef PROLORA_EMULATED
    if (!is_aligned(address)) throw std::runtime_error("panel_qr: misaligned 128-bit access");
#endif
  }
};

// The rows of a matrix by packs; zero beyond the last row and column.
struct PackedRows {
  float* data;
  int r, m;
  bool aligned;

  PROLORA_HOST_DEVICE PackedRows(float* data, int r, int m)
      : data(data), r(r), m(m), aligned(PanelPack::is_aligned(data) && m % PanelPack::kSize == 0) {}
  PROLORA_HOST_DEVICE int packs() const { return int(ceil_div(m, PanelPack::kSize)); }

  PROLORA_HOST_DEVICE PanelPack read(int i, int pack) const {
    PanelPack values = {};
    if (i >= r) return values;
    const int first = pack * PanelPack::kSize;
    const float* from = data + i * m + first;
    if (aligned) return PanelPack::load(from);
    PROLORA_UNROLL
    for (int k = 0; k < PanelPack::kSize; ++k) {
      if (first + k < m) values.v[k] = from[k];
    }
    return values;
  }

  PROLORA_HOST_DEVICE void write(int i, int pack, const PanelPack& values) const {
    if (i >= r) return;
    const int first = pack * PanelPack::kSize;
    float* to = data + i * m + first;
    if (aligned) return values.store(to);
    PROLORA_UNROLL
    for (int k = 0; k < PanelPack::kSize; ++k) {
      if (first + k < m) to[k] = values.v[k];
    }
  }
};

// Row i of a packed lower triangle begins here.
PROLORA_HOST_DEVICE int triangle(int i) { return i * (i + 1) / 2; }

// Rows that the substitution finds at a time.
constexpr int kPanelStep = 8;

// A panel's r x r matrices; in shared memory where they fit.
struct PanelWorkspace {
  double* gram;     // lower triangle: P Pᵀ, C, then the Cholesky factor with columns not yet scaled
  double* length;   // [r], of the rows
  double* limit;    // [r], a pivot up to this drops its row
  double* inverse;  // [r], of the pivots, 0 for a dropped row
  float* lower;     // [stride][stride], the transpose of this pass's factor D L, zeros around it
  float* unit;      // [r], the power of two that a row of the panel was multiplied by
  float* reciprocal;  // [stride], of the diagonal of D L, 0 for a dropped row

  static PROLORA_HOST_DEVICE int stride(int r) { return int(ceil_div(r, kPanelStep)) * kPanelStep; }
  static PROLORA_HOST_DEVICE int doubles(int r) { return (triangle(r) + 3 * r + 1) / 2 * 2; }
  static PROLORA_HOST_DEVICE Index bytes(int r) {
    const int s = stride(r);
    return ceil_div(Index(sizeof(double)) * doubles(r) + Index(sizeof(float)) * (s * s + r + s),
                    16) *
           16;
  }
  static PROLORA_HOST_DEVICE PanelWorkspace at(void* memory, int r) {
    double* gram = static_cast<double*>(memory);
    double* length = gram + triangle(r);
    float* lower = reinterpret_cast<float*>(gram + doubles(r));
    float* unit = lower + stride(r) * stride(r);
    return {gram, length, length + r, length + 2 * r, lower, unit, unit + r};
  }
};

struct PanelLimits {
  static constexpr double kEps = std::numeric_limits<float>::epsilon();
  static constexpr double kDrop = 64 * kEps * kEps;  // what rounding leaves of a row
  static constexpr float kMax = std::numeric_limits<float>::max();
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  static constexpr int kLargestExponent = std::numeric_limits<float>::max_exponent - 2;
};

constexpr int kPanelWarps = 12;  // a block has at most

// Threads of a block: as many as the sums or the substitution can use; no result depends on it.
inline int panel_threads(Index r, Index m) {
  const Index side = ceil_div(r, 4);
  const Index sums = side * (side + 1) / 2;
  const Index columns = ceil_div(m, 32 * PanelPack::kSize);
  return 32 * int(min_index(kPanelWarps, sums > columns ? sums : columns));
}

constexpr double kDependent = 1e-6;
constexpr int kPanelPasses = 4;

// q = panel, each row times the power of two that brings its largest entry near 1.
template <class Block>
PROLORA_HOST_DEVICE void scale_panel_rows(const Block& block, const float* panel, float* q,
                                          const PanelWorkspace& w, int r, int m) {
  block.each_warp(r, [&](const auto& warp, int i) {
    const float* from = panel + i * m;
    float* to = q + i * m;
    const float largest = warp.template max<float>(m, [&](int p) {
      const float size = std::fabs(from[p]);
      return size <= PanelLimits::kMax ? size : PanelLimits::kInfinity;  // NaN too
    });
    const bool finite = largest <= PanelLimits::kMax;
    int exponent = largest > 0 && finite ? std::ilogb(largest) : 0;
    constexpr int kLargest = PanelLimits::kLargestExponent;
    exponent = exponent > kLargest ? kLargest : exponent < -kLargest ? -kLargest : exponent;
    const float unit = finite ? std::ldexp(float(1), -exponent) : PanelLimits::kNan;
    warp.each(m, [&](int p) { to[p] = from[p] * unit; });
    warp.each(1, [&](int) { w.unit[i] = unit; });
  });
}

// w.gram = q qᵀ, a warp for 4 x 4 entries, which read 8 rows for 16 products.
template <class Block>
PROLORA_HOST_DEVICE void sum_products(const Block& block, const PackedRows& q,
                                      const PanelWorkspace& w) {
  constexpr int kSide = 4;
  const int side = int(ceil_div(q.r, kSide));
  block.each_warp(triangle(side), [&](const auto& warp, int tile) {
    int down = 0;
    while (triangle(down + 1) <= tile) ++down;
    const int i0 = down * kSide;
    const int j0 = (tile - triangle(down)) * kSide;
    PreciseSum sums[kSide][kSide];
    warp.in_order(q.packs(), [&](int pack) {
      PanelPack x[kSide];
      PROLORA_UNROLL
      for (int i = 0; i < kSide; ++i) x[i] = q.read(i0 + i, pack);
      PROLORA_UNROLL
      for (int j = 0; j < kSide; ++j) {
        const PanelPack y = q.read(j0 + j, pack);
        PROLORA_UNROLL
        for (int k = 0; k < PanelPack::kSize; ++k) {
          PROLORA_UNROLL
          for (int i = 0; i < kSide; ++i) sums[i][j].add_product(x[i].v[k], y.v[k]);
        }
      }
    });
    PROLORA_UNROLL
    for (int i = 0; i < kSide; ++i) {
      PROLORA_UNROLL
      for (int j = 0; j < kSide; ++j) {
        sums[i][j].add_lanes(warp);
        warp.each(1, [&](int) {
          if (i0 + i < q.r && j0 + j <= i0 + i) {
            w.gram[triangle(i0 + i) + j0 + j] = sums[i][j].value();
          }
        });
      }
    }
  });
}

// Lengths of the rows, their limits, and C in place of the products. `scale` is 0 but in the first
// pass, where the lengths are still to be divided by w.unit.
template <class Block>
PROLORA_HOST_DEVICE void scale_gram(const Block& block, const PanelWorkspace& w, int r,
                                    double scale) {
  block.each(r, [&](int i) {
    const double length = std::sqrt(w.gram[triangle(i) + i]);
    w.length[i] = length;
    const double least = length > 0 ? kDependent * scale * double(w.unit[i]) / length : 0.0;
    w.limit[i] = least * least > PanelLimits::kDrop ? least * least : PanelLimits::kDrop;
  });
  block.each_warp(r, [&](const auto& warp, int i) {
    warp.each(i + 1, [&](int j) {
      double& entry = w.gram[triangle(i) + j];
      const double both = w.length[i] * w.length[j];
      entry = !(both > 0) ? 0.0 : i == j ? 1.0 : entry / both;
    });
  });
}

// C = L' diag(pivots) L'ᵀ in place: column j of w.gram becomes that of L' times its pivot. One
// barrier a column: the warp that makes the next pivot also looks at it.
template <class Block>
PROLORA_HOST_DEVICE void factor_gram(const Block& block, const PanelWorkspace& w, int r) {
  auto take_pivot = [&](int i) {
    const double pivot = w.gram[triangle(i) + i];
    w.inverse[i] = pivot > w.limit[i] ? 1 / pivot : 0.0;
  };
  block.each(min_index(r, 1), [&](int) { take_pivot(0); });
  for (int j = 0; j + 1 < r; ++j) {
    block.each_warp(r - j - 1, [&](const auto& warp, int n) {
      const int i = j + 1 + n;
      const double factor = w.gram[triangle(i) + j] * w.inverse[j];
      double* row = w.gram + triangle(i) + j + 1;
      warp.each(n + 1, [&](int k) { row[k] -= factor * w.gram[triangle(j + 1 + k) + j]; });
      if (n == 0) warp.each(1, [&](int) { take_pivot(i); });  // by the lane that has just made it
    });
  }
}

// w.lower and w.reciprocal from w.gram: L = D L' sqrt(pivots).
template <class Block>
PROLORA_HOST_DEVICE void finish_factor(const Block& block, const PanelWorkspace& w, int r) {
  const int stride = PanelWorkspace::stride(r);
  block.each_warp(stride, [&](const auto& warp, int j) {
    const double root = j < r ? std::sqrt(w.inverse[j]) : 0.0;
    warp.each(stride, [&](int i) {
      const bool inside = j <= i && i < r;
      w.lower[j * stride + i] =
          inside ? float(w.gram[triangle(i) + j] * root * w.length[i]) : float(0);
    });
    warp.each(1, [&](int) { w.reciprocal[j] = root > 0 ? float(root / w.length[j]) : float(0); });
  });
}

// q = L⁻¹ q in place: a thread for the columns of a pack, 8 rows of which it holds at a time.
template <class Block>
PROLORA_HOST_DEVICE void substitute(const Block& block, const PackedRows& q,
                                    const PanelWorkspace& w) {
  constexpr int kPack = PanelPack::kSize;
  const int stride = PanelWorkspace::stride(q.r);
  constexpr int kChunk = 32;
  const int chunks = int(ceil_div(q.packs(), kChunk));
  auto substitute_pack = [&](int pack) {
    for (int first = 0; first < q.r; first += kPanelStep) {
      PanelPack x[kPanelStep];
      PROLORA_UNROLL
      for (int i = 0; i < kPanelStep; ++i) x[i] = q.read(first + i, pack);
      for (int j = 0; j < first; ++j) {
        const PanelPack known = q.read(j, pack);
        const float* column = w.lower + j * stride + first;
        PROLORA_UNROLL
        for (int i = 0; i < kPanelStep; i += kPack) {
          const PanelPack factors = PanelPack::load(column + i);
          PROLORA_UNROLL
          for (int n = 0; n < kPack; ++n) {
            PROLORA_UNROLL
            for (int k = 0; k < kPack; ++k) x[i + n].v[k] -= factors.v[n] * known.v[k];
          }
        }
      }
      PROLORA_UNROLL
      for (int i = 0; i < kPanelStep; ++i) {
        PROLORA_UNROLL
        for (int j = 0; j < i; ++j) {
          const float factor = w.lower[(first + j) * stride + first + i];
          PROLORA_UNROLL
          for (int k = 0; k < kPack; ++k) x[i].v[k] -= factor * x[j].v[k];
        }
        PROLORA_UNROLL
        for (int k = 0; k < kPack; ++k) x[i].v[k] *= w.reciprocal[first + i];
        q.write(first + i, pack, x[i]);
      }
    }
  };
  block.each_warp(chunks, [&](const auto& warp, int chunk) {
    const int begin = chunk * kChunk;
    warp.in_order(int(min_index(kChunk, q.packs() - begin)),
                  [&](int n) { substitute_pack(begin + n); });
  });
}

// l = l times this pass's factor; the factor alone in the first pass.
template <class Block>
PROLORA_HOST_DEVICE void multiply_factors(const Block& block, float* l, const PanelWorkspace& w,
                                          int r, bool first) {
  const int stride = PanelWorkspace::stride(r);
  block.each_warp(r, [&](const auto& warp, int i) {
    const float* row = l + i * r;
    warp.each(i + 1, [&](int j) {
      const float* factor = w.lower + j * stride;
      float sum = first ? factor[i] : float(0);
      for (int k = j; !first && k <= i; ++k) sum += row[k] * factor[k];
      w.gram[triangle(i) + j] = double(sum);  // w.gram is free by now
    });
  });
  block.each_warp(r, [&](const auto& warp, int i) {
    warp.each(r, [&](int j) { l[i * r + j] = j <= i ? float(w.gram[triangle(i) + j]) : float(0); });
  });
}

// NaN in q and l, rank -1.
template <class Block>
PROLORA_HOST_DEVICE void give_up_panel(const Block& block, float* q, float* l, Index* rank, int r,
                                       int m) {
  constexpr float kNan = PanelLimits::kNan;
  block.each_warp(r, [&](const auto& warp, int i) {
    warp.each(m, [&](int p) { q[i * m + p] = kNan; });
    warp.each(r, [&](int j) { l[i * r + j] = kNan; });
  });
  block.each(1, [&](int) { *rank = -1; });
}

// scale: below kDependent * scale a row is dropped; 0 if there is none.
template <class Block>
PROLORA_HOST_DEVICE void panel_qr(const Block& block, const float* panel, double scale, float* q,
                                  float* l, Index* rank, const PanelWorkspace& w, int r, int m) {
  const PackedRows rows(q, r, m);
  scale_panel_rows(block, panel, q, w, r, m);
  for (int pass = 0;; ++pass) {
    const bool first = pass == 0;
    sum_products(block, rows, w);
    scale_gram(block, w, r, first ? scale : 0.0);
    bool good = pass < kPanelPasses;
    for (int i = 0; first && i < r; ++i) {
      good = good && w.length[i] / double(w.unit[i]) <= PanelLimits::kMax;  // not NaN
    }
    if (!good) return give_up_panel(block, q, l, rank, r, m);
    factor_gram(block, w, r);
    finish_factor(block, w, r);
    substitute(block, rows, w);
    multiply_factors(block, l, w, r, first);
    bool settled = !first;
    for (int i = 0; i < r; ++i) settled = settled && w.inverse[i] <= 4;
    if (settled) break;
  }
  block.each_warp(r, [&](const auto& warp, int i) {
    warp.each(i + 1, [&](int j) { l[i * r + j] /= w.unit[i]; });
  });
  block.each(1, [&](int) {
    Index count = 0;
    for (int i = 0; i < r; ++i) count += w.inverse[i] > 0;
    *rank = count;
  });
}

}  // namespace prolora
