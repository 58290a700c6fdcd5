// Small kernels, some of them wrong on purpose, that test the emulator itself.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace {

using Values = std::vector<float>;

// Writes its own place of shared memory, then reads that of the mirrored thread.
void reverse_kernel(float* out, bool barrier) {
  PROLORA_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

Values reverse(int threads, bool barrier) {
  Values out(threads);
  PROLORA_LAUNCH(reverse_kernel, 1, threads, sizeof(float) * threads, nullptr, out.data(), barrier);
  return out;
}

// Sums threadIdx.x over the lanes in `mask`, which must be a block of 2, 4, ... lanes.
void masked_sum_kernel(float* out, unsigned mask, int width) {
  if (!(mask >> threadIdx.x & 1)) return;
  float sum = threadIdx.x;
  for (int d = width / 2; d > 0; d /= 2) sum += __shfl_xor_sync(mask, sum, d);
  out[threadIdx.x] = sum;
}

Values masked_sum(unsigned mask, int width) {
  Values out(32, -1);
  PROLORA_LAUNCH(masked_sum_kernel, 1, 32, 0, nullptr, out.data(), mask, width);
  return out;
}

void ballot_kernel(unsigned* out, unsigned mask) {
  if (!(mask >> threadIdx.x & 1)) return;
  out[threadIdx.x] = __ballot_sync(mask, threadIdx.x % 2);
}

std::vector<unsigned> ballot(int threads, unsigned mask) {
  std::vector<unsigned> out(threads);
  PROLORA_LAUNCH(ballot_kernel, 1, threads, 0, nullptr, out.data(), mask);
  return out;
}

// Every thread of a 3-D grid of 3-D blocks writes its own number.
void number_kernel(float* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = i;
}

Values numbers() {
  Values out(2 * 3 * 4 * 5 * 6 * 7);
  PROLORA_LAUNCH(number_kernel, dim3(2, 3, 4), dim3(5, 6, 7), 0, nullptr, out.data());
  return out;
}

void divergent_kernel() {
  if (threadIdx.x < 16) {
    __shfl_xor_sync(~0u, 1, 1);
  } else {
    __syncthreads();
  }
}

void divergent() { PROLORA_LAUNCH(divergent_kernel, 1, 32, 0, nullptr); }

void stray_read_kernel() { __shfl_xor_sync(~0u, 1, 16); }

void stray_read() { PROLORA_LAUNCH(stray_read_kernel, 1, 16, 0, nullptr); }

// What a block finds in shared memory before it writes there; all blocks write afterwards.
void stale_shared_kernel(float* out) {
  PROLORA_DYNAMIC_SHARED(float, shared);
  out[blockIdx.x] = shared[0];
  shared[0] = 1;
}

Values stale_shared(int blocks) {
  Values out(blocks);
  PROLORA_LAUNCH(stale_shared_kernel, blocks, 1, sizeof(float), nullptr, out.data());
  return out;
}

void count_kernel(float* out) {
  out[threadIdx.x] = __syncthreads_count(threadIdx.x % 2);
  // A second one right behind: the first one's votes must be gone.
  if (__syncthreads_or(0)) out[threadIdx.x] = -1;
}

Values count(int threads) {
  Values out(threads);
  PROLORA_LAUNCH(count_kernel, 1, threads, 0, nullptr, out.data());
  return out;
}

void outsider_kernel() { __shfl_xor_sync(1u, 1, 0); }

void outsider() { PROLORA_LAUNCH(outsider_kernel, 1, 32, 0, nullptr); }

void early_exit_kernel(float* out) {
  if (threadIdx.x < 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

Values early_exit(int threads) {
  Values out(threads);
  PROLORA_LAUNCH(early_exit_kernel, 1, threads, 0, nullptr, out.data());
  return out;
}

void empty_kernel() {}

void launch(int grid, int threads, int shared_bytes) {
  PROLORA_LAUNCH(empty_kernel, grid, threads, shared_bytes, nullptr);
}

// Not seen as wrong: between two barriers a thread runs without interruption.
void lost_update_kernel(float* out) { *out += 1; }

float lost_update() {
  float count = 0;
  PROLORA_LAUNCH(lost_update_kernel, 1, 64, 0, nullptr, &count);
  return count;
}

// a [16, 8] b [8, 8] + c, row-major. `swap` exchanges two registers of A, as if a1 and a2 were laid
// out like those of a half-precision product; `round` prepares the operands.
void product_kernel(const float* a, const float* b, float c, float* out, bool swap, bool round) {
  const int g = threadIdx.x / 4;
  const int t = threadIdx.x % 4;
  auto operand = [&](float x) {
    const unsigned bits = prolora::ptx::as_bits(x);
    return round ? (bits + 0x1000u) & ~0x1fffu : bits;
  };
  unsigned left[4] = {operand(a[g * 8 + t]), operand(a[(g + 8) * 8 + t]), operand(a[g * 8 + t + 4]),
                      operand(a[(g + 8) * 8 + t + 4])};
  const unsigned right[2] = {operand(b[t * 8 + g]), operand(b[(t + 4) * 8 + g])};
  if (swap) std::swap(left[1], left[2]);
  float sums[4] = {c, c, c, c};
  prolora::ptx::multiply_add_tf32(sums, left, right);
  out[g * 8 + 2 * t] = sums[0];
  out[g * 8 + 2 * t + 1] = sums[1];
  out[(g + 8) * 8 + 2 * t] = sums[2];
  out[(g + 8) * 8 + 2 * t + 1] = sums[3];
}

Values product(const Values& a, const Values& b, float c, int lanes, bool swap, bool round) {
  Values out(16 * 8);
  PROLORA_LAUNCH(product_kernel, 1, lanes, 0, nullptr, a.data(), b.data(), c, out.data(), swap,
                 round);
  return out;
}

// Two copies by one thread, each in a group of its own; the second one of three numbers. Then
// waits for both, one or none of the groups, and reads the eight numbers.
void copy_kernel(const float* from, float* out, int wait_for) {
  PROLORA_DYNAMIC_SHARED(float, shared);
  for (int i = 0; i < 2; ++i) {
    prolora::ptx::copy_16_bytes(shared + 4 * i, from + 4 * i, 16 - 4 * i);
    prolora::ptx::end_copy_group();
  }
  if (wait_for == 2) prolora::ptx::wait_for_copies<0>();
  if (wait_for == 1) prolora::ptx::wait_for_copies<1>();
  for (int i = 0; i < 8; ++i) out[i] = shared[i];
}

Values copy(int wait_for, int misaligned) {
  alignas(16) const float from[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  Values out(8);
  PROLORA_LAUNCH(copy_kernel, 1, 1, 32, nullptr, from + misaligned, out.data(), wait_for);
  return out;
}

}  // namespace

PYBIND11_MODULE(_emulator_test, m) {
  m.def("reverse", &reverse);
  m.def("masked_sum", &masked_sum);
  m.def("ballot", &ballot);
  m.def("numbers", &numbers);
  m.def("divergent", &divergent);
  m.def("stray_read", &stray_read);
  m.def("stale_shared", &stale_shared);
  m.def("count", &count);
  m.def("outsider", &outsider);
  m.def("early_exit", &early_exit);
  m.def("launch", &launch);
  m.def("lost_update", &lost_update);
  m.def("product", &product);
  m.def("copy", &copy);
}
