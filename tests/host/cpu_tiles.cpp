#define DIFFMAS_DOTS
#define DIFFMAS_TILES
#include "cpu_attention.h"
