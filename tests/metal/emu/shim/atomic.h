// <metal_atomic>. Threads of the emulator are fibers of one thread: an atomic operation is a plain
// read and a plain write, both reported to the race detector as atomic.
#pragma once
#pragma clang system_header
#include "sync.h"

namespace metal {

enum memory_order {
  memory_order_relaxed,
#ifndef MSL_STRICT  // Metal 3.2 and later
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
#endif
};
template <class T>
struct atomic {
  typedef T value_type;
#ifdef MSL_STRICT
  static_assert(sizeof(T) == 4, "the subset has atomics of 32 bits only");
#else
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || is_same_v<T, bool>,
                "atomics are of 32 or 64 bits");
#endif
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#ifndef MSL_STRICT
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
typedef atomic<long> atomic_long;
#endif

template <class P>
using msl_atomic_value = typename msl_plain<P>::value_type;

#ifdef MSL_EMU
}
extern "C" {
ulong emu_atomic_read(const volatile void* address, uint size);
void emu_atomic_write(volatile void* address, uint size, ulong value);
}
namespace metal {
template <int N>
struct msl_word;
template <>
struct msl_word<1> {
  typedef uchar type;
};
template <>
struct msl_word<4> {
  typedef uint type;
};
template <>
struct msl_word<8> {
  typedef ulong type;
};
template <class P>
MSL_INLINE msl_atomic_value<P> msl_atomic_read(P* p) {
  typedef msl_atomic_value<P> V;
  typedef typename msl_word<sizeof(V)>::type W;
  return __builtin_bit_cast(V, (W)emu_atomic_read((const volatile void*)(ulong)p, sizeof(V)));
}
template <class P>
MSL_INLINE void msl_atomic_write(P* p, msl_atomic_value<P> x) {
  typedef typename msl_word<sizeof(x)>::type W;
  emu_atomic_write((volatile void*)(ulong)p, sizeof x, __builtin_bit_cast(W, x));
}
template <class P, class F>
MSL_INLINE msl_atomic_value<P> msl_atomic_update(P* p, F f) {
  msl_atomic_value<P> old = msl_atomic_read(p);
  msl_atomic_write(p, f(old));
  return old;
}
template <class P>
MSL_INLINE bool msl_atomic_exchange_if(P* p, msl_atomic_value<P>& expected,
                                       msl_atomic_value<P> desired) {
  msl_atomic_value<P> old = msl_atomic_read(p);
  const bool equal = __builtin_memcmp(&old, &expected, sizeof old) == 0;
  if (equal) msl_atomic_write(p, desired);
  expected = old;
  return equal;
}
#else
// Words of the atomic's own address space.
template <class P>
struct msl_atomic_word {
  typedef uint type;
};
#define MSL_ATOMIC_WORD(space)               \
  template <class T>                         \
  struct msl_atomic_word<space T> {          \
    typedef space uint type;                 \
  };                                         \
  template <class T>                         \
  struct msl_atomic_word<volatile space T> { \
    typedef space uint type;                 \
  };
MSL_OTHER_SPACES(MSL_ATOMIC_WORD)
template <class P>
MSL_INLINE auto* msl_atomic_words(P* p) {
  return (typename msl_atomic_word<remove_const_t<P> >::type*)p;
}
template <class P>
MSL_INLINE msl_atomic_value<P> msl_atomic_read(P* p) {
  return __builtin_bit_cast(msl_atomic_value<P>,
                            (uint)__atomic_load_n(msl_atomic_words(p), __ATOMIC_RELAXED));
}
template <class P>
MSL_INLINE void msl_atomic_write(P* p, msl_atomic_value<P> x) {
  __atomic_store_n(msl_atomic_words(p), __builtin_bit_cast(uint, x), __ATOMIC_RELAXED);
}
template <class P>
MSL_INLINE bool msl_atomic_exchange_if(P* p, msl_atomic_value<P>& expected,
                                       msl_atomic_value<P> desired) {
  uint old = __builtin_bit_cast(uint, expected);
  const bool equal =
      __atomic_compare_exchange_n(msl_atomic_words(p), &old, __builtin_bit_cast(uint, desired),
                                  true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  expected = __builtin_bit_cast(msl_atomic_value<P>, old);
  return equal;
}
template <class P, class F>
MSL_INLINE msl_atomic_value<P> msl_atomic_update(P* p, F f) {
  msl_atomic_value<P> old = msl_atomic_read(p);
  while (!msl_atomic_exchange_if(p, old, f(old))) {
  }
  return old;
}
#endif

#define MSL_ATOMIC_FETCH(name, expression)                                     \
  template <class P, class T>                                                  \
  MSL_INLINE auto atomic_fetch_##name##_explicit(P* p, T x, memory_order) {    \
    typedef msl_atomic_value<P> V;                                             \
    const V operand = (V)x;                                                    \
    return msl_atomic_update(p, [operand](V old) { return (V)(expression); }); \
  }
MSL_ATOMIC_FETCH(add, old + operand)
MSL_ATOMIC_FETCH(sub, old - operand)
MSL_ATOMIC_FETCH(and, old& operand)
MSL_ATOMIC_FETCH(or, old | operand)
MSL_ATOMIC_FETCH(xor, old ^ operand)
MSL_ATOMIC_FETCH(min, min(old, operand))
MSL_ATOMIC_FETCH(max, max(old, operand))
template <class P, class T>
MSL_INLINE void atomic_min_explicit(P* p, T x, memory_order order) {
  atomic_fetch_min_explicit(p, x, order);
}
template <class P, class T>
MSL_INLINE void atomic_max_explicit(P* p, T x, memory_order order) {
  atomic_fetch_max_explicit(p, x, order);
}
template <class P, class T>
MSL_INLINE auto atomic_exchange_explicit(P* p, T x, memory_order) {
  typedef msl_atomic_value<P> V;
  const V desired = (V)x;
  return msl_atomic_update(p, [desired](V) { return desired; });
}
template <class P>
MSL_INLINE auto atomic_load_explicit(P* p, memory_order) {
  return msl_atomic_read(p);
}
template <class P, class T>
MSL_INLINE void atomic_store_explicit(P* p, T x, memory_order) {
  msl_atomic_write(p, (msl_atomic_value<P>)x);
}
template <class P, class E, class T>
MSL_INLINE bool atomic_compare_exchange_weak_explicit(P* p, E* expected, T desired, memory_order,
                                                      memory_order) {
  msl_atomic_value<P> old = (msl_atomic_value<P>)*expected;
  const bool equal = msl_atomic_exchange_if(p, old, (msl_atomic_value<P>)desired);
  *expected = (E)old;
  return equal;
}
#ifndef MSL_STRICT
MSL_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}
#endif

}  // namespace metal
