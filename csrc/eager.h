// Short calls of ops from Python: see eager.cpp.
#pragma once

#include <Python.h>

namespace kvq {

/// Methods NAME(required, options) of torch_kvq._C, ended by a null entry.
PyMethodDef* eager_methods();

}  // namespace kvq
