// What the address and thread sanitizers and valgrind are told. Whether one watches is seen at run
// time, by its functions being there: one build of the runtime serves all.
#pragma once

#include <cstddef>

#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define RUNNING_ON_VALGRIND 0
#define VALGRIND_STACK_REGISTER(start, end) 0
#define VALGRIND_MAKE_MEM_UNDEFINED(start, num_bytes)
#define VALGRIND_MAKE_MEM_DEFINED(start, num_bytes)
#define VALGRIND_MAKE_MEM_NOACCESS(start, num_bytes)
#endif

#define LONGPRETRAIN_IF_THERE __attribute__((weak))
extern "C" {
LONGPRETRAIN_IF_THERE void* __tsan_get_current_fiber();
LONGPRETRAIN_IF_THERE void* __tsan_create_fiber(unsigned flags);
LONGPRETRAIN_IF_THERE void __tsan_destroy_fiber(void* fiber);
LONGPRETRAIN_IF_THERE void __tsan_switch_to_fiber(void* fiber, unsigned flags);
LONGPRETRAIN_IF_THERE void __tsan_acquire(void* address);
LONGPRETRAIN_IF_THERE void __tsan_release(void* address);
LONGPRETRAIN_IF_THERE void __tsan_ignore_thread_begin();
LONGPRETRAIN_IF_THERE void __tsan_ignore_thread_end();
LONGPRETRAIN_IF_THERE void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t);
LONGPRETRAIN_IF_THERE void __sanitizer_finish_switch_fiber(void* saved, const void**, size_t*);
LONGPRETRAIN_IF_THERE void __asan_poison_memory_region(const volatile void* start, size_t);
LONGPRETRAIN_IF_THERE void __asan_unpoison_memory_region(const volatile void* start, size_t);
}
#undef LONGPRETRAIN_IF_THERE

namespace longpretrain::emulation {

inline bool has_thread_sanitizer() { return __tsan_create_fiber != nullptr; }
inline bool has_address_sanitizer() { return __asan_poison_memory_region != nullptr; }
inline bool is_watched() {
  return has_thread_sanitizer() || has_address_sanitizer() || RUNNING_ON_VALGRIND != 0;
}

// Everything done before `order_release(tag)` comes before what follows `order_acquire(tag)`.
inline void order_release(void* tag) {
  if (has_thread_sanitizer()) __tsan_release(tag);
}
inline void order_acquire(void* tag) {
  if (has_thread_sanitizer()) __tsan_acquire(tag);
}

// As long as it lives, the thread sanitizer takes no notice of what the running fiber does with
// memory: the runtime is not compiled for it, but calls functions of libc that are.
struct Unwatched {
  Unwatched() {
    if (has_thread_sanitizer()) __tsan_ignore_thread_begin();
  }
  ~Unwatched() {
    if (has_thread_sanitizer()) __tsan_ignore_thread_end();
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

inline void forbid(char* start, size_t num_bytes) {
  if (has_address_sanitizer()) __asan_poison_memory_region(start, num_bytes);
  VALGRIND_MAKE_MEM_NOACCESS(start, num_bytes);
}
inline void allow(char* start, size_t num_bytes) {
  if (has_address_sanitizer()) __asan_unpoison_memory_region(start, num_bytes);
  VALGRIND_MAKE_MEM_DEFINED(start, num_bytes);
}

}  // namespace longpretrain::emulation
