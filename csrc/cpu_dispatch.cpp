// Chooses the CPU ops of the best instruction set that this build has and this machine knows.
#include <cstdlib>
#include <cstring>

#include "cpu.h"
#ifdef PROLORA_AMX
#include <sys/syscall.h>
#include <unistd.h>

#include "overlap_amx.h"
#endif

namespace prolora {
namespace {

#ifdef PROLORA_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef PROLORA_AMX
// Whether the processor has matrix tiles, and the system lets this process use them.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  static const bool usable = has_avx512() && __builtin_cpu_supports("avx512bf16") &&
                             __builtin_cpu_supports("amx-tile") &&
                             __builtin_cpu_supports("amx-bf16") &&
                             syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return usable;
}
#endif

// PROLORA_ISA names one to use instead of the best, so that all can be tested on one machine.
const CpuIsa& chosen() {
#ifdef PROLORA_X86
  const char* name = std::getenv("PROLORA_ISA");
  auto wanted = [&](const CpuIsa& isa) { return !name || std::strcmp(name, isa.name) == 0; };
  if (wanted(avx512::isa) && has_avx512()) return avx512::isa;
  if (wanted(avx2::isa) && has_avx2()) return avx2::isa;
#endif
  return baseline::isa;
}

template <class T>
const CpuOps<T>& ops();
template <>
const CpuOps<float>& ops() {
  return chosen().single;
}
template <>
const CpuOps<double>& ops() {
  return chosen().twice;
}

}  // namespace

const char* cpu_isa() { return chosen().name; }

template <class T>
void split_project_cpu(const SplitProjectArgs<T>& args) {
  ops<T>().split_project(args);
}

template <class T>
void overlap_cpu(const OverlapArgs<T>& args) {
  ops<T>().overlap(args);
}

template <>
void overlap_table_cpu(const OverlapTableArgs<double>& args) {
  ops<double>().overlap_table(args);
}
template <>
void overlap_table_cpu(const OverlapTableArgs<float>& args) {
#ifdef PROLORA_AMX
  if (cpu_has_tiles()) return overlap_table_amx(args);
#endif
  ops<float>().overlap_table(args);
}

bool cpu_has_tiles() {
#ifdef PROLORA_AMX
  // PROLORA_ISA asks for instructions of its own.
  return std::getenv("PROLORA_ISA") == nullptr && has_amx();
#else
  return false;
#endif
}

template <class T>
Index overlap_tiles_cpu(Index ks, Index kt) {
  return ops<T>().overlap_tiles(ks, kt);
}

template <class T>
void small_svd_cpu(const SmallSvdArgs<T>& args) {
  ops<T>().small_svd(args);
}

template <class T>
void project_pair_cpu(const ProjectPairArgs<T>& args) {
  ops<T>().project_pair(args);
}

template <class T>
void panel_qr_cpu(const PanelQrArgs<T>& args) {
  ops<T>().panel_qr(args);
}

Index panel_qr_scratch(Index r) { return 3 * r * r + 2 * r; }

template void project_pair_cpu(const ProjectPairArgs<float>&);
template void project_pair_cpu(const ProjectPairArgs<double>&);
template void panel_qr_cpu(const PanelQrArgs<float>&);
template void panel_qr_cpu(const PanelQrArgs<double>&);
template void split_project_cpu(const SplitProjectArgs<float>&);
template void split_project_cpu(const SplitProjectArgs<double>&);
template void overlap_cpu(const OverlapArgs<float>&);
template void overlap_cpu(const OverlapArgs<double>&);
template Index overlap_tiles_cpu<float>(Index, Index);
template Index overlap_tiles_cpu<double>(Index, Index);
template void small_svd_cpu(const SmallSvdArgs<float>&);
template void small_svd_cpu(const SmallSvdArgs<double>&);

}  // namespace prolora
