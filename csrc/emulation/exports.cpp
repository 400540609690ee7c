// The emulator's settings and counters under plain names: tests in Python reach them by ctypes.
#include "runtime.h"

#define LONGPRETRAIN_EXPORT(type) extern "C" __attribute__((visibility("default"))) type

using namespace longpretrain::emulation;

LONGPRETRAIN_EXPORT(void) longpretrain_emulation_set_seed(uint64_t seed) { set_seed(seed); }
LONGPRETRAIN_EXPORT(void) longpretrain_emulation_set_threads(int threads) { set_threads(threads); }
LONGPRETRAIN_EXPORT(void) longpretrain_emulation_reset_counters() { reset_counters(); }

// A line per kernel, "name what=count ..."; good until the thread's next call.
LONGPRETRAIN_EXPORT(const char*) longpretrain_emulation_counters() {
  thread_local std::string text;
  text = counters_text();
  return text.c_str();
}
