#include "dense.h"

#include "instantiate.h"

KVQ_CODEC("none", Dense, KVQ_FAMILY_NONE, 0, 0)
