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
  friend matrix operator-(matrix a) {
    for (int i = 0; i < C; ++i) a.columns[i] = -a.columns[i];
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
template <class T, int N>
MSL_INLINE T determinant(const matrix<T, N, N>& a) {
  if constexpr (N == 2) {
    return a.columns[0][0] * a.columns[1][1] - a.columns[1][0] * a.columns[0][1];
  } else {
    T sum = T(0);
    for (int k = 0; k < N; ++k) {  // along the first row
      matrix<T, N - 1, N - 1> minor(T(0));
      for (int i = 0; i < N - 1; ++i)
        for (int j = 0; j < N - 1; ++j) minor.columns[i][j] = a.columns[i + (i >= k)][j + 1];
      const T term = a.columns[k][0] * determinant(minor);
      sum = k % 2 == 0 ? sum + term : sum - term;
    }
    return sum;
  }
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
// msl_matrix_column and the next. Which, Metal does not document: here they lie as on Apple's GPUs
// of today, under the emulator as tests want it, and in PTX as its mma instructions have them.
#if defined(__NVPTX__)
MSL_INLINE uint msl_matrix_row(uint lane) { return lane / 4; }
MSL_INLINE uint msl_matrix_column(uint lane) { return lane % 4 * 2; }
MSL_INLINE uint msl_matrix_lane(uint row, uint column) { return row * 4 + column / 2; }
#elif defined(MSL_EMU)
#define MSL_SHARED extern "C" __attribute__((visibility("default"), weak))
MSL_SHARED uchar emu_matrix_row[32] = {0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3,
                                       4, 4, 5, 5, 6, 6, 7, 7, 4, 4, 5, 5, 6, 6, 7, 7};
MSL_SHARED uchar emu_matrix_column[32] = {0, 2, 0, 2, 0, 2, 0, 2, 4, 6, 4, 6, 4, 6, 4, 6,
                                          0, 2, 0, 2, 0, 2, 0, 2, 4, 6, 4, 6, 4, 6, 4, 6};
MSL_SHARED uchar emu_matrix_lane[32] = {0,  1,  8,  9,  2,  3,  10, 11, 4,  5,  12,
                                        13, 6,  7,  14, 15, 16, 17, 24, 25, 18, 19,
                                        26, 27, 20, 21, 28, 29, 22, 23, 30, 31};
MSL_INLINE uint msl_matrix_row(uint lane) { return emu_matrix_row[lane]; }
MSL_INLINE uint msl_matrix_column(uint lane) { return emu_matrix_column[lane]; }
MSL_INLINE uint msl_matrix_lane(uint row, uint column) {
  return emu_matrix_lane[row * 4 + column / 2];
}
#else
uint msl_matrix_row(uint lane);
uint msl_matrix_column(uint lane);
uint msl_matrix_lane(uint row, uint column);
#endif
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
#if defined(__NVPTX__)
// PTX wants its right-hand operand transposed.
MSL_INLINE uint msl_transpose(uint x) {
  uint y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// The matrix units multiply 16 rows by 8x8. One product uses the upper eight.
#define MSL_MATRIX_UNIT(T, TYPE)                                                            \
  MSL_INLINE void msl_multiply(float& x0, float& x1, msl_vector<T, 2> a, msl_vector<T, 2> b) { \
    asm("{ .reg .b32 a, x, y;\n\t"                                                         \
        "mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE                               \
        ".f32 {%0, %1, x, y}, {%2, a}, {%3}, {%0, %1, x, y}; }"                             \
        : "+f"(x0), "+f"(x1)                                                                \
        : "r"(__builtin_bit_cast(uint, a)), "r"(msl_transpose(__builtin_bit_cast(uint, b)))); \
  }                                                                                         \
  MSL_INLINE void msl_multiply(msl_vector<float, 2>& x, msl_vector<float, 2>& y,            \
                               msl_vector<T, 2> a, msl_vector<T, 2> b, msl_vector<T, 2> c) { \
    float x0 = x[0], x1 = x[1], y0 = y[0], y1 = y[1];                                       \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE                               \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                          \
        : "+f"(x0), "+f"(x1), "+f"(y0), "+f"(y1)                                            \
        : "r"(__builtin_bit_cast(uint, a)), "r"(__builtin_bit_cast(uint, b)),               \
          "r"(msl_transpose(__builtin_bit_cast(uint, c))));                                 \
    x = {x0, x1}, y = {y0, y1};                                                             \
  }
MSL_MATRIX_UNIT(half, "f16")
MSL_MATRIX_UNIT(bfloat, "bf16")
// x += a c, y += b c: a template of this name in the kernel's source gives way to this.
MSL_INLINE void kvq_multiply_pair(simdgroup_float8x8& x, simdgroup_float8x8& y,
                                  simdgroup_half8x8 a, simdgroup_half8x8 b, simdgroup_half8x8 c) {
  msl_multiply(x.elements, y.elements, a.elements, b.elements, c.elements);
}
#endif
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
#if defined(__NVPTX__)
  if constexpr (is_same_v<A, B> && sizeof(A) == 2) {
    msl_multiply(x0, x1, a.elements, b.elements);
    d.elements[0] = (D)x0;
    d.elements[1] = (D)x1;
    return;
  }
#endif
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
