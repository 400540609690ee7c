#include "banks.h"

#include <algorithm>
#include <cstring>

namespace longpretrain::emulation {

namespace {

// For rows of 16 bytes, the common case: whether the eight lanes from `first` on have one each of
// the eight places where a row can lie in the banks.
bool fill_all_banks(const uint32_t (&offsets)[32], uint32_t mask, int first) {
  uint32_t places = 0;
  for (int lane = first; lane < first + 8; ++lane) places |= 1u << (offsets[lane] / 16 % 8);
  return places == 0xff && (mask >> first & 0xff) == 0xff;
}

}  // namespace

int extra_turns(const uint32_t (&offsets)[32], uint32_t mask, int num_bytes) {
  constexpr uint32_t kBanks = 32;
  const int words = std::max(1, num_bytes / 4), group = std::max(1, 32 / words);
  int extra = 0;
  for (int first = 0; first < 32; first += group) {
    if (num_bytes == 16 && fill_all_banks(offsets, mask, first)) continue;
    // Different words of one bank take turns; a word that several lanes want takes one.
    uint32_t wanted[32][32];
    int num_wanted[kBanks] = {}, turns = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int i = 0; i < words; ++i) {
        const uint32_t word = offsets[lane] / 4 + i, bank = word % kBanks;
        uint32_t* end = wanted[bank] + num_wanted[bank];
        if (std::find(wanted[bank], end, word) != end) continue;
        *end = word;
        turns = std::max(turns, ++num_wanted[bank]);
      }
    }
    extra += std::max(0, turns - 1);
  }
  return extra;
}

BankLog::Place& BankLog::place_of(Access access, int num_bytes, const Where& where) {
  for (Place& place : places_) {
    if (place.line == where.line() && place.column == where.column() && place.access == access &&
        place.num_bytes == num_bytes && place.file == where.file_name()) {
      return place;
    }
  }
  places_.push_back(
      {access, where.file_name(), where.line(), where.column(), num_bytes, {}, {}, 0});
  return places_.back();
}

void BankLog::note(Access access, int lane, uint32_t offset, int num_bytes, const Where& where) {
  Place& place = place_of(access, num_bytes, where);
  const uint32_t row = place.num_noted[lane]++;
  if (row >= place.rows.size()) place.rows.resize(row + 1);
  place.num_rows = std::max<size_t>(place.num_rows, row + 1);
  place.rows[row].mask |= 1u << lane;
  place.rows[row].offsets[lane] = offset;
}

void BankLog::count(Counters& counters) {
  for (Place& place : places_) {
    for (size_t i = 0; i < place.num_rows; ++i) {
      const int extra = extra_turns(place.rows[i].offsets, place.rows[i].mask, place.num_bytes);
      if (place.access == Access::kAsyncCopy) {
        counters.async_conflicts += extra;
      } else {
        counters.shared_conflicts += extra;
        ++counters.shared_accesses;
      }
      place.rows[i].mask = 0;
    }
    place.num_rows = 0;
    std::memset(place.num_noted, 0, sizeof place.num_noted);
  }
}

}  // namespace longpretrain::emulation
