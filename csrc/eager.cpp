// The ops of a decode step, called without torch.ops' parsing of arguments by their schema, which
// costs more than quantising a token. The call goes through the dispatcher like any other; what is
// not a plain tensor or number (a subclass, a symbolic size, a mode that wants to see the call) is
// left to torch.ops.
#include "eager.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <tuple>

namespace kvq {
namespace {

// Each reads one Python object, or says no.

bool read(PyObject* object, at::Tensor& out) {
  if (!THPVariable_CheckExact(object)) return false;
  out = THPVariable_Unpack(object);
  return true;
}

bool read(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read(PyObject* object, double& out) {
  if (!PyFloat_CheckExact(object)) return false;
  out = PyFloat_AS_DOUBLE(object);
  return true;
}

bool read(PyObject* object, bool& out) {
  out = object == Py_True;
  return PyBool_Check(object);
}

bool read(PyObject* object, c10::string_view& out) {
  if (!PyUnicode_CheckExact(object)) return false;
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &size);  // lives as long as the object
  if (data == nullptr) throw python_error();
  out = {data, static_cast<size_t>(size)};
  return true;
}

template <typename T>
bool read(PyObject* object, std::optional<T>& out) {
  if (object == Py_None) return true;
  return read(object, out.emplace());
}

PyObject* to_python(std::tuple<at::Tensor, at::Tensor> pair) {
  return PyTuple_Pack(2,
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<0>(pair))).ptr(),
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(std::get<1>(pair))).ptr());
}

template <typename Signature>
class Call;

template <typename Result, typename... Args>
class Call<Result(Args...)> {
 public:
  Call(const char* name, const char* overload)
      : op_(c10::Dispatcher::singleton()
                .findSchemaOrThrow(name, overload)
                .typed<Result(Args...)>()) {}

  /// The op's result, or NotImplemented where torch.ops has to parse the arguments.
  PyObject* operator()(PyObject* required, PyObject* options) const {
    std::tuple<std::remove_cvref_t<Args>...> args;
    const Py_ssize_t first = PyTuple_GET_SIZE(required);
    if (first + PyTuple_GET_SIZE(options) != sizeof...(Args)) Py_RETURN_NOTIMPLEMENTED;
    const auto item = [&](Py_ssize_t i) {
      return i < first ? PyTuple_GET_ITEM(required, i) : PyTuple_GET_ITEM(options, i - first);
    };
    Py_ssize_t i = 0;
    const bool plain =
        std::apply([&](auto&... arg) { return (read(item(i++), arg) && ...); }, args);
    if (!plain) Py_RETURN_NOTIMPLEMENTED;
    const auto call = [&] {
      py::gil_scoped_release no_gil;
      return std::apply([&](const auto&... arg) { return op_.call(arg...); }, args);
    };
    if constexpr (std::is_void_v<Result>) {
      call();
      Py_RETURN_NONE;
    } else {
      return to_python(call());
    }
  }

 private:
  c10::TypedOperatorHandle<Result(Args...)> op_;
};

using T = const at::Tensor&;
using Optional = const std::optional<at::Tensor>&;
using Text = c10::string_view;
using Pair = std::tuple<at::Tensor, at::Tensor>;

// The schemas of schema.cpp; Position is the tensor or the int of an overload.
template <typename Position>
using Update = void(T, T, Position);
template <typename Position>
using QuantizeInto = void(T, T, T, T, Position, Text, int64_t, Optional, Optional, Text, bool);
template <typename Position>
using Append = void(T, T, T, T, T, T, T, T, Position, Text, int64_t, Text, int64_t, Optional,
                    Optional, Optional, Optional, Text, Text, bool);
template <typename Position>
using Attention = Pair(T, T, T, T, T, T, T, Position, Text, int64_t, Text, int64_t, Optional,
                       Optional, Optional, Optional, Optional, Optional, Optional, Optional,
                       std::optional<double>, double, int64_t, bool, bool);

/// One op: the overload is chosen by what stands at Position.
template <template <typename> typename Signature, const char* Name, Py_ssize_t Position>
PyObject* call_op(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyTuple_Check(given[0]) && PyTuple_Check(given[1]), Name,
                   " takes two tuples");
  PyObject *required = given[0], *options = given[1];
  if (at::impl::torch_function_mode_enabled() || PyTuple_GET_SIZE(required) <= Position) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  static const Call<Signature<T>> at_tensor(Name, "");
  static const Call<Signature<int64_t>> at_int(Name, "int");
  const bool is_int = PyLong_CheckExact(PyTuple_GET_ITEM(required, Position));
  return is_int ? at_int(required, options) : at_tensor(required, options);
  END_HANDLE_TH_ERRORS
}

constexpr char kUpdate[] = "kvq::kv_cache_update_", kQuantizeInto[] = "kvq::quantize_into_",
               kAppend[] = "kvq::append_", kAttention[] = "kvq::attention";

template <template <typename> typename Signature, const char* Name, Py_ssize_t Position>
PyMethodDef method() {
  const auto function = call_op<Signature, Name, Position>;
  return {Name + sizeof("kvq::") - 1,
          reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
          "(required, options): the op's result, or NotImplemented."};
}

}  // namespace

PyMethodDef* eager_methods() {
  static PyMethodDef methods[] = {
      method<Update, kUpdate, 2>(),   method<QuantizeInto, kQuantizeInto, 4>(),
      method<Append, kAppend, 8>(),   method<Attention, kAttention, 7>(),
      {nullptr, nullptr, 0, nullptr},
  };
  return methods;
}

}  // namespace kvq
