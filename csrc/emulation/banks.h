// Bank conflicts of shared memory: 32 banks of 4 bytes.
//
// Lanes run one after the other, but their accesses happen together on the device. So each warp
// keeps a log: the n-th access of every lane from one place of the source is one access of the
// warp.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace longpretrain::emulation {

enum class Access : uint8_t { kAsyncCopy, kOrdinary };

// Turns beyond the fewest possible that the banks take to serve `num_bytes` at each of the offsets
// of the lanes in `mask`. Lanes are served in groups whose accesses fill all banks once.
int extra_turns(const uint32_t (&offsets)[32], uint32_t mask, int num_bytes);

class BankLog {
 public:
  void note(Access access, int lane, uint32_t offset, int num_bytes, const Where& where);
  // Counts what was noted and forgets it.
  void count(Counters& counters);

 private:
  struct Row {
    uint32_t mask = 0;
    uint32_t offsets[32];
  };
  struct Place {
    Access access;
    const char* file;
    uint32_t line, column;
    int num_bytes;
    uint32_t num_noted[32];
    std::vector<Row> rows;
    size_t num_rows;
  };
  Place& place_of(Access access, int num_bytes, const Where& where);

  std::vector<Place> places_;
};

}  // namespace longpretrain::emulation
