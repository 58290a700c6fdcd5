// The CPU ops of one instruction set. cpu.cpp is compiled once for each, with PROLORA_ISA as the
// name of the namespace; cpu_dispatch.cpp chooses.
#pragma once

#include "ops.h"

namespace prolora {

template <class T>
struct CpuOps {
  void (*split_project)(const SplitProjectArgs<T>&);
  void (*overlap)(const OverlapArgs<T>&);
  Index (*overlap_tiles)(Index ks, Index kt);
  void (*overlap_table)(const OverlapTableArgs<T>&);
  void (*project_pair)(const ProjectPairArgs<T>&);
  void (*panel_qr)(const PanelQrArgs<T>&);
  void (*small_svd)(const SmallSvdArgs<T>&);
};

struct CpuIsa {
  const char* name;
  CpuOps<float> single;
  CpuOps<double> twice;
};

namespace baseline {
extern const CpuIsa isa;
}
namespace avx2 {
extern const CpuIsa isa;
}
namespace avx512 {
extern const CpuIsa isa;
}

}  // namespace prolora
