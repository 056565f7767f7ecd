// For any CPU: what the other variants are tested against.
#include "elementwise_blocks.h"

FASTPROMPT_ELEMENTWISE(portable)
