// The emulator's side of csrc/ptx.h: tensor cores and asynchronous copies.
//
// mma is one more warp collective. Its operands must be TF32 numbers, so that a forgotten rounding
// is seen; the sum of the eight products and c is exact, then cut to float towards
// zero, as tensor cores lose bits in one direction. (How many they keep while they add is not
// documented.)
//
// A copy takes place at the wait that covers it. Until then its target holds NaN: a missing wait,
// and a copy into a buffer that others still read, are seen.
#pragma once

#include "emulator.h"

namespace prolora::ptx {

namespace emulator = prolora::emulator;

inline float as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline unsigned as_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float cut_to_float(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// What a lane brings to a product.
struct Fragments {
  const unsigned* a;  // [4]
  const unsigned* b;  // [2]
};

inline void multiply_add_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  for (const unsigned bits : {a[0], a[1], a[2], a[3], b[0], b[1]}) {
    if (bits & 0x1fffu) throw std::runtime_error("mma: an operand that was not rounded to TF32");
  }
  const Fragments mine{a, b};
  const int lane = emulator::running.current->lane;
  emulator::collective(~0u, &mine, [&](auto fragments_of) {
    // Rows g and g + 8 of A, columns 2 t and 2 t + 1 of B: those of the lane's numbers of C.
    double rows[2][8], columns[2][8];
    for (int k = 0; k < 8; ++k) {
      const Fragments* row = fragments_of(lane / 4 * 4 + k % 4);
      rows[0][k] = as_float(row->a[k / 4 * 2]);
      rows[1][k] = as_float(row->a[k / 4 * 2 + 1]);
      for (int j = 0; j < 2; ++j) {
        columns[j][k] = as_float(fragments_of((lane % 4 * 2 + j) * 4 + k % 4)->b[k / 4]);
      }
    }
    for (int n = 0; n < 4; ++n) {
      double sum = c[n];
      for (int k = 0; k < 8; ++k) sum += rows[n / 2][k] * columns[n % 2][k];
      c[n] = cut_to_float(sum);
    }
    return 0;
  });
}

inline void multiply_add_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const Fragments mine{a, b};
  const int lane = emulator::running.current->lane;
  emulator::collective(~0u, &mine, [&](auto fragments_of) {
    const auto dot = [](unsigned x, unsigned y) {
      int sum = 0;
      for (int n = 0; n < 32; n += 8) sum += std::int8_t(x >> n) * std::int8_t(y >> n);
      return sum;
    };
    std::int64_t sums[4] = {c[0], c[1], c[2], c[3]};
    for (int t = 0; t < 4; ++t) {
      const Fragments* row = fragments_of(lane / 4 * 4 + t);
      for (int j = 0; j < 2; ++j) {
        const Fragments* column = fragments_of((lane % 4 * 2 + j) * 4 + t);
        for (int n = 0; n < 4; ++n) sums[n % 2 * 2 + j] += dot(row->a[n], column->b[n / 2]);
      }
    }
    for (int n = 0; n < 4; ++n) {
      c[n] = int(sums[n]);
      if (c[n] != sums[n]) throw std::runtime_error("mma: a sum that an int32 does not hold");
    }
    return 0;
  });
}

inline void begin_copy(void* shared, const void* global, int size, int bytes) {
  const auto* first = reinterpret_cast<const char*>(emulator::running.dynamic_shared.data());
  const auto* end = first + emulator::running.dynamic_shared.size() * sizeof(double);
  const auto* to = static_cast<const char*>(shared);
  if (to < first || to + size > end) {
    throw std::runtime_error("cp.async: the target is not in shared memory");
  }
  const auto misaligned = [&](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % size; };
  if (misaligned(shared) || misaligned(global)) {
    throw std::runtime_error("cp.async: misaligned address");
  }
  if (bytes < 0 || bytes > size) throw std::runtime_error("cp.async: more bytes than it copies");
  std::memset(shared, 0xff, size);
  emulator::running.current->copies.push_back({shared, global, size, bytes, false});
}

inline void copy_16_bytes(void* shared, const void* global, int bytes) {
  begin_copy(shared, global, 16, bytes);
}

inline void copy_4_bytes(void* shared, const void* global, int bytes) {
  begin_copy(shared, global, 4, bytes);
}

inline void end_copy_group() {
  auto& copies = emulator::running.current->copies;
  copies.push_back({nullptr, nullptr, 0, 0, true});
}

template <int kLeft>
void wait_for_copies() {
  auto& copies = emulator::running.current->copies;
  using Copy = emulator::AsyncCopy;
  auto ends_group = [](const Copy& copy) { return copy.ends_group; };
  std::int64_t groups = std::count_if(copies.begin(), copies.end(), ends_group) - kLeft;
  auto copy = copies.begin();
  for (; groups > 0; ++copy) {
    if (copy->bytes > 0) std::memcpy(copy->to, copy->from, copy->bytes);
    if (copy->size > copy->bytes) {
      std::memset(static_cast<char*>(copy->to) + copy->bytes, 0, copy->size - copy->bytes);
    }
    groups -= copy->ends_group;
  }
  copies.erase(copies.begin(), copy);
}

}  // namespace prolora::ptx
