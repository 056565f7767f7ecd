#if defined(__aarch64__)
#include "select_blocks.h"

FASTPROMPT_SELECTION(neon)
#endif
