// A block's shared memory: exactly as large as asked for, full of NaN, watched at its borders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace longpretrain::emulation {

constexpr size_t kLargestShared = 256 << 10;

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void begin_block(size_t num_bytes);
  // What a block did beside its memory, as a sentence; null when nothing.
  const char* flaw() const;
  // No access may touch these kGap bytes.
  void close_gap(char* start);

  char* start() const { return start_; }
  size_t num_bytes() const { return num_bytes_; }
  bool holds(const void* address, size_t num_bytes) const;
  uint32_t offset(const void* address) const {
    return static_cast<uint32_t>(static_cast<const char*>(address) - start_);
  }
  // Addresses that the thread sanitizer may order memory by.
  char* tag(int number) const { return memory_ + 8 * number; }

 private:
  char* memory_;  // a page of tags, a margin, shared memory, a margin
  char* start_;
  size_t num_bytes_ = 0;
  std::vector<char*> gaps_;
};

}  // namespace longpretrain::emulation
