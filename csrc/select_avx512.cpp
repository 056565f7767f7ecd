#if defined(__x86_64__)
#include "select_blocks.h"

FASTPROMPT_SELECTION(avx512)
#endif
