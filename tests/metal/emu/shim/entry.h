// Entry points. The translation records the attribute and index of each kernel parameter; the types
// come from the kernel's own signature:
//   MSL_KERNEL(id, "host name", (function), max_threads, (uses...), MSL_PARAM(attribute, index,
//   "name", condition)...)
#pragma once
#pragma clang system_header
#include "builtins.h"

enum msl_attribute {
  msl_buffer,
  msl_threadgroup,
  msl_thread_position_in_grid,
  msl_thread_position_in_threadgroup,
  msl_threadgroup_position_in_grid,
  msl_threads_per_threadgroup,
  msl_dispatch_threads_per_threadgroup,
  msl_threadgroups_per_grid,
  msl_threads_per_grid,
  msl_grid_size,
  msl_grid_origin,
  msl_thread_index_in_threadgroup,
  msl_thread_index_in_simdgroup,
  msl_simdgroup_index_in_threadgroup,
  msl_simdgroups_per_threadgroup,
  msl_dispatch_simdgroups_per_threadgroup,
  msl_threads_per_simdgroup,
  msl_thread_execution_width,
  msl_thread_index_in_quadgroup,
  msl_quadgroup_index_in_threadgroup,
  msl_quadgroups_per_threadgroup
};
template <msl_attribute attribute, int index>
struct msl_spec {
  static constexpr bool is_argument = attribute == msl_buffer || attribute == msl_threadgroup;
  static constexpr bool is_vector_attribute =
      attribute >= msl_thread_position_in_grid && attribute <= msl_grid_origin;
  static_assert(attribute != msl_buffer || (index >= 0 && index <= 30),
                "buffer index is beyond 30");
  static_assert(attribute != msl_threadgroup || (index >= 0 && index <= 30),
                "threadgroup index is beyond 30");
};
template <class... S>
struct msl_specs {};
template <class P>
MSL_INLINE P msl_position(const uint* v) {
  static_assert(metal::is_unsigned_v<P> && sizeof(msl_element<P>) >= 2,
                "a position is an unsigned short or int");
  if constexpr (!msl_traits<P>::is_vector) {
    return (P)v[0];
  } else {
    P r = P(0);
    for (int i = 0; i < msl_traits<P>::size; ++i) r[i] = (msl_element<P>)v[i];
    return r;
  }
}

#if defined(MSL_EMU)
#include "../emu.h"
struct emu_kernel_entry {
  emu_kernel kernel;
  void (*run)(void* const* buffers, void* const* threadgroup);
  bool (*const* conditions)();  // per emu_param: is an optional buffer there under these function
                                // constants?
};
struct emu_constant_entry {
  emu_function_constant constant;
  void* value;
  bool* defined;
  bool is_optional;  // the source asks whether it is defined
};
extern "C" {
extern const emu_kernel_entry emu_kernel_table[];
extern const uint emu_kernel_count;
extern const emu_constant_entry emu_constant_table[];
extern const uint emu_constant_count;
}

MSL_INLINE uint msl_grid_value(msl_attribute attribute, int axis) {
  const emu_thread& t = *emu_current;
  const emu_dispatch& d = emu_now;
  switch (attribute) {
    case msl_thread_position_in_grid:
      return t.position_in_grid[axis];
    case msl_thread_position_in_threadgroup:
      return t.position_in_threadgroup[axis];
    case msl_threadgroup_position_in_grid:
      return t.threadgroup_position[axis];
    case msl_threads_per_threadgroup:
      return d.threads_per_threadgroup[axis];
    case msl_dispatch_threads_per_threadgroup:
      return d.nominal_threads_per_threadgroup[axis];
    case msl_threadgroups_per_grid:
      return d.threadgroups_per_grid[axis];
    case msl_threads_per_grid:
    case msl_grid_size:
      return d.threads_per_grid[axis];
    case msl_thread_index_in_threadgroup:
      return t.index_in_threadgroup;
    case msl_thread_index_in_simdgroup:
      return t.index_in_threadgroup & 31;
    case msl_simdgroup_index_in_threadgroup:
      return t.index_in_threadgroup / 32;
    case msl_simdgroups_per_threadgroup:
    case msl_dispatch_simdgroups_per_threadgroup:
      return d.simdgroups;
    case msl_threads_per_simdgroup:
    case msl_thread_execution_width:
      return 32;
    case msl_thread_index_in_quadgroup:
      return t.index_in_threadgroup & 3;
    case msl_quadgroup_index_in_threadgroup:
      return t.index_in_threadgroup / 4;
    case msl_quadgroups_per_threadgroup:
      return d.simdgroups * 8;
    default:
      return 0;
  }
}
template <class S, class P>
struct msl_argument;
template <msl_attribute A, int I, class P>
struct msl_argument<msl_spec<A, I>, P> {
  MSL_INLINE P get(void* const*, void* const*) {
    const uint v[3] = {msl_grid_value(A, 0), msl_grid_value(A, 1), msl_grid_value(A, 2)};
    return msl_position<P>(v);
  }
};
template <msl_attribute A, int I, class P>
struct msl_argument<msl_spec<A, I>, P*> {
  MSL_INLINE P* get(void* const* buffers, void* const* memory) {
    return (P*)(ulong)(A == msl_buffer ? buffers : memory)[I];
  }
};
template <msl_attribute A, int I, class P>
struct msl_argument<msl_spec<A, I>, P&> {
  MSL_INLINE P& get(void* const* buffers, void* const* memory) {
    return *msl_argument<msl_spec<A, I>, P*>::get(buffers, memory);
  }
};
template <class... P, class... S>
MSL_INLINE void msl_call(void (*kernel)(P...), msl_specs<S...>, void* const* buffers,
                         void* const* memory) {
  kernel(msl_argument<S, P>::get(buffers, memory)...);
}

template <class T>
constexpr uint msl_size_of = sizeof(T);
template <class T>
constexpr uint msl_align_of = alignof(T);
template <>
constexpr uint msl_size_of<void> = 0;
template <>
constexpr uint msl_align_of<void> = 1;
template <class S>
struct msl_describe_param;
template <msl_attribute A, int I>
struct msl_describe_param<msl_spec<A, I>> {
  template <class P>
  static constexpr emu_param of(const char* name, bool optional) {
    typedef metal::remove_pointer_t<metal::remove_reference_t<metal::remove_cv_t<P>>>
        E;  // with its address space
    typedef metal::msl_plain<E> T;
    constexpr bool is_constant = __is_same(const E, MSL_constant T) ||
                                 __is_same(E, MSL_constant T) ||
                                 __is_same(E, volatile MSL_constant T);
    return emu_param{name,
                     A == msl_buffer ? EMU_PARAM_BUFFER : EMU_PARAM_THREADGROUP,
                     (uint)I,
                     msl_size_of<T>,
                     msl_align_of<T>,
                     is_constant,
                     is_constant || __is_const(E),
                     __is_reference(P),
                     optional};
  }
};
template <int N>
struct msl_params {
  emu_param param[N ? N : 1];
  bool (*condition[N ? N : 1])();
  uint count;
};
struct msl_named {
  const char* name;
  bool (*condition)();
};
template <class... P, class... S>
constexpr msl_params<sizeof...(P)> msl_describe(void (*)(P...), msl_specs<S...>,
                                                const msl_named* named) {
  msl_params<sizeof...(P)> r{};
  int i = 0;
  ((S::is_argument ? void((r.param[r.count] = msl_describe_param<S>::template of<P>(
                               named[i].name, named[i].condition != nullptr),
                           r.condition[r.count] = named[i].condition, ++r.count))
                   : void(),
    ++i),
   ...);
  return r;
}
#define MSL_KERNEL(id, function, specs, ...)                                          \
  static const msl_named msl_named_##id[] = {__VA_ARGS__};                            \
  static const auto msl_params_##id =                                                 \
      msl_describe(MSL_STRIP function, msl_specs<MSL_STRIP specs>(), msl_named_##id); \
  static void msl_run_##id(void* const* buffers, void* const* memory) {               \
    msl_call(MSL_STRIP function, msl_specs<MSL_STRIP specs>(), buffers, memory);      \
  }

#elif defined(__NVPTX__)
MSL_INLINE uint msl_grid_value(msl_attribute attribute, int axis) {
  const uint t[3] = {__nvvm_read_ptx_sreg_tid_x(), __nvvm_read_ptx_sreg_tid_y(),
                     __nvvm_read_ptx_sreg_tid_z()};
  const uint b[3] = {__nvvm_read_ptx_sreg_ctaid_x(), __nvvm_read_ptx_sreg_ctaid_y(),
                     __nvvm_read_ptx_sreg_ctaid_z()};
  const uint n[3] = {__nvvm_read_ptx_sreg_ntid_x(), __nvvm_read_ptx_sreg_ntid_y(),
                     __nvvm_read_ptx_sreg_ntid_z()};
  const uint g[3] = {__nvvm_read_ptx_sreg_nctaid_x(), __nvvm_read_ptx_sreg_nctaid_y(),
                     __nvvm_read_ptx_sreg_nctaid_z()};
  const uint index = t[0] + n[0] * (t[1] + n[1] * t[2]),
             simdgroups = (n[0] * n[1] * n[2] + 31) / 32;
  switch (attribute) {
    case msl_thread_position_in_grid:
      return b[axis] * n[axis] + t[axis];
    case msl_thread_position_in_threadgroup:
      return t[axis];
    case msl_threadgroup_position_in_grid:
      return b[axis];
    case msl_threads_per_threadgroup:
    case msl_dispatch_threads_per_threadgroup:
      return n[axis];
    case msl_threadgroups_per_grid:
      return g[axis];
    case msl_threads_per_grid:
    case msl_grid_size:
      return n[axis] * g[axis];
    case msl_thread_index_in_threadgroup:
      return index;
    case msl_thread_index_in_simdgroup:
      return index & 31;
    case msl_simdgroup_index_in_threadgroup:
      return index / 32;
    case msl_simdgroups_per_threadgroup:
    case msl_dispatch_simdgroups_per_threadgroup:
      return simdgroups;
    case msl_threads_per_simdgroup:
    case msl_thread_execution_width:
      return 32;
    case msl_thread_index_in_quadgroup:
      return index & 3;
    case msl_quadgroup_index_in_threadgroup:
      return index / 4;
    case msl_quadgroups_per_threadgroup:
      return simdgroups * 8;
    default:
      return 0;
  }
}
// Threadgroup arguments are byte offsets into the dynamic shared memory.
extern "C" __attribute__((address_space(3), aligned(16))) char msl_shared[];
template <class S, class P>
struct msl_argument;
template <msl_attribute A, int I, class P>
struct msl_argument<msl_spec<A, I>, P> {
  MSL_INLINE P get(MSL_device void* const*, const uint*) {
    const uint v[3] = {msl_grid_value(A, 0), msl_grid_value(A, 1), msl_grid_value(A, 2)};
    return msl_position<P>(v);
  }
};
template <int I, class P>
struct msl_argument<msl_spec<msl_buffer, I>, P*> {
  MSL_INLINE P* get(MSL_device void* const* buffers, const uint*) { return (P*)buffers[I]; }
};
template <int I, class P>
struct msl_argument<msl_spec<msl_buffer, I>, P&> {
  MSL_INLINE P& get(MSL_device void* const* buffers, const uint*) { return *(P*)buffers[I]; }
};
template <int I, class P>
struct msl_argument<msl_spec<msl_threadgroup, I>, P*> {
  MSL_INLINE P* get(MSL_device void* const*, const uint* offsets) {
    return (P*)(msl_shared + offsets[I]);
  }
};
template <int I, class P>
struct msl_argument<msl_spec<msl_threadgroup, I>, P&> {
  MSL_INLINE P& get(MSL_device void* const*, const uint* offsets) {
    return *(P*)(msl_shared + offsets[I]);
  }
};
template <class... P, class... S>
MSL_INLINE void msl_call(void (*kernel)(P...), msl_specs<S...>, MSL_device void* const* buffers,
                         const uint* offsets) {
  kernel(msl_argument<S, P>::get(buffers, offsets)...);
}
#define MSL_PTX_KERNEL(id, function, specs, parameters, buffers, offsets)                 \
  extern "C" __attribute__((nvptx_kernel)) void msl_entry_##id parameters __asm__(#id);   \
  extern "C" __attribute__((nvptx_kernel)) void msl_entry_##id parameters {               \
    MSL_device void* const msl_buffers[] = {MSL_STRIP buffers};                           \
    const uint msl_offsets[] = {MSL_STRIP offsets};                                       \
    msl_call(MSL_STRIP function, msl_specs<MSL_STRIP specs>(), msl_buffers, msl_offsets); \
  }

#else
template <class S, class P>
struct msl_check_param {
  static_assert(!S::is_argument, "only a pointer or a reference is bound by index");
  static_assert(metal::is_unsigned_v<P> && sizeof(msl_element<P>) <= 4 &&
                    sizeof(msl_element<P>) >= 2,
                "a position is an unsigned short or int");
  static_assert(S::is_vector_attribute || !msl_traits<P>::is_vector, "an index is a scalar");
};
template <class S, class P>
struct msl_check_param<S, P*> {
  static_assert(S::is_argument, "a position is no pointer");
};
template <class S, class P>
struct msl_check_param<S, P&> : msl_check_param<S, P*> {};
template <class... P, class... S>
void msl_check(void (*)(P...), msl_specs<S...>) {
  (void(sizeof(msl_check_param<S, P>)), ...);
}
#define MSL_STRICT_KERNEL(id, function, specs) \
  void msl_check_##id() { msl_check(MSL_STRIP function, msl_specs<MSL_STRIP specs>()); }
#endif
