#include "gguf.h"

#include "instantiate.h"

KVQ_CODEC("q8_0", Q8_0, KVQ_FAMILY_Q8_0, 8, 32)
KVQ_CODEC("q4_0", Q4_0, KVQ_FAMILY_Q4_0, 4, 32)
