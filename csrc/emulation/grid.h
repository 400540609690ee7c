// What other parts of the runtime ask of the launches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longpretrain::emulation {

uint64_t seed();
// Addresses for the thread sanitizer to order memory by: what the host did before a launch comes
// before all blocks, and these before what it does after.
char* launch_tag();
char* grid_tag();

}  // namespace longpretrain::emulation
