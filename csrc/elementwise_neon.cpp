#if defined(__aarch64__)
#include "elementwise_blocks.h"

FASTPROMPT_ELEMENTWISE(neon)
#endif
