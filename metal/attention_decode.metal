// Source of the decode kernels. It instantiates none: K and V formats, dtypes and head sizes make
// too many. The host appends the one that a call needs (csrc/mps/attention_library.h).
#include "attention_decode.h"
