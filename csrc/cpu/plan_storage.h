// Owns the memory behind a Plan. For baseline code only: see plan.h.
#pragma once

#include <vector>

#include "../memory.h"
#include "plan.h"

namespace longpretrain::cpu {

class PlanStorage {
 public:
  explicit PlanStorage(const AttentionParams& params,
                       const AttentionBackwardParams* backward = nullptr);
  PlanStorage(const PlanStorage&) = delete;
  PlanStorage& operator=(const PlanStorage&) = delete;

  const Plan& plan() const { return plan_; }
  // Tasks of a phase may run at once; phases run one after another.
  const std::vector<std::vector<Task>>& phases() const { return phases_; }

 private:
  void mark_tokens();
  void find_documents();
  void cut(int32_t b, int32_t h);
  void cut_class(const Task& whole, int64_t num_queries, int64_t first_query);
  void add(const Task& task);
  void add_global_rows();
  void put_long_tasks_first();

  using Floats = Owned<float>;
  static Floats new_floats(int64_t count);

  Plan plan_{};
  Floats edges_, partials_;
  std::vector<uint8_t> flags_BM_;
  std::vector<int32_t> document_begin_BM_, document_end_BM_;
  std::vector<int32_t> slot_begin_B_, slot_number_, slot_position_;
  std::vector<std::vector<Task>> phases_;
  int32_t num_edges_ = 0, num_partials_ = 0;
};

}  // namespace longpretrain::cpu
