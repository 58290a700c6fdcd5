// Switching between stacks, which is all that a fiber is.
//
// A few instructions of our own on x86-64 and AArch64; elsewhere POSIX's ucontext, which makes a
// system call at every switch. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace prolora::emulator {

// Where a suspended computation goes on. Its stack matters to AddressSanitizer only.
struct Position {
  void* at = nullptr;
  const void* stack = nullptr;
  std::size_t bytes = 0;
};

// A computation that will begin with `entry`, which never returns, on the given stack.
Position prepare_fiber(char* stack, std::size_t bytes, void (*entry)());

// Leaves the running computation in `leave` and goes on with `enter`, until somebody comes back.
void switch_to(Position* leave, const Position& enter);

// The first thing that `entry` does; `came_from` is what switched to it.
void begin_fiber(Position* came_from);

}  // namespace prolora::emulator
