// One block of CUDA threads on one OS thread: its fibers, who runs next, who waits for what.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "banks.h"
#include "fiber.h"
#include "runtime.h"
#include "shared_memory.h"

namespace longpretrain::emulation {

constexpr int kWarpSize = 32;
constexpr int kLargestBlock = 1024;
constexpr int kWarps = kLargestBlock / kWarpSize;

// What a warp's lanes can wait for together.
enum class Op : uint8_t {
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kBallot,
  kMmaBFloat16,
  kMmaFloat16,
  kLdmatrix,
  kLdmatrixTransposed
};
const char* name_of(Op op);

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kExited };

struct Random {
  uint64_t state = 0;
  uint64_t draw();
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((draw() >> 32) * bound >> 32); }
};
uint64_t mixed(uint64_t a, uint64_t b);

class Block;
struct Warp;

struct Lane : Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  int lane = 0;  // of the warp
  State state = State::kReady;
  Op op = Op::kSyncWarp;
  Where where;  // it waits
  std::vector<Copy> copies;
  size_t first_copy = 0;           // that has not been waited for
  std::vector<size_t> group_ends;  // in `copies`; of the groups in flight
};

// Lanes that wait for the others of their mask.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  Op op = Op::kSyncWarp;
  Where where;
  char* tag = nullptr;
};

constexpr int kWords = 10;  // of a lane in the largest operation: mma's a, b and d

struct Warp {
  Block* block = nullptr;
  Lane* lanes = nullptr;
  int index = 0;
  uint32_t ready = 0;  // a bit per lane
  std::vector<Meeting> meetings;
  alignas(64) uint32_t in[kWords][kWarpSize];
  alignas(64) uint32_t out[4][kWarpSize];
  BankLog banks;
  int next_tag = 0;
};

// Whatever it needs is kept from one block to the next, and from one grid to the next.
class Block {
 public:
  Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void run(const Launch& launch, uint3 index, uint64_t seed);

  bool barrier(Lane& lane, Barrier kind, bool predicate, Where where);
  // Returns when all of `mask` have arrived, and the last one has run `act`.
  void meet(Lane& lane, Op op, uint32_t mask, Where where, void (*act)(Warp&, uint32_t mask));
  [[noreturn]] void exit(Lane& lane);
  // The kernel broke a rule: says so, tells where threads wait, and ends the process.
  [[noreturn]] void fail(const std::string& why);

  void run_kernel();  // as the running thread
  // Tags are addresses for the thread sanitizer to order memory by. With this one a block comes
  // after the block that the object ran before.
  char* end_tag(int blocks_ago) const;

  Counters counters;
  SharedMemory shared;

 private:
  void begin(const Launch& launch, uint3 index, uint64_t seed);
  void begin_lane(int thread);
  Meeting& join_meeting(Lane& lane, Op op, uint32_t mask, Where where);
  void make_ready(Lane& lane);
  void wait(Lane& lane);      // gives way; returns when the lane runs again
  void give_way(Lane& lane);  // to a random lane, now and then
  Lane* pick();
  void run_next(Fiber& from, bool from_ends);
  void release_barrier(Lane& last);
  void count_conflicts();
  char* warp_tag(const Warp& warp, int number) const;
  char* barrier_tag() const;

  const Launch* launch_ = nullptr;
  uint3 index_{};
  int num_threads_ = 0, num_exited_ = 0;
  uint32_t num_runs_ = 0;
  Fiber main_;
  std::unique_ptr<Lane[]> lanes_;
  std::unique_ptr<Warp[]> warps_;

  uint32_t ready_warps_ = 0;  // a bit per warp
  int warp_ = 0, lane_ = 0;   // that ran last
  bool in_order_ = true;
  uint32_t stay_ = 0;  // a warp is left on purpose about once in so many turns
  Random random_;

  int num_at_barrier_ = 0;
  Barrier barrier_kind_ = Barrier::kPlain;
  Where barrier_where_;
  bool all_true_ = true, any_true_ = false, result_ = false;
  int phase_ = 0;
};

// Of the running CUDA thread.
inline Lane& this_lane() { return *static_cast<Lane*>(current); }
inline Block& this_block() { return *this_lane().warp->block; }

}  // namespace longpretrain::emulation
