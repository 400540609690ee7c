#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizers.h"

namespace longpretrain::emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 64 * kPage;
// With a page below that no one may touch. Not a power of two, so that equal frames of neighbouring
// fibers do not meet in a cache.
constexpr size_t kMappedBytes = kStackBytes + kPage;

void map_stack(Fiber& fiber) {
  void* mapped = mmap(nullptr, kMappedBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapped, kPage, PROT_NONE);
  fiber.mapped = mapped;
  fiber.stack = static_cast<char*>(mapped) + kPage;
  fiber.stack_bytes = kStackBytes;
  (void)VALGRIND_STACK_REGISTER(fiber.stack, fiber.stack + kStackBytes);
}

}  // namespace

Fiber::~Fiber() {
  if (mapped != nullptr) munmap(mapped, kMappedBytes);
}

void become_fiber(Fiber& fiber) {
  if (has_thread_sanitizer()) fiber.of_thread_sanitizer = __tsan_get_current_fiber();
  if (has_address_sanitizer()) {
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
    fiber.stack = static_cast<char*>(stack);
  }
}

void begin_fiber(Fiber& fiber, void (*entry)()) {
  if (fiber.mapped == nullptr) map_stack(fiber);
  if (has_thread_sanitizer() && fiber.of_thread_sanitizer == nullptr) {
    fiber.of_thread_sanitizer = __tsan_create_fiber(0);  // dear: kept for the next block
  }
  VALGRIND_MAKE_MEM_UNDEFINED(fiber.stack, fiber.stack_bytes);
  fiber.of_address_sanitizer = nullptr;
#ifdef LONGPRETRAIN_EMULATION_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // As if `entry` had been called and its caller's registers were about to be popped.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - 64);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

#ifndef LONGPRETRAIN_EMULATION_UCONTEXT
// Saves the registers that a called function must keep, and goes on where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void longpretrain_switch_stacks(void** from,
                                                                                 void* to);
asm(R"(
.text
.hidden longpretrain_switch_stacks
.globl longpretrain_switch_stacks
.type longpretrain_switch_stacks, @function
longpretrain_switch_stacks:
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
.size longpretrain_switch_stacks, .-longpretrain_switch_stacks
)");
#endif

void switch_fiber(Fiber& from, Fiber& to, bool from_ends) {
  if (has_address_sanitizer()) {
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.of_address_sanitizer, to.stack,
                                   to.stack_bytes);
  }
  constexpr unsigned kUnordered = 1;
  if (has_thread_sanitizer()) __tsan_switch_to_fiber(to.of_thread_sanitizer, kUnordered);
#ifdef LONGPRETRAIN_EMULATION_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  longpretrain_switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
  if (has_address_sanitizer()) {
    __sanitizer_finish_switch_fiber(from.of_address_sanitizer, nullptr, nullptr);
  }
}

void enter_fiber() {
  if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

}  // namespace longpretrain::emulation
