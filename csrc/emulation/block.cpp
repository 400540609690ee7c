#include "block.h"

#include <bit>
#include <cstring>

#include "grid.h"
#include "report.h"
#include "sanitizers.h"

namespace longpretrain::emulation {
namespace {

[[noreturn]] void enter_thread();

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// The first set bit at or after `start`, going round.
int next_bit(uint32_t bits, int start) {
  start &= 31;
  return (std::countr_zero(std::rotr(bits, start)) + start) & 31;
}

}  // namespace

thread_local constinit Thread* current = nullptr;

uint64_t Random::draw() {  // SplitMix64
  uint64_t x = state += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

uint64_t mixed(uint64_t a, uint64_t b) { return Random{Random{a}.draw() ^ b}.draw(); }

Block::Block()
    : lanes_(std::make_unique<Lane[]>(kLargestBlock)), warps_(std::make_unique<Warp[]>(kWarps)) {
  for (int i = 0; i < kLargestBlock; ++i) {
    lanes_[i].lane = i % kWarpSize;
    lanes_[i].warp = &warps_[i / kWarpSize];
  }
  for (int i = 0; i < kWarps; ++i) {
    warps_[i].block = this;
    warps_[i].index = i;
    warps_[i].lanes = &lanes_[i * kWarpSize];
  }
}

void Block::run(const Launch& launch, uint3 index, uint64_t seed) {
  begin(launch, index, seed);
  become_fiber(main_);
  Lane* first = pick();
  current = first;
  switch_fiber(main_, first->fiber, false);
  current = nullptr;
  if (const char* flaw = shared.flaw()) fail(std::string("the block ") + flaw);
  count_conflicts();
  ++counters.blocks;
}

void Block::begin(const Launch& launch, uint3 index, uint64_t seed) {
  launch_ = &launch;
  index_ = index;
  ++num_runs_;
  const dim3 size = launch.block;
  num_threads_ = static_cast<int>(size.x * size.y * size.z);
  num_exited_ = num_at_barrier_ = phase_ = 0;
  all_true_ = true;
  any_true_ = false;
  shared.begin_block(launch.shared_bytes);

  in_order_ = seed == 0;
  random_.state = seed;
  constexpr uint32_t kStays[] = {2, 16, 256};
  stay_ = kStays[random_.below(3)];
  warp_ = 0;
  lane_ = kWarpSize - 1;
  ready_warps_ = 0;
  for (int i = 0; i < num_threads_; ++i) begin_lane(i);
}

void Block::begin_lane(int thread) {
  Lane& lane = lanes_[thread];
  const unsigned i = static_cast<unsigned>(thread);
  const dim3 size = launch_->block;
  lane.thread_index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  lane.block_index = index_;
  lane.block_size = size;
  lane.grid_size = launch_->grid;
  lane.shared = shared.start();
  lane.copies.clear();
  lane.group_ends.clear();
  lane.first_copy = 0;
  begin_fiber(lane.fiber, enter_thread);
  make_ready(lane);
}

namespace {

void enter_thread() {
  enter_fiber();
  order_acquire(launch_tag());
  order_acquire(this_block().end_tag(1));
  this_block().run_kernel();
  this_block().exit(this_lane());
}

}  // namespace

void Block::run_kernel() { launch_->run_thread(launch_->arguments); }

// --- who runs ------------------------------------------------------------------------------------

void Block::make_ready(Lane& lane) {
  lane.state = State::kReady;
  lane.warp->ready |= 1u << lane.lane;
  ready_warps_ |= 1u << lane.warp->index;
}

// Takes the lane that runs next out of those that can. In order, a warp goes on as long as it can.
// Otherwise some blocks jump between warps all the time and others let one run far ahead.
Lane* Block::pick() {
  if (ready_warps_ == 0) return nullptr;
  const int last_warp = warp_;
  const bool can_stay = ready_warps_ >> warp_ & 1;
  if (!can_stay || (!in_order_ && random_.below(stay_) == 0)) {
    const uint32_t start = in_order_ ? warp_ + 1 : random_.below(kWarps);
    warp_ = next_bit(ready_warps_, static_cast<int>(start));
  }
  Warp& warp = warps_[warp_];
  const int start = !in_order_           ? static_cast<int>(random_.below(kWarpSize))
                    : warp_ == last_warp ? lane_ + 1
                                         : 0;
  lane_ = next_bit(warp.ready, start);
  warp.ready &= ~(1u << lane_);
  if (warp.ready == 0) ready_warps_ &= ~(1u << warp_);
  return &warp.lanes[lane_];
}

void Block::run_next(Fiber& from, bool from_ends) {
  Lane* next = pick();
  if (next == nullptr && num_exited_ < num_threads_) fail("deadlock: no thread can go on");
  Fiber& to = next == nullptr ? main_ : next->fiber;
  if (&to == &from) return;
  current = next;
  ++counters.switches;
  switch_fiber(from, to, from_ends);
}

void Block::wait(Lane& lane) { run_next(lane.fiber, false); }

void Block::give_way(Lane& lane) {
  if (in_order_ || random_.below(4) != 0) return;
  make_ready(lane);
  run_next(lane.fiber, false);
}

void Block::exit(Lane& lane) {
  if (lane.first_copy != lane.copies.size()) {
    fail("a thread ends with asynchronous copies in flight");
  }
  lane.state = State::kExited;
  ++num_exited_;
  for (const Meeting& meeting : lane.warp->meetings) {
    if (meeting.mask >> lane.lane & 1) fail("a thread ends that its warp waits for");
  }
  if (num_at_barrier_ > 0 && num_at_barrier_ + num_exited_ == num_threads_) {
    fail("divergent barrier: some threads have ended, the others wait in __syncthreads");
  }
  order_release(end_tag(0));
  order_release(grid_tag());
  run_next(lane.fiber, true);
  std::abort();  // not reached
}

// --- tags of the thread sanitizer ----------------------------------------------------------------

// Each of two or four that take turns: a thread may be at the next barrier before another has left
// this one, but not at the one after.
char* Block::barrier_tag() const { return shared.tag(phase_ & 1); }

char* Block::end_tag(int blocks_ago) const {
  return shared.tag(2 + ((num_runs_ + blocks_ago) & 1));
}

char* Block::warp_tag(const Warp& warp, int number) const {
  return shared.tag(4 + 4 * warp.index + number % 4);
}

// --- the block's barrier -------------------------------------------------------------------------

bool Block::barrier(Lane& lane, Barrier kind, bool predicate, Where where) {
  const Unwatched unwatched;
  lane.state = State::kAtBarrier;
  lane.where = where;
  if (num_at_barrier_++ == 0) {
    barrier_kind_ = kind;
    barrier_where_ = where;
  } else if (kind != barrier_kind_ || !same_place(where, barrier_where_)) {
    fail("divergent barrier: threads of one block wait in different calls of __syncthreads");
  }
  all_true_ &= predicate;
  any_true_ |= predicate;
  char* tag = barrier_tag();
  order_release(tag);
  if (num_at_barrier_ + num_exited_ < num_threads_) {
    wait(lane);
  } else if (num_exited_ > 0) {
    fail("divergent barrier: some threads have ended, the others wait in __syncthreads");
  } else {
    release_barrier(lane);
    give_way(lane);
  }
  order_acquire(tag);
  return result_;
}

// All go on but the last to arrive, who is running.
void Block::release_barrier(Lane& last) {
  result_ = barrier_kind_ == Barrier::kOr ? any_true_ : all_true_;
  all_true_ = true;
  any_true_ = false;
  num_at_barrier_ = 0;
  ++phase_;
  ++counters.barriers;
  count_conflicts();
  last.state = State::kReady;
  for (int i = 0; i < num_threads_; ++i) {
    if (&lanes_[i] != &last) make_ready(lanes_[i]);
  }
}

bool barrier(Barrier kind, bool predicate, Where where) {
  return this_block().barrier(this_lane(), kind, predicate, where);
}

// --- meetings of a warp --------------------------------------------------------------------------

Meeting& Block::join_meeting(Lane& lane, Op op, uint32_t mask, Where where) {
  Warp& warp = *lane.warp;
  if (!(mask >> lane.lane & 1)) fail("a thread is not in the mask that it names");
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask == mask && meeting.op == op && same_place(meeting.where, where)) {
      return meeting;
    }
    // Others may meet first, and then come here; but not those that wait for this very thread.
    if ((meeting.mask >> lane.lane & 1) && (meeting.arrived & mask)) {
      fail("threads of one warp wait for each other at different operations or with other masks");
    }
  }
  for (int i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) && warp.lanes[i].state == State::kExited) {
      fail("a thread waits for one that has ended");
    }
  }
  warp.meetings.push_back({mask, 0, op, where, warp_tag(warp, warp.next_tag++)});
  return warp.meetings.back();
}

void Block::meet(Lane& lane, Op op, uint32_t mask, Where where, void (*act)(Warp&, uint32_t)) {
  const Unwatched unwatched;
  Warp& warp = *lane.warp;
  lane.state = State::kInWarp;
  lane.op = op;
  lane.where = where;
  Meeting& meeting = join_meeting(lane, op, mask, where);
  // Only __syncwarp orders memory.
  char* tag = op == Op::kSyncWarp ? meeting.tag : nullptr;
  if (tag != nullptr) order_release(tag);
  meeting.arrived |= 1u << lane.lane;
  if (meeting.arrived != mask) {
    wait(lane);
  } else {
    meeting = warp.meetings.back();  // in its place
    warp.meetings.pop_back();
    act(warp, mask);
    for (uint32_t rest = mask & ~(1u << lane.lane); rest != 0; rest &= rest - 1) {
      warp.lanes[std::countr_zero(rest)].state = State::kReady;
    }
    warp.ready |= mask & ~(1u << lane.lane);
    if (warp.ready != 0) ready_warps_ |= 1u << warp.index;
    lane.state = State::kReady;
    give_way(lane);
  }
  if (tag != nullptr) order_acquire(tag);
}

void Block::count_conflicts() {
  for (int i = 0; i < num_threads_ / kWarpSize; ++i) warps_[i].banks.count(counters);
}

// --- reports -------------------------------------------------------------------------------------

void Block::fail(const std::string& why) {
  std::vector<Waiting> threads;
  for (int i = 0; i < num_threads_; ++i) {
    const Lane& lane = lanes_[i];
    const bool waits = lane.state == State::kAtBarrier || lane.state == State::kInWarp;
    const char* call = lane.state == State::kAtBarrier ? "__syncthreads"
                       : waits                         ? name_of(lane.op)
                       : lane.state == State::kExited  ? "has ended"
                       : &lane == current              ? "is running"
                                                       : "can go on";
    threads.push_back(
        {call, waits ? lane.where.file_name() : nullptr, waits ? lane.where.line() : 0});
  }
  report_and_abort(launch_->kernel, index_, why, threads);
}

}  // namespace longpretrain::emulation
