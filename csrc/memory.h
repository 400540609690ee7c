// Memory that stays mapped cheaply: see memory.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace longpretrain {

// Asks for huge pages where the whole of one lies inside. A wish: nothing depends on its being
// granted.
void advise_huge_pages(void* data, int64_t num_bytes);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;

// Uninitialised; aligned to 64 bytes or, if large, to huge pages, which it asks for. Throws
// std::bad_alloc.
void* new_memory(int64_t num_bytes);

}  // namespace longpretrain
