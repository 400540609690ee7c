// Launches: checks what CUDA would refuse, and runs the blocks of a grid on OS threads.
#include "grid.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "block.h"
#include "sanitizers.h"

namespace longpretrain::emulation {
namespace {

constexpr size_t kSharedOfSm80 = 163 << 10;
constexpr size_t kLargestParameters = 4096;
// Under the thread sanitizer so many blocks in a row are unordered, so that it sees their races; an
// object that runs one block after the other makes them appear in order.
constexpr int kUnorderedBlocks = 4;
constexpr int kMostThreads =
    16;  // unless more are asked for: each takes memory for a block's stacks

uint64_t number_from(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

// Of the process; launches may come from several of its threads.
struct Settings {
  std::mutex mutex;
  uint64_t seed = number_from("LONGPRETRAIN_EMULATION_SEED");
  uint64_t num_launches = 0;  // since the seed was set
  int threads = static_cast<int>(number_from("LONGPRETRAIN_EMULATION_THREADS"));
  size_t shared_limit = kSharedOfSm80;
  std::map<std::string, Counters> counters;
  std::vector<std::unique_ptr<Block>> idle;  // blocks are large: kept for the next grid
};
Settings& settings() {
  static Settings& kept = *new Settings;  // outlives all threads
  return kept;
}

void add(Counters& sum, const Counters& x) {
  sum.launches += x.launches;
  sum.blocks += x.blocks;
  sum.mma += x.mma;
  sum.ldmatrix += x.ldmatrix;
  sum.shuffles += x.shuffles;
  sum.barriers += x.barriers;
  sum.warp_barriers += x.warp_barriers;
  sum.async_copies += x.async_copies;
  sum.async_bytes += x.async_bytes;
  sum.ldmatrix_conflicts += x.ldmatrix_conflicts;
  sum.async_conflicts += x.async_conflicts;
  sum.shared_conflicts += x.shared_conflicts;
  sum.shared_accesses += x.shared_accesses;
  sum.switches += x.switches;
}

std::string text_of(dim3 size) {
  return "(" + std::to_string(size.x) + "," + std::to_string(size.y) + "," +
         std::to_string(size.z) + ")";
}

void check(const Launch& launch, size_t shared_limit) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string("emulation: launch of ") + launch.kernel + ", grid " +
                             text_of(launch.grid) + ", block " + text_of(launch.block) + ", " +
                             std::to_string(launch.shared_bytes) + " bytes of shared memory, " +
                             std::to_string(launch.parameter_bytes) + " of parameters: " + why);
  };
  const dim3 grid = launch.grid, block = launch.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("the grid is empty");
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) refuse("the grid is too large");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || block.z > 64 || threads > kLargestBlock) {
    refuse("the block has no or too many threads");
  }
  if (threads % kWarpSize != 0) refuse("the block is not made of whole warps");
  if (launch.shared_bytes > shared_limit) {
    refuse("more shared memory than the " + std::to_string(shared_limit) + " bytes of the device");
  }
  if (launch.parameter_bytes > kLargestParameters) refuse("more than 4096 bytes of parameters");
}

// The blocks of one grid, taken one after the other by any number of OS threads.
struct Grid {
  const Launch& launch;
  uint64_t seed;  // of this launch; 0: in order
  std::vector<uint32_t> order;
  std::atomic<size_t> next{0};

  Grid(const Launch& launch, uint64_t seed) : launch(launch), seed(seed) {
    order.resize(size_t{launch.grid.x} * launch.grid.y * launch.grid.z);
    std::iota(order.begin(), order.end(), 0u);
    if (seed == 0) return;
    Random random{seed};
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random.below(static_cast<uint32_t>(i))]);
    }
  }

  void drain(std::span<const std::unique_ptr<Block>> in_turn) {
    const dim3 size = launch.grid;
    size_t turn = 0;
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) {
      const uint32_t number = order[i];
      const uint3 index = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
      // Odd: 0 is the order without a seed.
      in_turn[turn++ % in_turn.size()]->run(launch, index, seed == 0 ? 0 : mixed(seed, number) | 1);
    }
    order_acquire(grid_tag());
  }
};

std::vector<std::unique_ptr<Block>> borrow_blocks(size_t count) {
  std::vector<std::unique_ptr<Block>> blocks;
  Settings& s = settings();
  const std::lock_guard lock(s.mutex);
  for (size_t i = 0; i < count; ++i) {
    if (s.idle.empty()) {
      blocks.push_back(std::make_unique<Block>());
    } else {
      blocks.push_back(std::move(s.idle.back()));
      s.idle.pop_back();
    }
    blocks.back()->counters = {};
  }
  return blocks;
}

void give_back(std::vector<std::unique_ptr<Block>> blocks, const char* kernel) {
  Settings& s = settings();
  const std::lock_guard lock(s.mutex);
  Counters& sum = s.counters[kernel];
  ++sum.launches;
  for (std::unique_ptr<Block>& block : blocks) {
    add(sum, block->counters);
    s.idle.push_back(std::move(block));
  }
}

size_t threads_for(size_t num_blocks, int wanted) {
  if (wanted <= 0) {
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    wanted = is_watched() ? 1 : std::min(cores, kMostThreads);
  }
  return std::min<size_t>(std::max(wanted, 1), num_blocks);
}

}  // namespace

uint64_t seed() { return settings().seed; }

char* launch_tag() {
  static char tag[8];
  return tag;
}

char* grid_tag() {
  static char tag[8];
  return tag;
}

void run_grid(const Launch& launch) {
  Settings& s = settings();
  uint64_t seed;
  int wanted;
  {
    const std::lock_guard lock(s.mutex);
    check(launch, s.shared_limit);
    seed = s.seed == 0 ? 0 : mixed(s.seed, s.num_launches++) | 1;
    wanted = s.threads;
  }
  Grid grid(launch, seed);
  const size_t num_threads = threads_for(grid.order.size(), wanted);
  const size_t turns = has_thread_sanitizer() ? kUnorderedBlocks : 1;
  std::vector<std::unique_ptr<Block>> blocks = borrow_blocks(num_threads * turns);
  const auto drain = [&](size_t thread) {
    grid.drain(std::span(blocks).subspan(thread * turns, turns));
  };
  order_release(launch_tag());
  std::vector<std::thread> threads;
  for (size_t i = 1; i < num_threads; ++i) threads.emplace_back(drain, i);
  drain(0);
  for (std::thread& thread : threads) thread.join();
  give_back(std::move(blocks), launch.kernel);
}

void set_seed(uint64_t seed) {
  const std::lock_guard lock(settings().mutex);
  settings().seed = seed;
  settings().num_launches = 0;
}

void set_threads(int threads) {
  const std::lock_guard lock(settings().mutex);
  settings().threads = threads;
}

void set_shared_limit(size_t num_bytes) {
  const std::lock_guard lock(settings().mutex);
  settings().shared_limit = std::min(num_bytes, kLargestShared);
}

Counters counters(const char* kernel) {
  const std::lock_guard lock(settings().mutex);
  Counters sum;
  for (const auto& [name, counted] : settings().counters) {
    if (kernel == nullptr || name == kernel) add(sum, counted);
  }
  return sum;
}

std::string counters_text() {
  const std::lock_guard lock(settings().mutex);
  std::string text;
  for (const auto& [name, x] : settings().counters) {
    text += name;
    for (const auto& [what, count] : {std::pair{"launches", x.launches},
                                      {"blocks", x.blocks},
                                      {"mma", x.mma},
                                      {"ldmatrix", x.ldmatrix},
                                      {"shuffles", x.shuffles},
                                      {"barriers", x.barriers},
                                      {"warp_barriers", x.warp_barriers},
                                      {"async_copies", x.async_copies},
                                      {"async_bytes", x.async_bytes},
                                      {"ldmatrix_conflicts", x.ldmatrix_conflicts},
                                      {"async_conflicts", x.async_conflicts},
                                      {"shared_conflicts", x.shared_conflicts},
                                      {"shared_accesses", x.shared_accesses},
                                      {"switches", x.switches}}) {
      text += std::string(" ") + what + "=" + std::to_string(count);
    }
    text += "\n";
  }
  return text;
}

void reset_counters() {
  const std::lock_guard lock(settings().mutex);
  settings().counters.clear();
}

}  // namespace longpretrain::emulation
