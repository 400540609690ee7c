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
  char* stack = nullptr;  // its lowest byte
  size_t stack_bytes = 0;
#ifdef LONGPRETRAIN_EMULATION_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* of_thread_sanitizer = nullptr;
  void* of_address_sanitizer = nullptr;
};

// The stacks of an OS thread's fibers, each with a page below that no one may touch.
class Stacks {
 public:
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  void give(Fiber& fiber, int index) const;

 private:
  char* memory_;
  int count_;
};

void become_fiber(Fiber& fiber);                  // the OS thread's own stack
void begin_fiber(Fiber& fiber, void (*entry)());  // on a stack given before; entry never returns
void switch_fiber(Fiber& from, Fiber& to, bool from_ends);
void enter_fiber();  // what a fiber does first

}  // namespace longpretrain::emulation
