// Kernels as they are for the CPU that this is compiled for: another one than the tests run on (tests/test_cpu_arm.py).
#include "cpu_attention.h"
