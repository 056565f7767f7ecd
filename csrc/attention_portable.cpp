// For any CPU: what the other variants are tested against.
#include "attention_blocks.h"

FASTPROMPT_ATTENTION(portable)
