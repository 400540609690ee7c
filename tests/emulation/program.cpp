#include "program.h"

#include <exception>

// 3: an exception, whose sentence goes to stderr.
int main(int count, char** words) {
  const auto found = count < 2 ? parts().end() : parts().find(words[1]);
  if (found == parts().end()) {
    for (const auto& [name, part] : parts()) std::fprintf(stderr, "%s\n", name.c_str());
    return 2;
  }
  Numbers arguments;
  for (int i = 2; i < count; ++i) arguments.push_back(std::strtoll(words[i], nullptr, 10));
  try {
    found->second(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
