// Numbers as a checkpoint stores them. Those of 16 bits have 11 significant ones (float16) or 8
// (bfloat16), so that float32, and TF32 too, hold them exactly.
#pragma once

#include <cstdint>
#include <cstring>

#include "block.h"

namespace prolora {

struct Half {
  std::uint16_t bits;
};

struct Bfloat {
  std::uint16_t bits;
};

template <class T>
constexpr bool kExactInTf32 = false;
template <>
inline constexpr bool kExactInTf32<Half> = true;
template <>
inline constexpr bool kExactInTf32<Bfloat> = true;

PROLORA_HOST_DEVICE float value_of(float x) { return x; }
PROLORA_HOST_DEVICE double value_of(double x) { return x; }

PROLORA_HOST_DEVICE float value_of(Bfloat x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

PROLORA_HOST_DEVICE float value_of(Half x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  if (rest < 0x400u) return (sign ? -1.0f : 1.0f) * float(rest) * 0x1p-24f;  // zero or subnormal
  // The exponents' biases differ by 112; infinity and NaN have the largest exponent of both.
  const std::uint32_t exponent = rest < 0x7c00u ? 112u << 23 : 0x7f800000u;
  const std::uint32_t bits = sign | (exponent + (rest < 0x7c00u ? rest : rest & 0x3ffu) * 0x2000u);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

}  // namespace prolora
