// The machine's instructions that CUDA C++ has no function for, all of compute capability 8.0 and
// later: products on tensor cores, copies to shared memory that pass the registers by. What uses
// them is empty below 8.0, where no host starts it. The emulator brings its own
// (tests/emulator/ptx_model.h).
#pragma once

#ifndef PROLORA_EMULATED

namespace prolora::ptx {

__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned as_bits(float x) { return __float_as_uint(x); }

// c += a b for a [16, 8], b [8, 8], c [16, 8] held by a warp. Operands are float32 whose last 13
// bits are 0. With g = lane / 4, t = lane % 4:
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b: (t, g), (t + 4, g)
//   c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const unsigned (&a)[4],
                                                  const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b for integers, a [16, 32], b [32, 8], four of 8 bits a register, c [16, 8]. With g and t
// as above, and 4 t standing for 4 t to 4 t + 3:
//   a: (g, 4 t), (g + 8, 4 t), (g, 16 + 4 t), (g + 8, 16 + 4 t)
//   b: (4 t, g), (16 + 4 t, g)
//   c: as above
__device__ __forceinline__ void multiply_add_s8(int (&c)[4], const unsigned (&a)[4],
                                                const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Begins a copy of 16 bytes, the first `bytes` of them from global memory, the rest 0. Both
// addresses are aligned to 16 bytes.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global, int bytes) {
  [[maybe_unused]] const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void copy_4_bytes(void* shared, const void* global, int bytes) {
  [[maybe_unused]] const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// Makes a group of the copies that this thread has begun since the last group.
__device__ __forceinline__ void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all of this thread's groups are there but for the last `kLeft` ones.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace prolora::ptx

#endif
