#include <algorithm>

#include "plan_storage.h"

namespace longpretrain::cpu {
namespace {

int32_t padded(int64_t head_size) {
  int32_t size = 32;
  while (size < head_size) size *= 2;
  return size;
}

}  // namespace

PlanStorage::PlanStorage(const AttentionParams& params, const AttentionBackwardParams* backward)
    : phases_(backward == nullptr ? 1 : 3) {
  plan_.params = &params;
  plan_.backward = backward;
  plan_.window = static_cast<int32_t>(std::min(params.one_sided_window, params.M));
  plan_.kept_scale = 256.0f / static_cast<float>(256 - params.drop_below);
  plan_.padded_head_size = padded(params.D);
  mark_tokens();
  find_documents();
  // Twice the window, so that chunks two apart share no key.
  const int64_t reach = std::max<int64_t>(kChunk, 2 * int64_t{plan_.window});
  plan_.longest_chunk = static_cast<int32_t>(round_up(reach, kQueryTile));
  for (int32_t b = 0; b < params.B; ++b) {
    for (int32_t h = 0; h < params.H; ++h) cut(b, h);
  }
  add_global_rows();
  put_long_tasks_first();
  if (backward != nullptr) {
    edges_ = new_floats(int64_t{num_edges_} * 4 * plan_.window * plan_.padded_head_size);
    partials_ = new_floats(int64_t{num_partials_} * 2 * plan_.most_slots * plan_.padded_head_size);
    plan_.edges = edges_.get();
    plan_.partials = partials_.get();
  }
}

PlanStorage::Floats PlanStorage::new_floats(int64_t count) {
  return Floats(static_cast<float*>(new_memory(count * int64_t{sizeof(float)})));
}

void PlanStorage::mark_tokens() {
  const AttentionParams& p = *plan_.params;
  flags_BM_.assign(p.B * p.M, 0);
  if (p.padding_BM != nullptr) {
    for (int64_t i = 0; i < p.B * p.M; ++i) flags_BM_[i] = p.padding_BM[i] != 0 ? kPadding : 0;
  }
  slot_begin_B_.push_back(0);
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t position = p.global_index_BG[b * p.G + g];
      // bindings.cpp refuses bad positions; whoever calls without it must come to no harm.
      if (position < 0 || position >= p.M || flags_BM_[b * p.M + position] != 0) continue;
      flags_BM_[b * p.M + position] = kGlobal;
      slot_number_.push_back(static_cast<int32_t>(g));
      slot_position_.push_back(static_cast<int32_t>(position));
    }
    slot_begin_B_.push_back(static_cast<int32_t>(slot_number_.size()));
    plan_.most_slots = std::max(plan_.most_slots, slot_begin_B_[b + 1] - slot_begin_B_[b]);
  }
  plan_.flags_BM = flags_BM_.data();
  plan_.slot_begin_B = slot_begin_B_.data();
  plan_.slot_number = slot_number_.data();
  plan_.slot_position = slot_position_.data();
}

void PlanStorage::find_documents() {
  const AttentionParams& p = *plan_.params;
  if (p.document_BM == nullptr) return;
  document_begin_BM_.resize(p.B * p.M);
  document_end_BM_.resize(p.B * p.M);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t* document_M = p.document_BM + b * p.M;
    int32_t* begin_M = document_begin_BM_.data() + b * p.M;
    int32_t* end_M = document_end_BM_.data() + b * p.M;
    for (int64_t i = 0; i < p.M; ++i) {
      const bool same = i > 0 && document_M[i] == document_M[i - 1];
      begin_M[i] = same ? begin_M[i - 1] : static_cast<int32_t>(i);
    }
    for (int64_t i = p.M - 1; i >= 0; --i) {
      const bool same = i + 1 < p.M && document_M[i] == document_M[i + 1];
      end_M[i] = same ? end_M[i + 1] : static_cast<int32_t>(i + 1);
    }
  }
  plan_.document_begin_BM = document_begin_BM_.data();
  plan_.document_end_BM = document_end_BM_.data();
}

void PlanStorage::add_global_rows() {
  const AttentionParams& p = *plan_.params;
  if (p.G == 0) return;
  for (int32_t b = 0; b < p.B; ++b) {
    for (int32_t h = 0; h < p.H; ++h) {
      Task task{};
      task.work = Work::kGlobalRows;
      task.b = b;
      task.h = h;
      add(task);
    }
  }
}

// Threads take tasks in order, so they end together when the short ones come last. Tasks of one
// kind hardly differ: that kind comes first of which one task has more pairs of query and key.
void PlanStorage::put_long_tasks_first() {
  const AttentionParams& p = *plan_.params;
  const int64_t row_pairs = round_up(plan_.most_slots, kSixteen) * p.M;
  const int64_t reach = (p.causal ? 1 : 2) * int64_t{plan_.window} + kQueryTile;
  const int64_t window_pairs =
      std::min<int64_t>(plan_.longest_chunk, p.N) * std::min<int64_t>(reach, p.M);
  const Work first = row_pairs > window_pairs ? Work::kGlobalRows : Work::kWindow;
  std::stable_partition(phases_[0].begin(), phases_[0].end(),
                        [first](const Task& task) { return task.work == first; });
}

void PlanStorage::cut(int32_t b, int32_t h) {
  const AttentionParams& p = *plan_.params;
  const int64_t dilation = p.dilation_H[h];
  const int64_t num_classes = std::min(dilation, p.M);
  const int32_t first_partial = num_partials_;
  Task task{};
  task.work = Work::kWindow;
  task.b = b;
  task.h = h;
  task.left_edge = task.right_edge = -1;
  // Short classes are taken together until they fill a chunk.
  const int64_t longest_class = ceil_div(p.N, dilation);
  const int64_t together =
      std::max<int64_t>(1, plan_.longest_chunk / std::max<int64_t>(1, longest_class));
  for (int64_t residue = 0; residue < num_classes; residue += together) {
    task.first_residue = static_cast<int32_t>(residue);
    task.end_residue = static_cast<int32_t>(std::min(num_classes, residue + together));
    const int64_t first_query = ceil_div(std::max<int64_t>(p.q_offset - residue, 0), dilation);
    const int64_t end_query = ceil_div(std::max<int64_t>(p.q_offset + p.N - residue, 0), dilation);
    cut_class(task, end_query - first_query, first_query);
  }
  if (plan_.backward != nullptr && plan_.slots_of(b) > 0) {
    task.work = Work::kGlobalColumns;
    task.first_partial = first_partial;
    task.end_partial = num_partials_;
    phases_[2].push_back(task);
  }
}

void PlanStorage::cut_class(const Task& whole, int64_t num_queries, int64_t first_query) {
  Task task = whole;
  const int64_t chunk = plan_.longest_chunk;
  if (num_queries <= chunk) {
    task.first_query = 0;
    task.end_query = INT32_MAX;
    return add(task);
  }
  const int64_t num_chunks = ceil_div(num_queries, chunk);
  for (int64_t c = 0; c < num_chunks; ++c) {
    task.first_query = static_cast<int32_t>(first_query + c * chunk);
    task.end_query =
        c + 1 == num_chunks ? INT32_MAX : static_cast<int32_t>(task.first_query + chunk);
    task.phase = static_cast<int32_t>(c % 2);
    task.left_edge = c == 0 ? -1 : num_edges_ - 1;
    task.right_edge = c + 1 == num_chunks ? -1 : num_edges_++;
    add(task);
  }
}

void PlanStorage::add(const Task& task) {
  if (plan_.backward == nullptr) {
    phases_[0].push_back(task);
    return;
  }
  phases_[task.phase].push_back(task);
  if (task.work == Work::kWindow) {
    phases_[task.phase].back().first_partial = num_partials_++;
  }
}

}  // namespace longpretrain::cpu
