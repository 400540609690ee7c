// Fibers: stacks that one OS thread switches between, and what sanitizers must be told of that.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(LONGPRETRAIN_EMULATION_UCONTEXT)
#define LONGPRETRAIN_EMULATION_UCONTEXT
#endif
#ifdef LONGPRETRAIN_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace longpretrain::emulation {

struct Fiber {
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  char* stack = nullptr;  // its lowest byte
  size_t stack_bytes = 0;
  void* mapped = nullptr;  // the stack and what is below, if it is the fiber's own
#ifdef LONGPRETRAIN_EMULATION_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* of_thread_sanitizer = nullptr;
  void* of_address_sanitizer = nullptr;
};

void become_fiber(Fiber& fiber);                  // the OS thread's own stack
void begin_fiber(Fiber& fiber, void (*entry)());  // entry never returns
void switch_fiber(Fiber& from, Fiber& to, bool from_ends);
void enter_fiber();  // what a fiber does first

}  // namespace longpretrain::emulation
