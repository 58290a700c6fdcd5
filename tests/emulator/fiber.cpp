#include "fiber.h"

#include <cstdint>
#include <cstring>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(_WIN32) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASSEMBLY 1
#else
#include <ucontext.h>

#include <new>
#endif

namespace prolora::emulator {
namespace {

#ifdef EMULATOR_ASSEMBLY

// Pushes what a function must preserve, stores the stack pointer in *leave, takes that of `enter`,
// and pops what was preserved there.
extern "C" void prolora_switch_stack(void** leave, void* enter) __asm__("prolora_switch_stack");

// Visible to other objects, since link-time optimisation may put C++ and assembly into two.
#ifdef __APPLE__
#define EMULATOR_FUNCTION \
  ".text\n.globl prolora_switch_stack\n.private_extern prolora_switch_stack\n"
#else
#define EMULATOR_FUNCTION ".text\n.globl prolora_switch_stack\n.hidden prolora_switch_stack\n"
#endif

#ifdef __x86_64__
__asm__(EMULATOR_FUNCTION R"(
prolora_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr std::size_t kPreserved = 6;  // words below the address to return to
constexpr std::size_t kFrame = 8;      // words; one above that address keeps calls aligned
#else
__asm__(EMULATOR_FUNCTION R"(
.balign 4
prolora_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr std::size_t kPreserved = 11;  // words below x30, the address to return to
constexpr std::size_t kFrame = 20;
#endif

void* first_frame(char* stack, std::size_t bytes, void (*entry)()) {
  const auto end = reinterpret_cast<std::uintptr_t>(stack + bytes) / 16 * 16;
  auto* frame = reinterpret_cast<void**>(end) - kFrame;
  std::memset(frame, 0, kFrame * sizeof(void*));
  frame[kPreserved] = reinterpret_cast<void*>(entry);
  return frame;
}

void switch_stack(void** leave, void* enter) { prolora_switch_stack(leave, enter); }

#else

void* first_frame(char* stack, std::size_t bytes, void (*entry)()) {
  const auto end = reinterpret_cast<std::uintptr_t>(stack + bytes) - sizeof(ucontext_t);
  auto* context = new (reinterpret_cast<void*>(end / 16 * 16)) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = static_cast<std::size_t>(reinterpret_cast<char*>(context) - stack);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void switch_stack(void** leave, void* enter) {
  ucontext_t here;
  *leave = &here;
  swapcontext(&here, static_cast<ucontext_t*>(enter));
}

#endif

}  // namespace

Position prepare_fiber(char* stack, std::size_t bytes, void (*entry)()) {
  return {first_frame(stack, bytes, entry), stack, bytes};
}

void switch_to(Position* leave, const Position& enter) {
#ifdef EMULATOR_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, enter.stack, enter.bytes);
  switch_stack(&leave->at, enter.at);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  switch_stack(&leave->at, enter.at);
#endif
}

void begin_fiber([[maybe_unused]] Position* came_from) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &came_from->stack, &came_from->bytes);
#endif
}

}  // namespace prolora::emulator
