// A program of named parts: `program NAME [numbers] < input > output`, both as raw numbers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cuda/ptx.h"

using Numbers = std::vector<int64_t>;
using Part = void (*)(const Numbers& arguments);

inline std::map<std::string, Part>& parts() {
  static std::map<std::string, Part> all;
  return all;
}

struct Register {
  Register(const char* name, Part part) { parts()[name] = part; }
};

// LONGPRETRAIN_PART(name) { body }, which may use `arguments`.
#define LONGPRETRAIN_PART(name)                                 \
  static void name##_part(const Numbers& arguments);            \
  static const Register name##_registered(#name, &name##_part); \
  static void name##_part([[maybe_unused]] const Numbers& arguments)

template <class T>
std::vector<T> read_input() {
  std::vector<T> numbers;
  for (T number; std::fread(&number, sizeof number, 1, stdin) == 1;) numbers.push_back(number);
  return numbers;
}

template <class T>
void write_output(const std::vector<T>& numbers) {
  std::fwrite(numbers.data(), sizeof(T), numbers.size(), stdout);
}
