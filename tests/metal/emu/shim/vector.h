// Vectors: ext_vector_type underneath, with the constructors and conversions of Metal on top.
// The translation writes T(...), (T)x and static_cast<T>(x) as msl_make<T>(...) wherever T may name
// a vector.
#pragma once
#pragma clang system_header
#include "base.h"

template <class T, int N>
using msl_vector = T __attribute__((ext_vector_type(N)));

#define MSL_EACH_INTEGER(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)
#define MSL_EACH_NUMBER(M) MSL_EACH_INTEGER(M) M(half) M(bfloat) M(float)
#define MSL_DECLARE_VECTORS(T)   \
  typedef msl_vector<T, 2> T##2; \
  typedef msl_vector<T, 3> T##3; \
  typedef msl_vector<T, 4> T##4;
MSL_EACH_NUMBER(MSL_DECLARE_VECTORS)
typedef char2 int8_t2;
typedef uchar2 uint8_t2;
typedef uchar4 uint8_t4;
typedef short2 int16_t2;
typedef ushort2 uint16_t2;
typedef ushort4 uint16_t4;
typedef int2 int32_t2;
typedef uint2 uint32_t2;
typedef uint4 uint32_t4;

template <class V>
struct msl_traits {
  typedef V element;
  static constexpr int size = 1;
  static constexpr bool is_vector = false;
};
template <class T, int N>
struct msl_traits<T __attribute__((ext_vector_type(N)))> {
  typedef T element;
  static constexpr int size = N;
  static constexpr bool is_vector = true;
};
template <class T>
struct msl_traits<const T> : msl_traits<T> {};
template <class V>
using msl_element = typename msl_traits<V>::element;

template <class T>
constexpr bool msl_is_float = false;
template <>
constexpr bool msl_is_float<float> = true;
template <>
constexpr bool msl_is_float<half> = true;
template <>
constexpr bool msl_is_float<bfloat> = true;

// Vectors of bool: clang packs its own to bits and gives them no members. A comparison of vectors
// yields clang's integer mask, which converts to these.
template <int N>
struct msl_bools;
#define MSL_BOOLS_BODY(N)                               \
  msl_bools() = default;                                \
  template <class T>                                    \
  msl_bools(msl_vector<T, N> mask) {                    \
    for (int i = 0; i < N; ++i) (&x)[i] = mask[i] != 0; \
  }                                                     \
  constexpr bool& operator[](int i) { return (&x)[i]; } \
  constexpr bool operator[](int i) const { return (&x)[i]; }
template <>
struct msl_bools<2> {
  bool x, y;
  constexpr msl_bools(bool a, bool b) : x(a), y(b) {}
  constexpr explicit msl_bools(bool a) : x(a), y(a) {}
  MSL_BOOLS_BODY(2)
};
template <>
struct msl_bools<3> {
  bool x, y, z, padding;
  constexpr msl_bools(bool a, bool b, bool c) : x(a), y(b), z(c), padding(false) {}
  constexpr explicit msl_bools(bool a) : x(a), y(a), z(a), padding(false) {}
  MSL_BOOLS_BODY(3)
};
template <>
struct msl_bools<4> {
  bool x, y, z, w;
  constexpr msl_bools(bool a, bool b, bool c, bool d) : x(a), y(b), z(c), w(d) {}
  constexpr explicit msl_bools(bool a) : x(a), y(a), z(a), w(a) {}
  MSL_BOOLS_BODY(4)
};
typedef msl_bools<2> bool2;
typedef msl_bools<3> bool3;
typedef msl_bools<4> bool4;
template <int N, class F>
MSL_INLINE msl_bools<N> msl_bools_of(F f) {
  msl_bools<N> r;
  for (int i = 0; i < N; ++i) r[i] = f(i);
  return r;
}
#define MSL_BOOLS_OPERATOR(op)                                                        \
  template <int N>                                                                    \
  MSL_INLINE msl_bools<N> operator op(const msl_bools<N>& a, const msl_bools<N>& b) { \
    return msl_bools_of<N>([&](int i) { return bool(a[i] op b[i]); });                \
  }                                                                                   \
  /* What a comparison of vectors gives is a mask. */                                 \
  template <int N, class T>                                                           \
  MSL_INLINE msl_bools<N> operator op(const msl_bools<N>& a, msl_vector<T, N> b) {    \
    return a op msl_bools<N>(b);                                                      \
  }                                                                                   \
  template <int N, class T>                                                           \
  MSL_INLINE msl_bools<N> operator op(msl_vector<T, N> a, const msl_bools<N>& b) {    \
    return msl_bools<N>(a) op b;                                                      \
  }
MSL_BOOLS_OPERATOR(&&)
MSL_BOOLS_OPERATOR(||)
MSL_BOOLS_OPERATOR(&)
MSL_BOOLS_OPERATOR(|)
MSL_BOOLS_OPERATOR(^)
MSL_BOOLS_OPERATOR(==)
MSL_BOOLS_OPERATOR(!=)
template <int N>
MSL_INLINE msl_bools<N> operator!(const msl_bools<N>& a) {
  return msl_bools_of<N>([&](int i) { return !a[i]; });
}

// Packed vectors. Those of two and four are under-aligned ext vectors; an ext vector of three is as
// large as one of four, so those of three are structs, copyable out of every address space.
#define MSL_DECLARE_PACKED(T)                                                      \
  typedef T __attribute__((ext_vector_type(2), aligned(sizeof(T)))) packed_##T##2; \
  typedef T __attribute__((ext_vector_type(4), aligned(sizeof(T)))) packed_##T##4; \
  typedef msl_packed3<T> packed_##T##3;
template <class T>
struct msl_packed3 {
  T x, y, z;
  constexpr msl_packed3() = default;
  constexpr msl_packed3(const msl_packed3&) = default;
  constexpr msl_packed3& operator=(const msl_packed3&) = default;
  constexpr explicit msl_packed3(T a) : x(a), y(a), z(a) {}
  constexpr msl_packed3(T a, T b, T c) : x(a), y(b), z(c) {}
  constexpr msl_packed3(msl_vector<T, 3> v) : x(v[0]), y(v[1]), z(v[2]) {}
#define MSL_COPY_FROM(space) \
  msl_packed3(const space msl_packed3& o) : x(o.x), y(o.y), z(o.z) {}
  MSL_OTHER_SPACES(MSL_COPY_FROM)
#undef MSL_COPY_FROM
  constexpr operator msl_vector<T, 3>() const { return msl_vector<T, 3>{x, y, z}; }
  constexpr T& operator[](int i) { return i == 0 ? x : i == 1 ? y : z; }
  constexpr T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
};
#define MSL_PACKED3_OPERATOR(op)                                                \
  template <class T>                                                            \
  MSL_INLINE msl_vector<T, 3> operator op(msl_packed3<T> a, msl_packed3<T> b) { \
    return (msl_vector<T, 3>)a op(msl_vector<T, 3>) b;                          \
  }                                                                             \
  template <class T>                                                            \
  MSL_INLINE msl_vector<T, 3> operator op(msl_packed3<T> a, T b) {              \
    return (msl_vector<T, 3>)a op b;                                            \
  }                                                                             \
  template <class T>                                                            \
  MSL_INLINE msl_vector<T, 3> operator op(T a, msl_packed3<T> b) {              \
    return a op(msl_vector<T, 3>) b;                                            \
  }
MSL_PACKED3_OPERATOR(+)
MSL_PACKED3_OPERATOR(-)
MSL_PACKED3_OPERATOR(*)
MSL_PACKED3_OPERATOR(/)
MSL_EACH_NUMBER(MSL_DECLARE_PACKED)
template <class T>
struct msl_traits<msl_packed3<T>> {
  typedef T element;
  static constexpr int size = 3;
  static constexpr bool is_vector = false;
};

// ---- construction and conversion
template <class A>
constexpr int msl_count = msl_traits<A>::size;
template <int N>
constexpr int msl_count<msl_bools<N>> = N;
template <class V, class A>
MSL_INLINE void msl_append(V& v, int& n, A a) {
  if constexpr (msl_count<A> == 1 && !msl_traits<A>::is_vector)
    v[n++] = msl_element<V>(a);
  else
    for (int i = 0; i < msl_count<A>; ++i) v[n++] = msl_element<V>(a[i]);
}
template <class V, class A>
MSL_INLINE constexpr V msl_convert(A a) {
  typedef msl_element<V> E;
  if constexpr (!msl_traits<V>::is_vector) {
    if constexpr (sizeof(V) == 2 && msl_is_float<V> && msl_is_float<A>)
      return V((float)a);
    else
      return V(a);
  } else if constexpr (msl_traits<A>::is_vector) {
    static_assert(msl_count<A> == msl_count<V>,
                  "vector conversion: different number of components");
    // half <-> bfloat goes through float, as clang's x86 back end has no such conversion
    if constexpr (sizeof(E) == 2 && sizeof(msl_element<A>) == 2 && msl_is_float<E> &&
                  msl_is_float<msl_element<A>>)
      return __builtin_convertvector(__builtin_convertvector(a, msl_vector<float, msl_count<A>>),
                                     V);
    else
      return __builtin_convertvector(a, V);
  } else if constexpr (msl_count<A> == msl_count<V>) {
    V v = V(E(0));
    int n = 0;
    msl_append(v, n, a);
    return v;
  } else {
    return V(E(a));
  }
}
template <class V, class... A>
MSL_INLINE constexpr V msl_make(A... a) {
  if constexpr (!msl_traits<V>::is_vector && msl_is_float<V> && sizeof...(A) == 1) {
    return msl_convert<V>(a...);
  } else if constexpr (!msl_traits<V>::is_vector) {
    return V(a...);
  } else if constexpr (sizeof...(A) == 0) {
    return V(msl_element<V>(0));
  } else if constexpr (sizeof...(A) == 1) {
    return msl_convert<V>(a...);
  } else if constexpr (((msl_count<A> == 1) && ...)) {
    static_assert(sizeof...(A) == msl_traits<V>::size,
                  "vector constructor: wrong number of components");
    return V{msl_element<V>(a)...};
  } else {
    static_assert((msl_count<A> + ... + 0) == msl_traits<V>::size,
                  "vector constructor: wrong number of components");
    V v = V(msl_element<V>(0));
    int n = 0;
    (msl_append(v, n, a), ...);
    return v;
  }
}
// A comparison of vectors is a mask of 0 and -1 in clang, false and true in Metal.
template <class A>
MSL_INLINE constexpr auto msl_compared(A a) {
  if constexpr (msl_traits<A>::is_vector)
    return msl_bools<msl_traits<A>::size>(a);
  else
    return a;
}
template <class V, class A>
MSL_INLINE constexpr V msl_make_from_comparison(A a) {
  if constexpr (msl_traits<A>::is_vector)
    return msl_convert<V>(a & 1);
  else
    return msl_make<V>(a);
}

// An object of another address space as one of the default: plain pointers underneath. The
// translation wraps copies of whole structs and calls of address-space-qualified methods in it.
template <class T>
MSL_INLINE constexpr T& msl_flat(T& x) {
  return x;
}
template <class T>
MSL_INLINE constexpr const T& msl_flat(T&& x) {
  return x;
}
#define MSL_FLAT_FROM(space)                       \
  template <class T>                               \
  MSL_INLINE T& msl_flat(space T& x) {             \
    return *(T*)(ulong) & x;                       \
  }                                                \
  template <class T>                               \
  MSL_INLINE const T& msl_flat(const space T& x) { \
    return *(const T*)(ulong) & x;                 \
  }
MSL_OTHER_SPACES(MSL_FLAT_FROM)
