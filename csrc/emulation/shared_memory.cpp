#include "shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "runtime.h"
#include "sanitizers.h"

namespace longpretrain::emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMargin = 512;
// Aligned as the kernels ask for and no better.
constexpr size_t kStart = kPage + kMargin + 128;
constexpr size_t kMapped = kStart + kLargestShared + kPage;
constexpr int kNaN = 0xff;  // in every byte: a NaN of any dtype, and negative as an integer

char* map() {
  void* mapped = mmap(nullptr, kMapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(mapped);
}

bool is_untouched(const char* start, size_t num_bytes) {
  const auto is_nan = [](char byte) { return static_cast<unsigned char>(byte) == kNaN; };
  return std::all_of(start, start + num_bytes, is_nan);
}

}  // namespace

SharedMemory::SharedMemory() : memory_(map()), start_(memory_ + kStart) {}

SharedMemory::~SharedMemory() {
  allow(memory_, kMapped);
  munmap(memory_, kMapped);
}

void SharedMemory::begin_block(size_t num_bytes) {
  const Unwatched unwatched;
  if (is_watched()) allow(memory_, kMapped);
  num_bytes_ = num_bytes;
  gaps_.clear();
  std::memset(start_ - kMargin, kNaN, num_bytes + 2 * kMargin);
  if (!is_watched()) return;
  forbid(start_ - kMargin, kMargin);
  forbid(start_ + num_bytes, kMapped - kStart - num_bytes);
  (void)VALGRIND_MAKE_MEM_UNDEFINED(start_, num_bytes);
}

const char* SharedMemory::flaw() const {
  // These told at once, and would not let the borders be read.
  if (has_address_sanitizer() || RUNNING_ON_VALGRIND) return nullptr;
  if (!is_untouched(start_ - kMargin, kMargin)) return "wrote before its shared memory";
  if (!is_untouched(start_ + num_bytes_, kMargin)) return "wrote past its shared memory";
  for (const char* gap : gaps_) {
    if (!is_untouched(gap, kGap)) return "wrote between two parts of its shared memory";
  }
  return nullptr;
}

void SharedMemory::close_gap(char* start) {
  if (std::find(gaps_.begin(), gaps_.end(), start) != gaps_.end()) return;  // by another thread
  gaps_.push_back(start);
  if (is_watched()) forbid(start, kGap);
}

bool SharedMemory::holds(const void* address, size_t num_bytes) const {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  const uintptr_t start = reinterpret_cast<uintptr_t>(start_);
  return first >= start && first + num_bytes <= start + num_bytes_;
}

}  // namespace longpretrain::emulation
