// A stand-in for the CUDA runtime that starts nothing and writes down what would be started: one
// line per launch with the kernel's mangled name, grid, threads and dynamic shared memory.
//
// It has exactly the functions that the operator may use. Another one, such as an allocation, a
// copy or a synchronisation, is missing when the recorder is linked: so the linker proves that the
// operator never waits for the device.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace {

std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;
  return names;
}
std::map<const void*, int> dynamic_limit;

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
} pushed;

cudaError_t record(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const std::string& name = kernel_names().at(kernel);
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking && static_cast<size_t>(dynamic_limit[kernel]) < shared_bytes) {
    std::fprintf(stderr, "%s asks for %zu bytes of shared memory, its limit was set to %d\n",
                 name.c_str(), shared_bytes, dynamic_limit[kernel]);
    std::exit(1);
  }
  std::printf("launch %s %u %u %u %u %zu\n", name.c_str(), grid.x, grid.y, grid.z,
              block.x * block.y * block.z, shared_bytes);
  return cudaSuccess;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernel_names()[host] = name;
  std::printf("kernel %s\n", name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**,
                               size_t shared_bytes, cudaStream_t) {
  return record(kernel, grid, block, shared_bytes);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared_bytes,
                             cudaStream_t) {
  return record(kernel, grid, block, shared_bytes);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) dynamic_limit[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t num_bytes, cudaStream_t) {
  std::printf("memset %zu\n", num_bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no device was asked"; }

// Asked once to find out whether the device can run the kernels; none of them waits for it.
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 8;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  std::printf("asked %s\n", kernel_names().at(kernel).c_str());
  *attributes = {};
  return cudaSuccess;
}

}  // extern "C"
