// Barriers, <metal_simdgroup>, <metal_quadgroup>.
#pragma once
#pragma clang system_header
#include "integer.h"

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags((uint)a | (uint)b);
}
MSL_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return mem_flags((uint)a & (uint)b);
}
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
  thread_scope_system
};
#if defined(__NVPTX__)
MSL_INLINE void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_INLINE void simdgroup_barrier(mem_flags) { __nvvm_bar_warp_sync(0xffffffffu); }
MSL_INLINE void threadgroup_barrier(mem_flags, thread_scope) { __syncthreads(); }
#elif defined(MSL_STRICT)
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
void threadgroup_barrier(mem_flags, thread_scope);
#else
MSL_INLINE void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  emu_threadgroup_barrier((uint)flags, MSL_MAKE_SITE);
}
MSL_INLINE void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  emu_simdgroup_barrier((uint)flags, MSL_MAKE_SITE);
}
MSL_INLINE void threadgroup_barrier(mem_flags flags, thread_scope, MSL_SITE) {
  emu_threadgroup_barrier((uint)flags, MSL_MAKE_SITE);
}
#endif

// ---- what each back end supplies: msl_lane, msl_active, msl_shuffle (the value of another lane),
// msl_reduce (an xor tree over a full simdgroup), msl_scan, msl_vote
#if defined(__NVPTX__)
MSL_INLINE uint msl_lane() { return __nvvm_read_ptx_sreg_laneid(); }
template <int N>
struct msl_words {
  int word[N];
};
template <class T>
MSL_INLINE T msl_shuffle(const char*, T x, uint lane, uint) {
  if constexpr (sizeof(T) == 1) {
    return __builtin_bit_cast(
        T, (uchar)__nvvm_shfl_sync_idx_i32(-1u, __builtin_bit_cast(uchar, x), lane, 31));
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(
        T, (ushort)__nvvm_shfl_sync_idx_i32(-1u, __builtin_bit_cast(ushort, x), lane, 31));
  } else {
    auto w = __builtin_bit_cast(msl_words<sizeof(T) / 4>, x);
    for (uint i = 0; i < sizeof(T) / 4; ++i)
      w.word[i] = __nvvm_shfl_sync_idx_i32(-1u, w.word[i], lane, 31);
    return __builtin_bit_cast(T, w);
  }
}
template <class T, class F>
MSL_INLINE T msl_reduce(const char* name, T x, F f, uint line) {
  for (uint m = 16; m; m >>= 1) x = f(x, msl_shuffle(name, x, msl_lane() ^ m, line));
  return x;
}
template <bool inclusive, class T, class F>
MSL_INLINE T msl_scan(const char* name, T x, T zero, F f, uint line) {
  const uint lane = msl_lane();
  for (uint m = 1; m < 32; m <<= 1) {
    T y = msl_shuffle(name, x, (lane - m) & 31, line);
    if (lane >= m) x = f(y, x);
  }
  if constexpr (inclusive) return x;
  T y = msl_shuffle(name, x, (lane - 1) & 31, line);
  return lane ? y : zero;
}
MSL_INLINE uint msl_vote(const char*, bool x, uint) { return __nvvm_vote_ballot_sync(-1u, x); }
MSL_INLINE uint msl_active(const char*, uint) { return -1u; }
#elif defined(MSL_STRICT)
uint msl_lane();
template <class T>
T msl_shuffle(const char*, T x, uint lane, uint);
template <class T, class F>
T msl_reduce(const char*, T x, F, uint);
template <bool inclusive, class T, class F>
T msl_scan(const char*, T x, T zero, F, uint);
uint msl_vote(const char*, bool, uint);
uint msl_active(const char*, uint);
#else
MSL_INLINE uint msl_lane() { return emu_current->index_in_threadgroup & 31; }
template <class T>
struct alignas(64) msl_slot {
  T value;
};
template <class T>
MSL_INLINE T msl_undefined() {
  T r;
  __builtin_memset((void*)&r, 0xff, sizeof r);
  return r;
}
template <class T>
MSL_INLINE T msl_shuffle(const char* name, T x, uint lane, MSL_SITE) {
  static_assert(sizeof(T) <= 64, "simdgroup functions take at most 64 bytes here");
  uint active;
  auto* slots =
      (const msl_slot<T>*)emu_simd_exchange(name, MSL_MAKE_SITE, &x, sizeof x, nullptr, &active);
  return active >> (lane & 31) & 1 ? slots[lane & 31].value : msl_undefined<T>();
}
template <class T, class F>
MSL_INLINE T msl_reduce(const char* name, T x, F, MSL_SITE) {
  uint mask;
  return *(const T*)emu_simd_exchange(
      name, MSL_MAKE_SITE, &x, sizeof x,
      [](char* memory, uint active, void* result) {
        auto* slots = (const msl_slot<T>*)memory;
        F f{};
        T t[32];
        int n = 0;
        for (int i = 0; i < 32; ++i)
          if (active >> i & 1) t[n++] = slots[i].value;
        if (n == 32)
          for (int half_size = 16; half_size; half_size >>= 1)
            for (int i = 0; i < half_size; ++i) t[i] = f(t[i], t[i + half_size]);
        else
          for (int i = 1; i < n; ++i) t[0] = f(t[0], t[i]);
        __builtin_memcpy(result, (const void*)t, sizeof(T));
      },
      &mask);
}
template <bool inclusive, class T, class F>
MSL_INLINE T msl_scan(const char* name, T x, T zero, F f, MSL_SITE) {
  uint active;
  auto* slots =
      (const msl_slot<T>*)emu_simd_exchange(name, MSL_MAKE_SITE, &x, sizeof x, nullptr, &active);
  T r = zero;
  for (uint i = 0; i < msl_lane(); ++i)
    if (active >> i & 1) r = f(r, slots[i].value);
  return inclusive ? f(r, x) : r;
}
MSL_INLINE uint msl_vote(const char* name, bool x, MSL_SITE) {
  uint mask;
  return *(const uint*)emu_simd_exchange(
      name, MSL_MAKE_SITE, &x, 1,
      [](char* memory, uint active, void* result) {
        uint votes = 0;
        for (int i = 0; i < 32; ++i)
          if ((active >> i & 1) && memory[64 * i]) votes |= 1u << i;
        *(uint*)result = votes;
      },
      &mask);
}
MSL_INLINE uint msl_active(const char* name, MSL_SITE) {
  uint mask;
  char none = 0;
  emu_simd_exchange(name, MSL_MAKE_SITE, &none, 1, nullptr, &mask);
  return mask;
}
#endif

// ---- operators of reductions
template <class T>
using msl_word_of =
    conditional_t<sizeof(T) == 2, ushort, conditional_t<sizeof(T) == 4, uint, ulong>>;
struct msl_add {
  template <class T>
  T operator()(T a, T b) const {
    return T(a + b);
  }
};
struct msl_multiply {
  template <class T>
  T operator()(T a, T b) const {
    return T(a * b);
  }
};
struct msl_maximum {
  template <class T>
  T operator()(T a, T b) const {
    return max(a, b);
  }
};
struct msl_minimum {
  template <class T>
  T operator()(T a, T b) const {
    return min(a, b);
  }
};
struct msl_and {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_floating_point_v<T>)  // sources instantiate these for floats with the rest
      return __builtin_bit_cast(
          T, __builtin_bit_cast(msl_word_of<T>, a) & __builtin_bit_cast(msl_word_of<T>, b));
    else
      return T(a & b);
  }
};
struct msl_or {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_floating_point_v<T>)  // sources instantiate these for floats with the rest
      return __builtin_bit_cast(
          T, __builtin_bit_cast(msl_word_of<T>, a) | __builtin_bit_cast(msl_word_of<T>, b));
    else
      return T(a | b);
  }
};
struct msl_xor {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_floating_point_v<T>)  // sources instantiate these for floats with the rest
      return __builtin_bit_cast(
          T, __builtin_bit_cast(msl_word_of<T>, a) ^ __builtin_bit_cast(msl_word_of<T>, b));
    else
      return T(a ^ b);
  }
};

// ---- simdgroup functions
#define MSL_SHUFFLE(name, source)                        \
  template <class T>                                     \
  MSL_INLINE T name(T x, ushort i, MSL_SITE) {           \
    const uint lane = msl_lane();                        \
    return msl_shuffle(#name, x, source, MSL_PASS_SITE); \
  }
// The lanes at the end keep their own value.
#define MSL_SHUFFLE_KEEP(name, source, keep)            \
  template <class T>                                    \
  MSL_INLINE T name(T x, ushort i, MSL_SITE) {          \
    const uint lane = msl_lane();                       \
    T y = msl_shuffle(#name, x, source, MSL_PASS_SITE); \
    return keep ? x : y;                                \
  }
#define MSL_REDUCE(name, F)                          \
  template <class T>                                 \
  MSL_INLINE T name(T x, MSL_SITE) {                 \
    return msl_reduce(#name, x, F{}, MSL_PASS_SITE); \
  }
#define MSL_SCAN(name, inclusive, F, zero)                             \
  template <class T>                                                   \
  MSL_INLINE T name(T x, MSL_SITE) {                                   \
    return msl_scan<inclusive>(#name, x, T(zero), F{}, MSL_PASS_SITE); \
  }

MSL_SHUFFLE(simd_shuffle, (void(lane), i))
MSL_SHUFFLE(simd_broadcast, (void(lane), i))
MSL_SHUFFLE(simd_shuffle_xor, lane ^ i)
MSL_SHUFFLE(simd_shuffle_rotate_down, (lane + i) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (lane - i) & 31)
MSL_SHUFFLE_KEEP(simd_shuffle_down, (lane + i) & 31, lane + i > 31)
MSL_SHUFFLE_KEEP(simd_shuffle_up, (lane - i) & 31, lane < i)
template <class T>
MSL_INLINE T simd_shuffle_and_fill_down(T x, T fill, ushort delta, ushort modulo = 32, MSL_SITE) {
  const uint low = msl_lane() & (modulo - 1u), base = msl_lane() - low,
             from = base + ((low + delta) & (modulo - 1u));
  T a = msl_shuffle("simd_shuffle_and_fill_down", x, from, MSL_PASS_SITE);
  T b = msl_shuffle("simd_shuffle_and_fill_down", fill, from, MSL_PASS_SITE);
  return low + delta >= modulo ? b : a;
}
template <class T>
MSL_INLINE T simd_shuffle_and_fill_up(T x, T fill, ushort delta, ushort modulo = 32, MSL_SITE) {
  const uint low = msl_lane() & (modulo - 1u), base = msl_lane() - low,
             from = base + ((low - delta) & (modulo - 1u));
  T a = msl_shuffle("simd_shuffle_and_fill_up", x, from, MSL_PASS_SITE);
  T b = msl_shuffle("simd_shuffle_and_fill_up", fill, from, MSL_PASS_SITE);
  return low < delta ? b : a;
}
MSL_REDUCE(simd_sum, msl_add)
MSL_REDUCE(simd_product, msl_multiply)
MSL_REDUCE(simd_max, msl_maximum)
MSL_REDUCE(simd_min, msl_minimum)
MSL_REDUCE(simd_and, msl_and)
MSL_REDUCE(simd_or, msl_or)
MSL_REDUCE(simd_xor, msl_xor)
MSL_SCAN(simd_prefix_inclusive_sum, true, msl_add, 0)
MSL_SCAN(simd_prefix_exclusive_sum, false, msl_add, 0)
MSL_SCAN(simd_prefix_inclusive_product, true, msl_multiply, 1)
MSL_SCAN(simd_prefix_exclusive_product, false, msl_multiply, 1)

struct simd_vote {
  typedef ulong vote_t;
  vote_t votes;
  constexpr explicit simd_vote(vote_t v = 0) : votes(v) {}
  constexpr explicit operator vote_t() const { return votes; }
  constexpr bool all() const { return (votes & 0xfffffffful) == 0xfffffffful; }
  constexpr bool any() const { return votes != 0; }
};
MSL_INLINE simd_vote simd_ballot(bool x, MSL_SITE) {
  return simd_vote(msl_vote("simd_ballot", x, MSL_PASS_SITE));
}
MSL_INLINE simd_vote simd_active_threads_mask(MSL_SITE) {
  return simd_vote(msl_active("simd_active_threads_mask", MSL_PASS_SITE));
}
MSL_INLINE bool simd_any(bool x, MSL_SITE) { return msl_vote("simd_any", x, MSL_PASS_SITE) != 0; }
MSL_INLINE bool simd_all(bool x, MSL_SITE) { return msl_vote("simd_all", !x, MSL_PASS_SITE) == 0; }
MSL_INLINE bool simd_is_first(MSL_SITE) {
  return msl_lane() == (uint)__builtin_ctz(msl_active("simd_is_first", MSL_PASS_SITE));
}
MSL_INLINE bool simd_is_helper_thread() { return false; }
template <class T>
MSL_INLINE T simd_broadcast_first(T x, MSL_SITE) {
#ifdef MSL_EMU
  uint active;
  auto* slots = (const msl_slot<T>*)emu_simd_exchange("simd_broadcast_first", MSL_MAKE_SITE, &x,
                                                      sizeof x, nullptr, &active);
  return slots[__builtin_ctz(active)].value;
#else
  return msl_shuffle("simd_broadcast_first", x, 0, MSL_PASS_SITE);
#endif
}

// ---- quadgroup functions
#define MSL_QUAD_REDUCE(name, F)                                   \
  template <class T>                                               \
  MSL_INLINE T name(T x, MSL_SITE) {                               \
    const uint lane = msl_lane();                                  \
    x = F{}(x, msl_shuffle(#name, x, lane ^ 1, MSL_PASS_SITE));    \
    return F{}(x, msl_shuffle(#name, x, lane ^ 2, MSL_PASS_SITE)); \
  }
MSL_SHUFFLE(quad_shuffle, (lane & ~3u) + (i & 3))
MSL_SHUFFLE(quad_broadcast, (lane & ~3u) + (i & 3))
MSL_SHUFFLE(quad_shuffle_xor, lane ^ (i & 3))
MSL_SHUFFLE(quad_shuffle_rotate_down, (lane & ~3u) + ((lane + i) & 3))
MSL_SHUFFLE(quad_shuffle_rotate_up, (lane & ~3u) + ((lane - i) & 3))
MSL_SHUFFLE_KEEP(quad_shuffle_down, (lane & ~3u) + ((lane + i) & 3), (lane & 3) + i > 3)
MSL_SHUFFLE_KEEP(quad_shuffle_up, (lane & ~3u) + ((lane - i) & 3), (lane & 3) < i)
MSL_QUAD_REDUCE(quad_sum, msl_add)
MSL_QUAD_REDUCE(quad_product, msl_multiply)
MSL_QUAD_REDUCE(quad_max, msl_maximum)
MSL_QUAD_REDUCE(quad_min, msl_minimum)
MSL_QUAD_REDUCE(quad_and, msl_and)
MSL_QUAD_REDUCE(quad_or, msl_or)
MSL_QUAD_REDUCE(quad_xor, msl_xor)
#define MSL_QUAD_SCAN(name, inclusive, F, zero)                     \
  template <class T>                                                \
  MSL_INLINE T name(T x, MSL_SITE) {                                \
    const uint lane = msl_lane();                                   \
    T r = T(zero);                                                  \
    for (uint i = 0; i < 3; ++i) {                                  \
      T y = msl_shuffle(#name, x, (lane & ~3u) + i, MSL_PASS_SITE); \
      if (i < (lane & 3)) r = F{}(r, y);                            \
    }                                                               \
    return inclusive ? F{}(r, x) : r;                               \
  }
MSL_QUAD_SCAN(quad_prefix_inclusive_sum, true, msl_add, 0)
MSL_QUAD_SCAN(quad_prefix_exclusive_sum, false, msl_add, 0)
MSL_QUAD_SCAN(quad_prefix_inclusive_product, true, msl_multiply, 1)
MSL_QUAD_SCAN(quad_prefix_exclusive_product, false, msl_multiply, 1)
template <class T>
MSL_INLINE T quad_broadcast_first(T x, MSL_SITE) {
  return msl_shuffle("quad_broadcast_first", x, msl_lane() & ~3u, MSL_PASS_SITE);
}
struct quad_vote {
  typedef uint vote_t;
  vote_t votes;
  constexpr explicit quad_vote(vote_t v = 0) : votes(v) {}
  constexpr explicit operator vote_t() const { return votes; }
  constexpr bool all() const { return (votes & 15u) == 15u; }
  constexpr bool any() const { return votes != 0; }
};
MSL_INLINE quad_vote quad_ballot(bool x, MSL_SITE) {
  return quad_vote(msl_vote("quad_ballot", x, MSL_PASS_SITE) >> (msl_lane() & ~3u) & 15u);
}
MSL_INLINE bool quad_any(bool x, MSL_SITE) {
  return (msl_vote("quad_any", x, MSL_PASS_SITE) >> (msl_lane() & ~3u) & 15u) != 0;
}
MSL_INLINE bool quad_all(bool x, MSL_SITE) {
  return (msl_vote("quad_all", !x, MSL_PASS_SITE) >> (msl_lane() & ~3u) & 15u) == 0;
}

}  // namespace metal
