// The most arithmetic this machine does: independent multiply-adds between registers, no memory,
// on all the given threads at once. Prints one line for each name asked for: NAME GFLOP_PER_S.
//
//   peak THREADS NAME...     names: avx2 avx512 avx512_bf16
//
// Asks for nothing else of the processor: who runs it names only instructions that it has.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

// Each register below 14 is a chain of sums of its own, which hides the latency of an instruction;
// 14 and 15 are multiplied. "xmm" names the whole register to the compiler.
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#define CLOBBERS                                                                                 \
  "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// vxorps of the lowest part clears the whole register: no chain begins with a denormal number.
#define CLEAR(i) "vxorps %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"
#define FMA_256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define FMA_512(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define DOT_512(i) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #i "\n"

#define LOOP(name, operation)                                                            \
  static void name(int64_t rounds) {                                                     \
    asm volatile(CHAINS(CLEAR) CLEAR(14)                                                 \
                     CLEAR(15) "1:\n" CHAINS(operation) "dec %0\n jnz 1b\n vzeroupper\n" \
                 : "+r"(rounds)                                                          \
                 :                                                                       \
                 : CLOBBERS);                                                            \
  }

LOOP(fma_256, FMA_256)
LOOP(fma_512, FMA_512)
LOOP(dot_512, DOT_512)

constexpr double kChains = 14;

struct Probe {
  const char* name;
  void (*loop)(int64_t);
  double operations;  // of one instruction: lanes x 2, and x 2 again where it sums pairs
};

static const Probe kProbes[] = {
    {"avx2", fma_256, 16}, {"avx512", fma_512, 32}, {"avx512_bf16", dot_512, 64}};

static double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double gflop_per_s(const Probe& probe, int num_threads) {
  constexpr int64_t kRounds = 100000;  // a fifth of a millisecond: shorter than most disturbances
  constexpr int kSamples = 1500;
  std::vector<double> best_s(num_threads, 1e9);
  std::atomic<int> waiting{num_threads};
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t)
    threads.emplace_back([&, t] {
      for (--waiting; waiting > 0;) std::this_thread::yield();
      for (int i = 0; i < kSamples; ++i) {
        const double begin_s = now_s();
        probe.loop(kRounds);
        best_s[t] = std::min(best_s[t], now_s() - begin_s);
      }
    });
  for (std::thread& thread : threads) thread.join();
  double sum = 0;
  for (double s : best_s) sum += kChains * kRounds * probe.operations / s / 1e9;
  return sum;
}

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const int num_threads = std::max(1, std::atoi(argv[1]));
  for (int i = 2; i < argc; ++i)
    for (const Probe& probe : kProbes)
      if (!std::strcmp(argv[i], probe.name))
        std::printf("%s %.2f\n", probe.name, gflop_per_s(probe, num_threads));
  return 0;
}
