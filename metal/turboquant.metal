#include "turboquant.h"

#include "instantiate.h"

KVQ_CODEC("tq2", TurboQuant, KVQ_FAMILY_TURBOQUANT, 2, 0)
KVQ_CODEC("tq3", TurboQuant, KVQ_FAMILY_TURBOQUANT, 3, 0)
KVQ_CODEC("tq4", TurboQuant, KVQ_FAMILY_TURBOQUANT, 4, 0)
KVQ_CODEC("tq5", TurboQuant, KVQ_FAMILY_TURBOQUANT, 5, 0)
KVQ_CODEC("tq6", TurboQuant, KVQ_FAMILY_TURBOQUANT, 6, 0)
KVQ_CODEC("tq8", TurboQuant, KVQ_FAMILY_TURBOQUANT, 8, 0)
