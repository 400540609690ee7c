// A CUDA runtime without a GPU: it tells what would be launched, and refuses what an A100 would.
//
// It holds exactly what code of csrc/cuda may call, so that a call that waits for the device or
// copies from it does not link.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};

struct Kernel {
  std::string name;
  size_t most_shared_bytes = 48 << 10;
};

constexpr int kSuccess = 0, kInvalidValue = 1, kMostSharedBytesAttribute = 8;
constexpr int kSharedCarveoutAttribute = 9;  // a wish: how much of the first cache is shared
constexpr size_t kSharedBytesOfA100 = 163 << 10;

using Listener = void (*)(const char* kernel, const Dim3* grid, const Dim3* block,
                          size_t shared_bytes, void* stream, void** arguments);

Configuration configuration;
Listener listener = nullptr;
int last_error = kSuccess;

std::map<const void*, Kernel>& kernels() {  // of the host function that stands for each
  static std::map<const void*, Kernel> found;
  return found;
}

int remember(int error) {
  if (error != kSuccess) last_error = error;
  return error;
}

}  // namespace

extern "C" {

void listen_to_launches(Listener wanted) { listener = wanted; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  kernels()[host_function].name = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void** stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *stream = configuration.stream;
  return kSuccess;
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (attribute == kSharedCarveoutAttribute && value == 100) return kSuccess;
  if (attribute != kMostSharedBytesAttribute || value < 0) return remember(kInvalidValue);
  if (static_cast<size_t>(value) > kSharedBytesOfA100) return remember(kInvalidValue);
  kernels().at(function).most_shared_bytes = static_cast<size_t>(value);
  return kSuccess;
}

// A handle is the host function itself.
int __cudaGetKernel(const void** handle, const void* function) {
  *handle = function;
  return kSuccess;
}

int __cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments,
                       size_t shared_bytes, void* stream) {
  const Kernel& kernel = kernels().at(function);
  const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= INT32_MAX &&
                    grid.y <= 65535 && grid.z <= 65535 && block.y == 1 && block.z == 1 &&
                    block.x > 0 && block.x <= 1024 && shared_bytes <= kernel.most_shared_bytes;
  if (!fits) return remember(kInvalidValue);
  listener(kernel.name.c_str(), &grid, &block, shared_bytes, stream, arguments);
  return kSuccess;
}

int cudaFuncGetAttributes(void*, const void*) { return kSuccess; }

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
const char* cudaGetErrorString(int error) { return error == kSuccess ? "none" : "invalid value"; }

}  // extern "C"
