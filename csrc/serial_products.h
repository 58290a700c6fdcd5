// The CPU's side of tridiagonal.h: products with half of a symmetric matrix, in wide vectors. Code
// that calls these is compiled for several instruction sets, of which the machine chooses one.
#pragma once

#include <cstring>

#include "serial.h"
#include "tridiagonal.h"

// Compiles a function for AVX-512, AVX2 and the compiler's own target; the loader chooses.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define PROLORA_FOR_EACH_TARGET \
  __attribute__((target_clones("default", "arch=haswell", "arch=x86-64-v4")))
#else
#define PROLORA_FOR_EACH_TARGET
#endif

namespace prolora {

// Numbers that are worked on at once: two of AVX2's vectors, in any instruction set.
template <class T, int kBytes = 32>
struct Wide {
  static constexpr int kSize = kBytes / int(sizeof(T));
#ifdef __GNUC__
  typedef T Vector __attribute__((vector_size(kBytes)));
  Vector v;
#else
  T v[kSize];
#endif

  static PROLORA_HOST_DEVICE Wide load(const T* from) {
    Wide wide;
    std::memcpy(&wide.v, from, sizeof(wide.v));
    return wide;
  }
  static PROLORA_HOST_DEVICE Wide all(T number) {
#ifdef __GNUC__
    return {number - Vector{}};
#else
    Wide wide;
    for (int k = 0; k < kSize; ++k) wide.v[k] = number;
    return wide;
#endif
  }
  PROLORA_HOST_DEVICE void store(T* to) const { std::memcpy(to, &v, sizeof(v)); }
  // this += x y
  PROLORA_HOST_DEVICE void add_product(const Wide& x, const Wide& y) {
#ifdef __GNUC__
    v += x.v * y.v;
#else
    for (int k = 0; k < kSize; ++k) v[k] += x.v[k] * y.v[k];
#endif
  }
  PROLORA_HOST_DEVICE T total() const {
    T sum = 0;
    for (int k = 0; k < kSize; ++k) sum += v[k];
    return sum;
  }
};

struct WideWarp : SerialWarp {
  template <class T, class I>
  PROLORA_HOST_DEVICE T dot(I n, const T* x, const T* y) const {
    using V = Wide<T>;
    V sums[2] = {};
    I i = 0;
    for (; i + 2 * V::kSize <= n; i += 2 * V::kSize) {
      sums[0].add_product(V::load(x + i), V::load(y + i));
      sums[1].add_product(V::load(x + i + V::kSize), V::load(y + i + V::kSize));
    }
    T total = sums[0].total() + sums[1].total();
    for (; i < n; ++i) total += x[i] * y[i];
    return total;
  }
};

struct WideBlock : WideWarp {
  template <class I, class F>
  PROLORA_HOST_DEVICE void each_warp(I n, F f) const {
    for (I i = 0; i < n; ++i) f(WideWarp{}, i);
  }
};

// Products of tridiagonalise, which read each number of the upper half once.
struct SerialProducts {
  static constexpr int kRows = 4;        // of an update
  static constexpr int kRowsAtOnce = 8;  // of a product

  // p = A v, of the rows and columns from `first` on.
  template <class Block, class T>
  PROLORA_HOST_DEVICE void multiply(const Block&, const T* a, const T* v, T* p, int first,
                                    int d) const {
    for (int i = 0; i < d; ++i) p[i] = 0;  // before `first` too, which `update` multiplies with
    int i = first;
    for (; i < d && i % kRowsAtOnce != 0; ++i) multiply_rows<1>(a, v, p, i, d);
    for (; i + kRowsAtOnce <= d; i += kRowsAtOnce) multiply_rows<kRowsAtOnce>(a, v, p, i, d);
    for (; i < d; ++i) multiply_rows<1>(a, v, p, i, d);
  }

  // A -= v wᵀ + w vᵀ, summed over `count` pairs of vectors, of the rows and columns from `first`.
  template <class Block, class T>
  PROLORA_HOST_DEVICE void update(const Block&, T* a, const PanelVectors<T>& panel, int count,
                                  int first, int d) const {
    constexpr int kCols = 2 * Wide<T, 64>::kSize;
    for (int c = first - first % kCols; c < d; c += kCols) {
      // Rows up to the last of these columns; what is left of the diagonal there is written too,
      // and read by nobody.
      const int last = c + kCols < d ? c + kCols : d;
      int i = first;
      if (c + kCols <= d) {
        for (; i + kRows <= last; i += kRows) update_tile(a, panel, count, i, c, d);
      }
      for (; i < last; ++i) {
        for (int s = 0; s < count; ++s) {
          const T* v = panel.v_row(s);
          const T* w = panel.w_row(s);
          for (int n = c; n < last; ++n) a[Index(i) * d + n] -= v[i] * w[n] + w[i] * v[n];
        }
      }
    }
  }

 private:
  template <int kCount, class T>
  PROLORA_HOST_DEVICE void multiply_rows(const T* a, const T* v, T* p, int i, int d) const {
    using V = Wide<T>;
    const T* rows[kCount];
    V by[kCount], sums[kCount];
    for (int r = 0; r < kCount; ++r) {
      rows[r] = a + Index(i + r) * d;
      by[r] = V::all(v[i + r]);
      sums[r] = V::all(0);
    }
    // Up to where no load meets two lines of the cache, if rows begin with one.
    const int aligned = i + kCount + (V::kSize - (i + kCount) % V::kSize) % V::kSize;
    int c = aligned;
    for (; c + V::kSize <= d; c += V::kSize) {
      const V x = V::load(v + c);
      V y = V::load(p + c);
      for (int r = 0; r < kCount; ++r) {
        const V entry = V::load(rows[r] + c);
        sums[r].add_product(entry, x);
        y.add_product(entry, by[r]);
      }
      y.store(p + c);
    }
    for (int r = 0; r < kCount; ++r) {
      T sum = sums[r].total() + rows[r][i + r] * v[i + r];
      for (int n = r + 1; n < kCount; ++n) {
        sum += rows[r][i + n] * v[i + n];
        p[i + n] += rows[r][i + n] * v[i + r];
      }
      const auto add = [&](int begin, int end) {
        for (int n = begin; n < end; ++n) {
          sum += rows[r][n] * v[n];
          p[n] += rows[r][n] * v[i + r];
        }
      };
      add(i + kCount, aligned < d ? aligned : d);
      add(c, d);
      p[i + r] += sum;
    }
  }

  template <class T>
  PROLORA_HOST_DEVICE void update_tile(T* a, const PanelVectors<T>& panel, int count, int i, int c,
                                       int d) const {
    using V = Wide<T, 64>;
    V sums[kRows][2];
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = V::all(0);
    for (int s = 0; s < count; ++s) {
      const T* vs = panel.v_row(s);
      const T* ws = panel.w_row(s);
      const V v0 = V::load(vs + c), v1 = V::load(vs + c + V::kSize);
      const V w0 = V::load(ws + c), w1 = V::load(ws + c + V::kSize);
      for (int r = 0; r < kRows; ++r) {
        const V by_w = V::all(vs[i + r]), by_v = V::all(ws[i + r]);
        sums[r][0].add_product(by_w, w0);
        sums[r][1].add_product(by_w, w1);
        sums[r][0].add_product(by_v, v0);
        sums[r][1].add_product(by_v, v1);
      }
    }
    const V minus = V::all(-1);
    for (int r = 0; r < kRows; ++r) {
      T* to = a + Index(i + r) * d + c;
      for (int half = 0; half < 2; ++half) {
        V entry = V::load(to + half * V::kSize);
        entry.add_product(minus, sums[r][half]);
        entry.store(to + half * V::kSize);
      }
    }
  }
};

}  // namespace prolora
