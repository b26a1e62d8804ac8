#define DIFFMAS_DOTS
#include "cpu_attention.h"
