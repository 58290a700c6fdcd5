// overlap_table with the matrix tiles (AMX) of recent server processors.
#pragma once

#include "ops.h"

namespace prolora {

// As the other CPU ops of cpu.h.
void overlap_table_amx(const OverlapTableArgs<float>& args);

}  // namespace prolora
