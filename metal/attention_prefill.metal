// Source of the prefill kernels. It instantiates none; the host appends the one that a call needs
// (csrc/mps/attention_library.h).
#include "attention_prefill.h"
