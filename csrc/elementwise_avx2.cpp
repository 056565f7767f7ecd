#if defined(__x86_64__)
#include "elementwise_blocks.h"

FASTPROMPT_ELEMENTWISE(avx2)
#endif
