#if defined(__x86_64__)
#include "attention_blocks.h"

FASTPROMPT_ATTENTION(avx512)
#endif
