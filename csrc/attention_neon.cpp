#if defined(__aarch64__)
#include "attention_blocks.h"

FASTPROMPT_ATTENTION(neon)
#endif
