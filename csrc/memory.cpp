#include "memory.h"

#include <algorithm>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace longpretrain {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

}  // namespace

// The first touch of every 4 KiB page is a fault; that of a huge page of 2 MiB costs little more.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t start = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t stop = (address + num_bytes) / kHugePage * kHugePage;
  if (start < stop) (void)madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#endif
}

void* new_memory(int64_t num_bytes) {
  const size_t wanted = static_cast<size_t>(std::max<int64_t>(num_bytes, 1));
  const size_t alignment = wanted >= kHugePage ? kHugePage : 64;
  const size_t rounded = (wanted + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory, static_cast<int64_t>(rounded));
  return memory;
}

}  // namespace longpretrain
