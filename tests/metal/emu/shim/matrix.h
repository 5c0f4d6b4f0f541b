// <metal_matrix>, <metal_simdgroup_matrix>.
#pragma once
#pragma clang system_header
#include "atomic.h"

namespace metal {

template <class T, int C, int R = C>
struct matrix {
  typedef msl_vector<T, R> column;
  column columns[C];
  matrix() = default;
  explicit matrix(T diagonal) {
    for (int i = 0; i < C; ++i) columns[i] = column(T(0));
    for (int i = 0; i < (C < R ? C : R); ++i) columns[i][i] = diagonal;
  }
  template <class... A, class = enable_if_t<sizeof...(A) == C || sizeof...(A) == C * R>>
  matrix(A... a) {
    if constexpr (sizeof...(A) == C) {
      int i = 0;
      ((columns[i++] = msl_make<column>(a)), ...);
    } else {
      int i = 0;
      ((columns[i / R][i % R] = (T)a, ++i), ...);
    }
  }
  template <class U, class = enable_if_t<!is_same_v<T, U>>>
  explicit matrix(const matrix<U, C, R>& o) {
    for (int i = 0; i < C; ++i) columns[i] = __builtin_convertvector(o.columns[i], column);
  }
  column& operator[](int i) { return columns[i]; }
  const column& operator[](int i) const { return columns[i]; }
  matrix& operator+=(const matrix& o) { return *this = *this + o; }
  matrix& operator-=(const matrix& o) { return *this = *this - o; }
  matrix& operator*=(T s) { return *this = *this * s; }
  friend matrix operator+(matrix a, const matrix& b) {
    for (int i = 0; i < C; ++i) a.columns[i] += b.columns[i];
    return a;
  }
  friend matrix operator-(matrix a, const matrix& b) {
    for (int i = 0; i < C; ++i) a.columns[i] -= b.columns[i];
    return a;
  }
  friend matrix operator*(matrix a, T s) {
    for (int i = 0; i < C; ++i) a.columns[i] *= s;
    return a;
  }
  friend matrix operator*(T s, const matrix& a) { return a * s; }
  friend column operator*(const matrix& a, msl_vector<T, C> v) {
    column r = a.columns[0] * v[0];
    for (int i = 1; i < C; ++i) r += a.columns[i] * v[i];
    return r;
  }
  friend msl_vector<T, C> operator*(column v, const matrix& a) {
    msl_vector<T, C> r = msl_vector<T, C>(T(0));
    for (int i = 0; i < C; ++i) r[i] = dot(v, a.columns[i]);
    return r;
  }
};
template <class T, int C, int R, int K>
MSL_INLINE matrix<T, K, R> operator*(const matrix<T, C, R>& a, const matrix<T, K, C>& b) {
  matrix<T, K, R> r;
  for (int i = 0; i < K; ++i) r.columns[i] = a * b.columns[i];
  return r;
}
template <class T, int C, int R>
MSL_INLINE matrix<T, R, C> transpose(const matrix<T, C, R>& a) {
  matrix<T, R, C> r(T(0));
  for (int i = 0; i < C; ++i)
    for (int j = 0; j < R; ++j) r.columns[j][i] = a.columns[i][j];
  return r;
}
#define MSL_DECLARE_MATRICES(T)   \
  typedef matrix<T, 2, 2> T##2x2; \
  typedef matrix<T, 2, 3> T##2x3; \
  typedef matrix<T, 2, 4> T##2x4; \
  typedef matrix<T, 3, 2> T##3x2; \
  typedef matrix<T, 3, 3> T##3x3; \
  typedef matrix<T, 3, 4> T##3x4; \
  typedef matrix<T, 4, 2> T##4x2; \
  typedef matrix<T, 4, 3> T##4x3; \
  typedef matrix<T, 4, 4> T##4x4;
MSL_DECLARE_MATRICES(float)
MSL_DECLARE_MATRICES(half)

// A simdgroup_matrix of 8x8 has two elements in each lane: row msl_matrix_row, columns
// msl_matrix_column and the next.
MSL_INLINE uint msl_matrix_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
MSL_INLINE uint msl_matrix_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
MSL_INLINE uint msl_matrix_lane(uint row, uint column) {
  return ((row & 4) ? 16u : 0u) + ((column & 4) ? 8u : 0u) + (row & 3) * 2 + ((column >> 1) & 1);
}
template <class T, int C, int R = C>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "simdgroup_matrix is 8x8");
  static_assert(msl_is_float<T>, "simdgroup_matrix is of float, half or bfloat");
  typedef msl_vector<T, 2> storage_type;
  storage_type elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (uint i = 0; i < 2; ++i)
      elements[i] =
          msl_matrix_row(msl_lane()) == msl_matrix_column(msl_lane()) + i ? diagonal : T(0);
  }
  storage_type& thread_elements() { return elements; }
  const storage_type& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8> simdgroup_bfloat8x8;

template <class T, int C, int R = C>
MSL_INLINE simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, C, R> m;
  m.elements = msl_vector<T, 2>(x);
  return m;
}
template <class T, int C, int R = C>
MSL_INLINE simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T x) {
  return simdgroup_matrix<T, C, R>(x);
}
template <class T, class P>
MSL_INLINE void simdgroup_load(simdgroup_matrix<T, 8>& m, P* p, ulong stride = 8, ulong2 origin = 0,
                               bool transpose = false) {
  static_assert(is_same_v<msl_plain<P>, T>,
                "simdgroup_load: the memory holds another type than the matrix");
  const ulong row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
  for (uint i = 0; i < 2; ++i)
    m.elements[i] = transpose ? p[(origin.y + column + i) * stride + origin.x + row]
                              : p[(origin.y + row) * stride + origin.x + column + i];
}
template <class T, class P>
MSL_INLINE void simdgroup_store(simdgroup_matrix<T, 8> m, P* p, ulong stride = 8, ulong2 origin = 0,
                                bool transpose = false) {
  static_assert(is_same_v<msl_plain<P>, T>,
                "simdgroup_store: the memory holds another type than the matrix");
  const ulong row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
  for (uint i = 0; i < 2; ++i) {
    if (transpose)
      p[(origin.y + column + i) * stride + origin.x + row] = m.elements[i];
    else
      p[(origin.y + row) * stride + origin.x + column + i] = m.elements[i];
  }
}

struct msl_fragments {
  float a[2], b[2];
};
template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8>& d, simdgroup_matrix<A, 8> a,
                                              simdgroup_matrix<B, 8> b, simdgroup_matrix<C, 8> c,
                                              MSL_SITE) {
  const uint row = msl_matrix_row(msl_lane()), column = msl_matrix_column(msl_lane());
  float x0 = (float)c.elements[0], x1 = (float)c.elements[1];
#ifdef MSL_EMU
  const msl_fragments mine = {{(float)a.elements[0], (float)a.elements[1]},
                              {(float)b.elements[0], (float)b.elements[1]}};
  uint active;
  auto* slots = (const msl_slot<msl_fragments>*)emu_simd_exchange(
      "simdgroup_multiply_accumulate", MSL_MAKE_SITE, &mine, sizeof mine, nullptr, &active);
  for (uint k = 0; k < 8; ++k) {
    const float ak = slots[msl_matrix_lane(row, k)].value.a[k & 1];
    const float* bk = slots[msl_matrix_lane(k, column)].value.b;
    x0 += ak * bk[0];
    x1 += ak * bk[1];
  }
#else
  for (uint k = 0; k < 8; ++k) {
    const ushort from_a = (ushort)msl_matrix_lane(row, k),
                 from_b = (ushort)msl_matrix_lane(k, column);
    const float a0 = simd_shuffle((float)a.elements[0], from_a),
                a1 = simd_shuffle((float)a.elements[1], from_a);
    const float ak = k & 1 ? a1 : a0;
    x0 += ak * simd_shuffle((float)b.elements[0], from_b);
    x1 += ak * simd_shuffle((float)b.elements[1], from_b);
  }
#endif
  d.elements[0] = (D)x0;
  d.elements[1] = (D)x1;
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(simdgroup_matrix<D, 8>& d, simdgroup_matrix<A, 8> a,
                                   simdgroup_matrix<B, 8> b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8>(0.0f),
                                MSL_PASS_SITE);
}
template <class T>
MSL_INLINE simdgroup_matrix<T, 8> operator*(simdgroup_matrix<T, 8> a, simdgroup_matrix<T, 8> b) {
  simdgroup_matrix<T, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal
