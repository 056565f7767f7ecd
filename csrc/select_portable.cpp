// For any CPU: what the other variants are tested against.
#include "select_blocks.h"

FASTPROMPT_SELECTION(portable)
