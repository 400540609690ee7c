// What the emulator says before it ends the process.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"

namespace longpretrain::emulation {

// Of one thread of the block: a call that it waits in, or what else it does.
struct Waiting {
  const char* what;
  const char* file;  // null: it does not wait
  uint32_t line;
};

[[noreturn]] void report_and_abort(const char* kernel, uint3 block, const std::string& why,
                                   const std::vector<Waiting>& threads);

}  // namespace longpretrain::emulation
