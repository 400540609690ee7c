#include "report.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "grid.h"

namespace longpretrain::emulation {
namespace {

bool same(const Waiting& a, const Waiting& b) {
  return std::strcmp(a.what, b.what) == 0 && a.line == b.line && a.file == b.file;
}

}  // namespace

void report_and_abort(const char* kernel, uint3 block, const std::string& why,
                      const std::vector<Waiting>& threads) {
  static std::mutex one_at_a_time;
  one_at_a_time.lock();  // never unlocked: the first report is the only one
  std::fprintf(stderr, "emulation: kernel %s, block (%u,%u,%u), seed %llu: %s\n", kernel, block.x,
               block.y, block.z, static_cast<unsigned long long>(seed()), why.c_str());
  for (size_t first = 0, end; first < threads.size(); first = end) {
    for (end = first; end < threads.size() && same(threads[first], threads[end]);) ++end;
    const Waiting& it = threads[first];
    if (end - first > 1) {
      std::fprintf(stderr, "  threads %zu to %zu: ", first, end - 1);
    } else {
      std::fprintf(stderr, "  thread %zu: ", first);
    }
    if (it.file == nullptr) {
      std::fprintf(stderr, "%s\n", it.what);
    } else {
      std::fprintf(stderr, "%s, %s:%u\n", it.what, it.file, it.line);
    }
  }
  std::fflush(stderr);
  std::abort();
}

}  // namespace longpretrain::emulation
