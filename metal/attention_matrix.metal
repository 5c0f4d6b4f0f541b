// Source of the matrix kernel of few queries. It instantiates none, like attention_decode.metal.
#include "attention_matrix.h"
