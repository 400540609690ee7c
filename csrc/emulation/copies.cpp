// Accesses to shared memory that the runtime hears of: asynchronous copies, and rows of ldmatrix.
#include <string>

#include "block.h"
#include "sanitizers.h"

namespace longpretrain::emulation {
namespace {

constexpr size_t kRowBytes = 16;
// Registers may hold any number of groups; kernels of ours need two or three, so many is a leak.
constexpr size_t kMostGroups = 32;

std::string at(const Where& where) {
  return std::string(", ") + where.file_name() + ":" + std::to_string(where.line());
}

void check_row(const void* address, const char* what, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % kRowBytes != 0) {
    this_block().fail(std::string(what) + " is not aligned to 16 bytes" + at(where));
  }
}

void check_shared_row(const void* address, const char* what, const Where& where) {
  check_row(address, what, where);
  if (!this_block().shared.holds(address, kRowBytes)) {
    this_block().fail(std::string(what) + " is outside shared memory" + at(where));
  }
}

}  // namespace

const void* shared_row(const void* row, Where where) {
  check_shared_row(row, "a row of ldmatrix", where);
  return row;
}

void begin_copy(void* target, const void* source, bool valid, Where where) {
  const Unwatched unwatched;
  Block& block = this_block();
  Lane& lane = this_lane();
  check_shared_row(target, "the target of an asynchronous copy", where);
  if (valid) check_row(source, "the source of an asynchronous copy", where);
  lane.copies.push_back({target, source, valid});
  lane.warp->banks.note(Access::kAsyncCopy, lane.lane, block.shared.offset(target), kRowBytes,
                        where);
  ++block.counters.async_copies;
  block.counters.async_bytes += valid ? kRowBytes : 0;
}

void hide_copy(void* target) { (void)VALGRIND_MAKE_MEM_UNDEFINED(target, kRowBytes); }

void close_copy_group() {
  const Unwatched unwatched;
  Lane& lane = this_lane();
  lane.group_ends.push_back(lane.copies.size());
  if (lane.group_ends.size() > kMostGroups) {
    this_block().fail("a thread has more than 32 groups of asynchronous copies in flight");
  }
}

bool next_copy(int pending, Copy* copy) {
  const Unwatched unwatched;
  Lane& lane = this_lane();
  while (lane.group_ends.size() > static_cast<size_t>(pending)) {
    if (lane.first_copy < lane.group_ends.front()) {
      *copy = lane.copies[lane.first_copy++];
      return true;
    }
    lane.group_ends.erase(lane.group_ends.begin());
  }
  if (lane.first_copy == lane.copies.size() && lane.group_ends.empty()) {
    lane.copies.clear();
    lane.first_copy = 0;
  }
  return false;
}

void note_shared(const void* address, int num_bytes, Where where) {
  const Unwatched unwatched;
  Block& block = this_block();
  Lane& lane = this_lane();
  if (!block.shared.holds(address, num_bytes)) {
    block.fail("an access to shared memory is outside it" + at(where));
  }
  if (reinterpret_cast<uintptr_t>(address) % num_bytes != 0) {
    block.fail("an access to shared memory is not aligned" + at(where));
  }
  lane.warp->banks.note(Access::kOrdinary, lane.lane, block.shared.offset(address), num_bytes,
                        where);
}

void close_gap(void* start) {
  if (!this_block().shared.holds(start, kGap)) {
    this_block().fail("a gap is not in shared memory");
  }
  this_block().shared.close_gap(static_cast<char*>(start));
}

}  // namespace longpretrain::emulation
