// Runs CUDA kernels on the host: a fiber per CUDA thread, the blocks spread over OpenMP threads.
//
// A fiber runs until it reaches a barrier or a warp collective. Two things make a missing barrier
// visible: the order in which warps and lanes resume is shuffled (EMU_SEED=1, 2, ...; 0 keeps it),
// and shared memory starts every block as NaN. Tensor cores and asynchronous copies: ptx_model.h.
//
// Not modelled: races that need two threads to interleave between barriers, memory ordering
// between blocks, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

struct dim3 {
  unsigned x;
  unsigned y;
  unsigned z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace prolora::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kDefaultSharedBytes = 48 << 10;  // without cudaFuncSetAttribute
constexpr std::size_t kStackBytes = 64 << 10;

enum class Wait { Nothing, Warp, Block };

inline long from_environment(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}

// Shared memory that a block may opt in to: an H100's, or EMU_SHARED_BYTES to play a smaller GPU.
inline std::size_t max_shared_bytes() { return from_environment("EMU_SHARED_BYTES", 227 << 10); }

// An H100's, or EMU_CAPABILITY (75, 80, ...) to play another GPU.
inline int compute_capability() { return int(from_environment("EMU_CAPABILITY", 90)); }

// A copy to shared memory that a thread has begun, or the end of a group of them.
struct AsyncCopy {
  void* to;
  const void* from;
  int size;   // to write
  int bytes;  // to read; the rest is 0
  bool ends_group;
};

struct Fiber {
  Position position;  // where it goes on
  uint3 thread;
  int lane = 0;
  int warp = 0;
  bool done = false;
  Wait wait = Wait::Nothing;
  unsigned mask = 0;       // the lanes of the warp collective it waits for
  std::uint64_t slot = 0;  // the value it brings to that collective
  std::vector<AsyncCopy> copies;
};

struct Block {
  dim3 grid_size;
  dim3 size;
  uint3 index;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<double> dynamic_shared;  // of doubles for the alignment
  Fiber* current = nullptr;
  Position scheduler;
  std::exception_ptr error;
  int votes = 0;    // of the threads on their way to the next barrier
  int counted = 0;  // of the barrier just passed
};

// The block that this OpenMP thread runs.
inline thread_local Block running;

inline uint3 unflatten(std::int64_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

// Called on a fiber: back to the scheduler until it lifts the wait.
inline void suspend(Wait wait, unsigned mask) {
  running.current->wait = wait;
  running.current->mask = mask;
  switch_to(&running.current->position, running.scheduler);
}

// The whole life of a fiber.
inline void fiber_main() {
  begin_fiber(&running.scheduler);
  try {
    running.kernel();
  } catch (...) {
    running.error = std::current_exception();
  }
  running.current->done = true;
  switch_to(&running.current->position, running.scheduler);
}

// Called by the scheduler: runs a fiber until it suspends itself or is done.
inline void resume(Fiber& fiber) {
  running.current = &fiber;
  switch_to(&running.scheduler, fiber.position);
  if (running.error) std::rethrow_exception(running.error);
}

// A warp collective is complete when every live lane in its mask has arrived with that mask.
inline bool complete(const Fiber* warp, int lanes, unsigned mask) {
  for (int lane = 0; lane < lanes; ++lane) {
    const Fiber& fiber = warp[lane];
    const bool expected = (mask >> lane & 1) && !fiber.done;
    if (expected && (fiber.wait != Wait::Warp || fiber.mask != mask)) return false;
  }
  return true;
}

// Lets the lanes of complete collectives go on; false if there were none.
inline bool release_collectives(Fiber* warp, int lanes) {
  bool released = false;
  for (int lane = 0; lane < lanes; ++lane) {
    if (warp[lane].done || warp[lane].wait != Wait::Warp) continue;
    const unsigned mask = warp[lane].mask;
    if (!complete(warp, lanes, mask)) continue;
    for (int other = 0; other < lanes; ++other) {
      if (mask >> other & 1) warp[other].wait = Wait::Nothing;
    }
    released = true;
  }
  return released;
}

// Runs a warp until each live lane waits for the block, or for lanes that do not come.
// False if no lane could move.
inline bool run_warp(int warp, const std::vector<int>& lane_order) {
  Fiber* fibers = running.fibers.data() + warp * kWarpSize;
  const int lanes = std::min<int>(kWarpSize, running.fibers.size() - warp * kWarpSize);
  bool moved = false;
  while (true) {
    bool ran = false;
    for (int lane : lane_order) {
      if (lane >= lanes) continue;
      if (fibers[lane].done || fibers[lane].wait != Wait::Nothing) continue;
      resume(fibers[lane]);
      ran = true;
    }
    const bool released = release_collectives(fibers, lanes);
    if (!ran && !released) return moved;
    moved = true;
  }
}

inline void create_fibers() {
  const int threads = running.size.x * running.size.y * running.size.z;
  running.fibers.assign(threads, Fiber{});
  // A new vector rather than a longer one: nothing of the old stacks is worth copying.
  if (running.stacks.size() < threads * kStackBytes) {
    running.stacks = std::vector<char>(threads * kStackBytes);
  }
#ifdef EMULATOR_ASAN
  // Fibers never return, so AddressSanitizer still guards the frames of those that ran here before.
  __asan_unpoison_memory_region(running.stacks.data(), running.stacks.size());
#endif
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = running.fibers[i];
    fiber.position =
        prepare_fiber(running.stacks.data() + i * kStackBytes, kStackBytes, fiber_main);
    fiber.thread = unflatten(i, running.size);
    fiber.lane = i % kWarpSize;
    fiber.warp = i / kWarpSize;
  }
}

inline void run_block(unsigned seed) {
  create_fibers();
  std::vector<Fiber>& fibers = running.fibers;
  std::vector<int> lane_order(kWarpSize);
  std::vector<int> warp_order((fibers.size() + kWarpSize - 1) / kWarpSize);
  std::iota(lane_order.begin(), lane_order.end(), 0);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::minstd_rand random(seed + running.index.x);

  auto is_done = [](const Fiber& f) { return f.done; };
  auto is_at_barrier = [](const Fiber& f) { return f.done || f.wait == Wait::Block; };
  while (!std::all_of(fibers.begin(), fibers.end(), is_done)) {
    if (seed != 0) {
      std::shuffle(warp_order.begin(), warp_order.end(), random);
      std::shuffle(lane_order.begin(), lane_order.end(), random);
    }
    bool moved = false;
    for (int warp : warp_order) moved |= run_warp(warp, lane_order);
    if (std::all_of(fibers.begin(), fibers.end(), is_at_barrier)) {
      for (Fiber& fiber : fibers) fiber.wait = Wait::Nothing;
      running.counted = running.votes;
      running.votes = 0;
    } else if (!moved) {
      throw std::runtime_error("deadlock: divergent barrier or incomplete warp mask");
    }
  }
}

// Shared memory that each kernel opted in to, by its address.
inline std::map<const void*, std::size_t>& allowed_shared_bytes() {
  static std::map<const void*, std::size_t> allowed;
  return allowed;
}

inline void allow_shared_bytes(const void* kernel, std::size_t bytes) {
  allowed_shared_bytes()[kernel] = bytes;
}

// Throws for what a GPU refuses.
inline void check_launch(std::int64_t blocks, std::int64_t threads, std::size_t shared_bytes,
                         const void* kernel) {
  if (threads == 0 || blocks == 0) {
    throw std::runtime_error("launch: an empty grid or block is an error on a GPU");
  }
  if (threads > kMaxThreads || shared_bytes > max_shared_bytes()) {
    throw std::runtime_error("launch: more threads or shared memory than the GPU has");
  }
  if (shared_bytes > std::max(kDefaultSharedBytes, allowed_shared_bytes()[kernel])) {
    throw std::runtime_error(
        "launch: more than 48 KB of shared memory without cudaFuncSetAttribute");
  }
}

template <class Kernel>
void launch(dim3 grid_size, dim3 block_size, std::size_t shared_bytes, const void* address,
            Kernel kernel) {
  const std::int64_t threads = std::int64_t(block_size.x) * block_size.y * block_size.z;
  const std::int64_t blocks = std::int64_t(grid_size.x) * grid_size.y * grid_size.z;
  check_launch(blocks, threads, shared_bytes, address);
  const unsigned seed = from_environment("EMU_SEED", 0);
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t i = 0; i < blocks; ++i) {
    try {
      running.grid_size = grid_size;
      running.size = block_size;
      running.index = unflatten(i, grid_size);
      running.kernel = kernel;
      running.dynamic_shared.resize((shared_bytes + 7) / 8);
      running.dynamic_shared.shrink_to_fit();  // AddressSanitizer then sees the exact end
      // All ones: NaN as float and as double, -1 as an integer.
      std::fill_n(reinterpret_cast<unsigned char*>(running.dynamic_shared.data()),
                  running.dynamic_shared.size() * 8, 0xff);
      running.error = nullptr;
      running.votes = 0;
      run_block(seed);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Waits for the block; the number of threads that came with a vote.
inline int wait_and_count(bool vote) {
  running.votes += vote;
  suspend(Wait::Block, 0);
  return running.counted;
}

// Waits for the live lanes in `mask`.
inline void wait_for_warp(unsigned mask) {
  if (!(mask >> running.current->lane & 1)) {
    throw std::runtime_error("warp collective: the calling lane is not in the mask");
  }
  suspend(Wait::Warp, mask);
}

// Whether `lane` of the current warp takes part in a collective of `mask`.
inline bool takes_part(unsigned mask, int lane) {
  const std::size_t thread = running.current->warp * kWarpSize + lane;
  return (mask >> lane & 1) && thread < running.fibers.size() && !running.fibers[thread].done;
}

// Shares one value per lane, then gives what `read(values of the warp)` returns.
template <class T, class Read>
auto collective(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(Fiber::slot), "a lane shares at most 8 bytes");
  std::memcpy(&running.current->slot, &value, sizeof(T));
  wait_for_warp(mask);  // every value is there
  const Fiber* warp = running.fibers.data() + running.current->warp * kWarpSize;
  auto result = read([&](int lane) {
    if (!takes_part(mask, lane)) {
      throw std::runtime_error("warp collective: reads a lane that takes no part");
    }
    T other;
    std::memcpy(&other, &warp[lane].slot, sizeof(T));
    return other;
  });
  wait_for_warp(mask);  // every value has been read
  return result;
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  return collective(mask, value, [&](auto value_of) { return value_of(source); });
}

}  // namespace prolora::emulator
