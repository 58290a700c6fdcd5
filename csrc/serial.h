// The CPU's side of block.h and tile.h: one core plays a block.
#pragma once

#include <cstring>

#include "block.h"
#include "precise_product.h"
#include "tile.h"

// The iterations of the next loop do not depend on each other. (Clang checks that at run time.)
#if defined(__GNUC__) && !defined(__clang__)
#define PROLORA_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define PROLORA_INDEPENDENT __pragma(loop(ivdep))
#else
#define PROLORA_INDEPENDENT
#endif

namespace prolora {

// Partial sums let the compiler use vectors without -ffast-math.
template <class T>
constexpr int kLanes = 16 / sizeof(T);

#ifdef __GNUC__
// Spelt out for compilers that have vectors: what GCC makes of an array takes half as long again.
template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(16)));
  Vector sums = {};

  PROLORA_HOST_DEVICE void add_product(const T* x, const T* y) {
    Vector left, right;
    std::memcpy(&left, x, sizeof(Vector));
    std::memcpy(&right, y, sizeof(Vector));
    sums += left * right;
  }
  PROLORA_HOST_DEVICE T total() const {
    T sum = 0;
    for (int k = 0; k < kLanes<T>; ++k) sum += sums[k];
    return sum;
  }
};
#else
template <class T>
struct Lanes {
  T sums[kLanes<T>] = {};

  void add_product(const T* x, const T* y) {
    for (int k = 0; k < kLanes<T>; ++k) sums[k] += x[k] * y[k];
  }
  T total() const {
    T sum = 0;
    for (int k = 0; k < kLanes<T>; ++k) sum += sums[k];
    return sum;
  }
};
#endif

struct SerialWarp {
  static constexpr int kWidth = 1;

  template <class I, class F>
  PROLORA_HOST_DEVICE void each(I n, F f) const {
    PROLORA_INDEPENDENT
    for (I i = 0; i < n; ++i) f(i);
  }

  PROLORA_HOST_DEVICE void sync() const {}

  template <class I, class F>
  PROLORA_HOST_DEVICE void in_order(I n, F f) const {
    for (I i = 0; i < n; ++i) f(i);
  }

  template <class T>
  PROLORA_HOST_DEVICE T total(T value) const {
    return value;
  }

  template <class T>
  PROLORA_HOST_DEVICE T partner(T value, int) const {
    return value;
  }

  template <class T, class I, class F>
  PROLORA_HOST_DEVICE T sum(I n, F f) const {
    T partial[kLanes<T>] = {};
    I i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      for (int k = 0; k < kLanes<T>; ++k) partial[k] += f(i + k);
    }
    T total = 0;
    for (; i < n; ++i) total += f(i);
    for (int k = 0; k < kLanes<T>; ++k) total += partial[k];
    return total;
  }

  template <class T, class I, class F>
  PROLORA_HOST_DEVICE T max(I n, F f) const {
    T largest = 0;
    for (I i = 0; i < n; ++i) {
      const T value = f(i);
      largest = value > largest ? value : largest;
    }
    return largest;
  }

  template <class T, class I>
  PROLORA_HOST_DEVICE T dot(I n, const T* x, const T* y) const {
    Lanes<T> lanes;
    I i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) lanes.add_product(x + i, y + i);
    T total = lanes.total();
    for (; i < n; ++i) total += x[i] * y[i];
    return total;
  }
};

struct SerialBlock : SerialWarp {
  template <class I, class F>
  PROLORA_HOST_DEVICE void each_warp(I n, F f) const {
    for (I i = 0; i < n; ++i) f(SerialWarp{}, i);
  }
};

// Serves as the oracle of the kernels, not for speed: on a CPU the products are torch's.
template <class T>
struct SerialTile {
  using Number = T;
  static constexpr int kRows = 64;
  static constexpr int kCols = 64;
  static constexpr int kStageStride = kRows;

  T* memory;  // [kCols, kStageStride], for algorithms that stage a product

  T* stage() const { return memory; }

  template <class F>
  void each_pack(Index rows, Index cols, bool, F f) const {
    for (Index j = 0; j < cols; ++j) {
      for (Index i = 0; i < rows; ++i) {
        f(i, j, Pack<T, 1>::load(memory + j * kStageStride + i));
      }
    }
  }

  template <class A, class B, class Use>
  void product(const A& a, const B& b, Index depth, Use use) const {
    for (Index i = 0; i < a.size; ++i) {
      for (Index j = 0; j < b.size; ++j) {
        const auto* x = a.data + i * a.step();
        const auto* y = b.data + j * b.step();
        use(i, j, SerialWarp{}.sum<T>(depth, [&](Index p) {
          return value_of(x[p * a.depth_step()]) * value_of(y[p * b.depth_step()]);
        }));
      }
    }
  }
};

// That of precise_product.h: sums by weight of one result after the other.
struct SerialDigitTile {
  static constexpr int kRows = 64;
  static constexpr int kCols = 64;

  template <class Use>
  void product(const DigitRows& x, const DigitRows& y, Use use) const {
    for (Index i = 0; i < x.size; ++i) {
      for (Index j = 0; j < y.size; ++j) {
        std::int32_t sums[kDigits + 1] = {};
        for (int s = 0; s < kDigits; ++s) {
          for (int r = 0; r < kDigits - s; ++r) {
            const std::int8_t* a = x.data + r * x.step + i * x.pitch;
            const std::int8_t* b = y.data + s * y.step + j * y.pitch;
            for (Index p = 0; p < x.pitch; ++p) sums[r + s] += a[p] * b[p];
          }
        }
        const std::int8_t* a = x.data + 3 * x.step + i * x.pitch;
        const std::int8_t* b = y.data + 3 * y.step + j * y.pitch;
        for (Index p = 0; p < x.pitch; ++p) sums[kDigits] += a[p] * b[p];
        use(int(i), int(j), weigh_sums([&](int weight) { return sums[weight]; }));
      }
    }
  }
};

}  // namespace prolora
