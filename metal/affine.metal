#include "affine.h"

#include "instantiate.h"

KVQ_CODEC("int8_g32", Affine, KVQ_FAMILY_AFFINE, 8, 32)
KVQ_CODEC("int8_g64", Affine, KVQ_FAMILY_AFFINE, 8, 64)
KVQ_CODEC("int8_g128", Affine, KVQ_FAMILY_AFFINE, 8, 128)
KVQ_CODEC("int4_g32", Affine, KVQ_FAMILY_AFFINE, 4, 32)
KVQ_CODEC("int4_g64", Affine, KVQ_FAMILY_AFFINE, 4, 64)
KVQ_CODEC("int4_g128", Affine, KVQ_FAMILY_AFFINE, 4, 128)
KVQ_CODEC("int2_g32", Affine, KVQ_FAMILY_AFFINE, 2, 32)
KVQ_CODEC("int2_g64", Affine, KVQ_FAMILY_AFFINE, 2, 64)
KVQ_CODEC("int2_g128", Affine, KVQ_FAMILY_AFFINE, 2, 128)
