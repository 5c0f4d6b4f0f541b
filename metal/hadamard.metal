#include "hadamard.h"

template [[host_name("kvq_hadamard_float")]] [[kernel]]
decltype(kvq_hadamard<float>) kvq_hadamard<float>;
template [[host_name("kvq_hadamard_half")]] [[kernel]]
decltype(kvq_hadamard<half>) kvq_hadamard<half>;
template [[host_name("kvq_hadamard_bfloat")]] [[kernel]]
decltype(kvq_hadamard<bfloat>) kvq_hadamard<bfloat>;
