#if defined(__x86_64__)
#include "attention_blocks.h"

FASTPROMPT_ATTENTION(avx2)
#endif
