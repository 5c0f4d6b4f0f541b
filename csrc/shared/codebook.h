// The tables of codebooks.h by the number of bits of a code. Compiled by C++ and by Metal; static,
// as the CPU kernels are compiled once per instruction set.
#pragma once

#include "codebooks.h"

#ifdef __METAL_VERSION__
#define KVQ_TABLE constant
#else
#define KVQ_TABLE const
#endif

/// The 2^bits centroids, rising.
static inline KVQ_TABLE float* kvq_codebook(int bits) {
  switch (bits) {
    case 2:
      return kvq_codebook_2;
    case 3:
      return kvq_codebook_3;
    case 4:
      return kvq_codebook_4;
    case 5:
      return kvq_codebook_5;
    case 6:
      return kvq_codebook_6;
    default:
      return kvq_codebook_8;
  }
}

/// The 2^bits - 1 midpoints between them.
static inline KVQ_TABLE float* kvq_boundaries(int bits) {
  switch (bits) {
    case 2:
      return kvq_boundaries_2;
    case 3:
      return kvq_boundaries_3;
    case 4:
      return kvq_boundaries_4;
    case 5:
      return kvq_boundaries_5;
    case 6:
      return kvq_boundaries_6;
    default:
      return kvq_boundaries_8;
  }
}

/// The polynomial that finds a value's boundaries (codebooks.RANKS).
static inline KVQ_TABLE float* kvq_rank(int bits) {
  switch (bits) {
    case 2:
      return kvq_rank_2;
    case 3:
      return kvq_rank_3;
    case 4:
      return kvq_rank_4;
    case 5:
      return kvq_rank_5;
    case 6:
      return kvq_rank_6;
    default:
      return kvq_rank_8;
  }
}
