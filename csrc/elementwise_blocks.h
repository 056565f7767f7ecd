// The elementwise operations for every instruction set: each elementwise_<isa>.cpp includes this
// file, so that all of it is compiled with that file's flags (see decode_blocks.h).
#pragma once

#include "activations_blocks.h"
#include "norms_blocks.h"
#include "rotation_blocks.h"

#define FASTPROMPT_ELEMENTWISE(isa) \
  const fastprompt::Elementwise fastprompt::elementwise_##isa{ \
      fastprompt::norm, fastprompt::norm_backward, fastprompt::activate, fastprompt::rotate};
