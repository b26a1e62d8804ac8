// Which form of the kernels runs.
#pragma once

namespace diffmas::cpu {

// Its name: amx, avx512_bf16, avx512, avx2, arm_bf16 or generic. Throws where DIFFMAS_CPU_ISA names one that is not to be had.
const char* form();

}  // namespace diffmas::cpu
