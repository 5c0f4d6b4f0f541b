#include "append.h"

template [[host_name("kvq_append_float")]] [[kernel]] decltype(kvq_append<float>) kvq_append<float>;
template [[host_name("kvq_append_half")]] [[kernel]] decltype(kvq_append<half>) kvq_append<half>;
template [[host_name("kvq_append_bfloat")]] [[kernel]]
decltype(kvq_append<bfloat>) kvq_append<bfloat>;
