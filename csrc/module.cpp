// The import hook: loading torch_kvq._C registers everything.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
