// The CPU's side of block.h and tile.h: one core plays a block, with the vector instructions of the
// instruction set this file is compiled for. Included by cpu.cpp alone, once per instruction set;
// the unnamed namespace keeps the builds apart.
#pragma once

#include <cstring>

#include "block.h"
#include "tile.h"

namespace prolora {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMicroRows = 8;  // x 2 vectors of sums: 16 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMicroRows = 4;  // x 2: 8 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kMicroRows = 4;
#endif

// kWidth values of T in one register; loads and stores need no alignment.
template <class T>
struct Vector {
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  typedef T Lanes __attribute__((vector_size(kVectorBytes)));
  Lanes lanes;

  HOST_DEVICE void load(const T* from) { std::memcpy(&lanes, from, sizeof(lanes)); }
  HOST_DEVICE void store(T* to) const { std::memcpy(to, &lanes, sizeof(lanes)); }
  HOST_DEVICE T total() const { return total_of<kVectorBytes>(&lanes); }

 private:
  // By halves: a chain of kWidth dependent additions would take longer than the loop before it.
  template <int kBytes>
  static HOST_DEVICE T total_of(const void* values) {
    if constexpr (kBytes == sizeof(T)) {
      T only;
      std::memcpy(&only, values, sizeof(T));
      return only;
    } else {
      typedef T Half __attribute__((vector_size(kBytes / 2)));
      Half halves[2];
      std::memcpy(halves, values, kBytes);
      const Half sum = halves[0] + halves[1];
      return total_of<kBytes / 2>(&sum);
    }
  }
};

struct SerialWarp {
  template <class F>
  HOST_DEVICE void each(Index n, F f) const {
#pragma GCC ivdep
    for (Index i = 0; i < n; ++i) f(i);
  }

  // Partial sums let the compiler use vectors without -ffast-math; four of them at a time, or each
  // addition would wait for the one before.
  template <class T, class F>
  HOST_DEVICE T sum(Index n, F f) const {
    constexpr int kWidth = 4 * Vector<T>::kWidth;
    T partial[kWidth] = {};
    Index i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      for (int k = 0; k < kWidth; ++k) partial[k] += f(i + k);
    }
    T total = 0;
    for (; i < n; ++i) total += f(i);
    for (int k = 0; k < kWidth; ++k) total += partial[k];
    return total;
  }

  template <class T, class F>
  HOST_DEVICE T max(Index n, F f) const {
    T largest = 0;
    for (Index i = 0; i < n; ++i) {
      const T value = f(i);
      largest = value > largest ? value : largest;
    }
    return largest;
  }

  template <class T>
  HOST_DEVICE Gram<T> gram(Index n, const T* x, const T* y) const {
    Vector<T> xx = {}, xy = {}, yy = {}, left, right;
    Index i = 0;
    for (; i + Vector<T>::kWidth <= n; i += Vector<T>::kWidth) {
      left.load(x + i);
      right.load(y + i);
      xx.lanes += left.lanes * left.lanes;
      xy.lanes += left.lanes * right.lanes;
      yy.lanes += right.lanes * right.lanes;
    }
    Gram<T> g = {xx.total(), xy.total(), yy.total()};
    for (; i < n; ++i) {
      g.xx += x[i] * x[i];
      g.xy += x[i] * y[i];
      g.yy += y[i] * y[i];
    }
    return g;
  }
};

struct SerialBlock : SerialWarp {
  static constexpr int kTogether = 16;

  template <class F>
  HOST_DEVICE void each_warp(Index n, F f) const {
    for (Index i = 0; i < n; ++i) f(SerialWarp{}, i);
  }
};

// A tile of 64 rows by two vectors. A slice of b, 128 deep, is copied to where it stays in the L1
// cache (and padded with zeros to whole vectors); a is read where it lies, one element at a time,
// since the processor broadcasts from memory for free. A micro-kernel keeps kMicroRows x 2 vectors
// of sums in registers.
template <class T>
struct SerialTile {
  static constexpr int kRows = 64;
  static constexpr int kWidth = Vector<T>::kWidth;
  static constexpr int kCols = 2 * kWidth;
  static constexpr int kDepth = 128;

  template <class A, class B, class Use>
  HOST_DEVICE void product(const A& a, const B& b, Index depth, Use use) const {
    // A LoRA of low rank fills one vector only: do not pay for the other.
    if (b.size > kWidth) {
      product_of<2>(a, b, depth, use);
    } else {
      product_of<1>(a, b, depth, use);
    }
  }

  HOST_DEVICE double total(double x) const { return x; }

 private:
  template <int kVectors, class A, class B, class Use>
  HOST_DEVICE void product_of(const A& a, const B& b, Index depth, Use use) const {
    constexpr int kStride = kVectors * kWidth;
    T slice[kDepth * kStride];
    T sums[kRows * kStride];
    for (Index p0 = 0; p0 < depth || p0 == 0; p0 += kDepth) {
      const Index deep = smaller(kDepth, depth - p0);
      const T* from = b.data + p0 * b.depth_step();
      for (Index p = 0; p < deep; ++p, from += b.depth_step()) {
        T* to = slice + p * kStride;
        if (B::kAlongDepth) {
          for (Index j = 0; j < kStride; ++j) to[j] = j < b.size ? from[j * b.step()] : T(0);
        } else if (b.size == kStride) {
          std::memcpy(to, from, sizeof(T) * kStride);
        } else {
          std::memset(to, 0, sizeof(T) * kStride);
          Index j = 0;
          for (; j + 4 <= b.size; j += 4) std::memcpy(to + j, from + j, 4 * sizeof(T));
          for (; j < b.size; ++j) to[j] = from[j];
        }
      }
      Index i = 0;
      auto micro = [&](auto rows) {
        constexpr int kMicro = decltype(rows)::value;
        for (; i + kMicro <= a.size; i += kMicro) {
          multiply<kMicro, kVectors>(a.data + p0 * a.depth_step() + i * a.step(), a.depth_step(),
                                     a.step(), slice, deep, sums + i * kStride, p0 == 0);
        }
      };
      micro(Constant<kMicroRows>{});
      micro(Constant<kMicroRows / 2>{});
      micro(Constant<1>{});
    }
    for (Index i = 0; i < a.size; ++i) {
#pragma GCC ivdep
      for (Index j = 0; j < b.size; ++j) use(i, j, sums[i * kStride + j]);
    }
  }

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // sums [kMicro][kVectors vectors] (+)= Σ_p a(p, i) b(p, j)
  template <int kMicro, int kVectors>
  static HOST_DEVICE void multiply(const T* a, Index depth_step, Index step, const T* b,
                                   Index depth, T* sums, bool first) {
    constexpr int kStride = kVectors * kWidth;
    Vector<T> sum[kMicro][kVectors] = {};
    if (!first) {
      for (int i = 0; i < kMicro; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v].load(sums + i * kStride + v * kWidth);
      }
    }
    for (Index p = 0; p < depth; ++p, a += depth_step, b += kStride) {
      Vector<T> row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v].load(b + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kMicro; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v].lanes += a[i * step] * row[v].lanes;
      }
    }
    for (int i = 0; i < kMicro; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[i][v].store(sums + i * kStride + v * kWidth);
    }
  }
};

}  // namespace
}  // namespace prolora
