// Spellings of public Metal code that C++ does not take as they are. test_dialect.py runs them.
#include <metal_stdlib>
using namespace metal;

// A literal without a suffix is float, also where a template computes with it.
template <typename T>
inline float third(T x) {
  return x + 1.0 / 3.0 == x + 1.0f / 3.0f ? 1 : 0;
}
kernel void literals(device float* y [[buffer(0)]]) {
  y[0] = third(y[0]);
  y[1] = fmax(0, fmin(1, y[1] + 0.5));
}

// Kernels in namespaces, declared ahead, instantiated by qualified names or by their parameters.
namespace a {
namespace b {
template <typename T>
kernel void add(device T* y, constant T& x, uint i);

template <typename T>
kernel void add(device T* y [[buffer(0)]], constant T& x [[buffer(1)]],
                uint i [[thread_position_in_grid]]) {
  y[i] += x;
}
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(N * 32)]] void scale(
    device T* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  y[i] *= T(N);
}
}  // namespace b
template [[host_name("scale_int_3")]] [[kernel]] void b::scale<int, 3>(device int* y, uint i);
}  // namespace a
template [[host_name("add_float")]] kernel void ::a::b::add<float>(device float* y,
                                                                   constant float& x, uint i);
template [[host_name("add_int")]] kernel void a::b::add(device int* y, constant int& x, uint i);
template [[host_name("scale_float_2")]] [[kernel]] void ::a::b::scale<float, 2>(device float* y,
                                                                                uint i);

// Two kernels of one name, which differ in their template parameters.
template <typename T, int N, bool FLAG>
[[kernel, max_total_threads_per_threadgroup(N)]] void fill(device T* y [[buffer(0)]]) {
  y[0] = T(FLAG ? N : -N);
}
template <typename T, typename U, int N>
[[kernel, max_total_threads_per_threadgroup(2 * N)]] void fill(device T* y [[buffer(1)]],
                                                               device U* z [[buffer(0)]]) {
  y[0] = T(N);
  z[0] = U(10 * N);
}
template [[host_name("fill_one")]] [[kernel]] decltype(fill<int, 32, true>) fill<int, 32, true>;
template [[host_name("fill_two")]] [[kernel]] decltype(fill<int, float, 64>) fill<int, float, 64>;

// {x, y, z} for an argument that is a vector.
template <typename I>
inline vec<I, 2> pair_of(uint3 at, I more) {
  vec<I, 2> both(I(at.x) + more, I(at.y) * I(at.z));
  return both;
}
template <int N, typename I>
kernel void lists(device long* y [[buffer(0)]], uint3 i [[thread_position_in_grid]]) {
  auto both = pair_of<I>({N * (i.x + 3), i.y + 5, i.z + 7}, 100);
  y[0] = both.x;
  y[1] = both.y;
}
template [[host_name("lists")]] kernel void lists<2, long>(device long*, uint3);

// Structs in different address spaces behind one conditional operator.
struct Complex {
  float re, im;
};
struct Start {
  static constexpr constant Complex init = {-1.0f, -2.0f};
};
kernel void conditional(device Complex* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup Complex shared[1];
  if (i == 0) shared[0] = y[0];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Complex chosen = i == 0 ? shared[i] : Start::init;
  y[i] = chosen;
}

// Names of functions are strings in constant memory; coherent memory; limits of any type.
inline uint length_of(constant const char* text) {
  uint n = 0;
  while (text[n] != 0) ++n;
  return n;
}
inline uint own_name() { return length_of(__func__); }
kernel void names(device coherent(device) uint* y [[buffer(0)]]) {
  y[0] = own_name();
  y[1] = length_of("four");
  y[2] = numeric_limits<float2>::infinity().x == 0.0f ? 1 : 0;
  y[3] = numeric_limits<int>::digits10;
}
