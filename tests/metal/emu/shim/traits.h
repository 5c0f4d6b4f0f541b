// <metal_type_traits>, <metal_limits>, <metal_array>, <metal_utility>, as_type.
#pragma once
#pragma clang system_header
#include "vector.h"

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <class... B>
struct _conjunction : bool_constant<(B::value && ...)> {};
template <class... B>
struct _disjunction : bool_constant<(B::value || ...)> {};
template <class B>
struct _negation : bool_constant<!B::value> {};

template <class T>
struct remove_const {
  typedef T type;
};
template <class T>
struct remove_const<const T> {
  typedef T type;
};
template <class T>
struct remove_volatile {
  typedef T type;
};
template <class T>
struct remove_volatile<volatile T> {
  typedef T type;
};
// An address space is a qualifier of its own: remove_cv leaves it.
template <class T>
struct remove_cv : remove_volatile<typename remove_const<T>::type> {};
template <class T>
struct remove_reference {
  typedef T type;
};
template <class T>
struct remove_reference<T&> {
  typedef T type;
};
template <class T>
struct remove_reference<T&&> {
  typedef T type;
};
template <class T>
struct remove_pointer {
  typedef T type;
};
template <class T>
struct remove_pointer<T*> {
  typedef T type;
};
template <class T>
struct remove_addrspace {
  typedef T type;
};
#define MSL_REMOVE_SPACE(space)            \
  template <class T>                       \
  struct remove_addrspace<space T> {       \
    typedef T type;                        \
  };                                       \
  template <class T>                       \
  struct remove_addrspace<const space T> { \
    typedef const T type;                  \
  };
MSL_OTHER_SPACES(MSL_REMOVE_SPACE)
template <class T>
struct remove_extent {
  typedef T type;
};
template <class T, size_t N>
struct remove_extent<T[N]> {
  typedef T type;
};
template <class T>
struct add_pointer {
  typedef typename remove_reference<T>::type* type;
};
template <class T>
struct add_const {
  typedef const T type;
};
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
using remove_volatile_t = typename remove_volatile<T>::type;
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
using remove_extent_t = typename remove_extent<T>::type;
template <class T>
using add_pointer_t = typename add_pointer<T>::type;
template <class T>
using add_const_t = typename add_const<T>::type;
template <class T>
struct decay {
  typedef remove_cv_t<remove_reference_t<T>> type;
};
template <class T>
using decay_t = typename decay<T>::type;
template <class T>
using msl_plain = remove_cv_t<remove_addrspace_t<remove_cv_t<remove_reference_t<T>>>>;

template <class T>
T&& declval();
template <class T>
constexpr remove_reference_t<T>&& move(T&& t) {
  return static_cast<remove_reference_t<T>&&>(t);
}
template <class T>
constexpr T&& forward(remove_reference_t<T>& t) {
  return static_cast<T&&>(t);
}
template <class T>
MSL_INLINE void swap(T& a, T& b) {
  T t = a;
  a = b;
  b = t;
}

template <class T>
constexpr bool msl_is_integer = false;
#define MSL_MARK_INTEGER(T) \
  template <>               \
  constexpr bool msl_is_integer<T> = true;
MSL_EACH_INTEGER(MSL_MARK_INTEGER)
MSL_MARK_INTEGER(bool)
MSL_MARK_INTEGER(signed char)
template <class T>
using msl_element_of = msl_element<remove_cv_t<T>>;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class T>
struct is_void : is_same<remove_cv_t<T>, void> {};
template <class T>
struct is_floating_point : bool_constant<msl_is_float<msl_element_of<T>>> {};
template <class T>
struct is_integral : bool_constant<msl_is_integer<msl_element_of<T>>> {};
template <class T>
struct is_arithmetic : bool_constant<is_floating_point<T>::value || is_integral<T>::value> {};
template <class T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <class T>
struct is_pointer : bool_constant<__is_pointer(T)> {};
template <class T>
struct is_reference : bool_constant<__is_reference(T)> {};
template <class T>
struct is_array : bool_constant<__is_array(T)> {};
template <class T>
struct is_class : bool_constant<__is_class(T)> {};
template <class T>
struct is_union : bool_constant<__is_union(T)> {};
template <class T>
struct is_const : bool_constant<__is_const(T)> {};
template <class T>
struct is_volatile : bool_constant<__is_volatile(T)> {};
template <class T>
struct is_trivially_copyable : bool_constant<__is_trivially_copyable(T)> {};
template <class T>
struct is_vector : bool_constant<msl_traits<remove_cv_t<T>>::is_vector> {};
template <class T>
struct is_scalar : bool_constant<!is_vector<T>::value &&
                                 (is_arithmetic<T>::value || __is_enum(T) || __is_pointer(T))> {};
template <class T>
struct is_signed
    : bool_constant<is_floating_point<T>::value ||
                    (is_integral<T>::value && (msl_element_of<T>)(-1) < (msl_element_of<T>)(0))> {};
template <class T>
struct is_unsigned : bool_constant<is_integral<T>::value && !is_signed<T>::value> {};
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B>
struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class T, class... A>
struct is_constructible : bool_constant<__is_constructible(T, A...)> {};
template <class T>
struct make_unsigned {
  typedef __make_unsigned(T) type;
};
template <class T>
struct make_signed {
  typedef __make_signed(T) type;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
using make_signed_t = typename make_signed<T>::type;
template <class T>
struct underlying_type {
  typedef __underlying_type(T) type;
};
template <class T>
using underlying_type_t = typename underlying_type<T>::type;
template <class... T>
struct common_type;
template <class T>
struct common_type<T> {
  typedef T type;
};
template <class A, class B, class... R>
struct common_type<A, B, R...> : common_type<decltype(true ? declval<A>() : declval<B>()), R...> {};
template <class... T>
using common_type_t = decay_t<typename common_type<T...>::type>;
#define MSL_TRAIT_VALUE(name) \
  template <class T>          \
  constexpr bool name##_v = name<T>::value;
MSL_TRAIT_VALUE(is_void)
MSL_TRAIT_VALUE(is_floating_point)
MSL_TRAIT_VALUE(is_integral)
MSL_TRAIT_VALUE(is_arithmetic)
MSL_TRAIT_VALUE(is_enum)
MSL_TRAIT_VALUE(is_pointer)
MSL_TRAIT_VALUE(is_reference)
MSL_TRAIT_VALUE(is_array)
MSL_TRAIT_VALUE(is_class)
MSL_TRAIT_VALUE(is_union)
MSL_TRAIT_VALUE(is_const)
MSL_TRAIT_VALUE(is_volatile)
MSL_TRAIT_VALUE(is_trivially_copyable)
MSL_TRAIT_VALUE(is_vector)
MSL_TRAIT_VALUE(is_scalar)
MSL_TRAIT_VALUE(is_signed)
MSL_TRAIT_VALUE(is_unsigned)
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <class A, class B>
constexpr bool is_convertible_v = is_convertible<A, B>::value;
template <class A, class B>
constexpr bool is_base_of_v = is_base_of<A, B>::value;
template <class T, class... A>
constexpr bool is_constructible_v = is_constructible<T, A...>::value;

// Names of Apple's own headers that public code knows.
template <class T>
struct vec_elements : integral_constant<uint, is_vector<T>::value ? msl_traits<T>::size : 0> {};
template <class T>
struct __is_valid_simdgroup_type
    : bool_constant<(msl_is_integer<msl_element<T>> || msl_is_float<msl_element<T>>) &&
                    sizeof(msl_element<T>) <= 4 && !is_same<msl_element<T>, bool>::value &&
                    !is_same<msl_element<T>, bfloat>::value> {};

// What a type without a specialisation has, and what an integer has no use for:
// zeros.
template <class T>
struct msl_no_limits {
  static constexpr bool is_specialized = false, is_integer = false, is_exact = false;
  static constexpr bool is_signed = false, has_infinity = false, has_quiet_NaN = false;
  static constexpr int digits = 0, digits10 = 0, max_exponent = 0, min_exponent = 0, radix = 0;
  static constexpr T max() { return T(); }
  static constexpr T min() { return T(); }
  static constexpr T lowest() { return T(); }
  static constexpr T epsilon() { return T(); }
  static constexpr T denorm_min() { return T(); }
  static constexpr T infinity() { return T(); }
  static constexpr T quiet_NaN() { return T(); }
  static constexpr T signaling_NaN() { return T(); }
};
template <class T>
struct msl_integer_limits : msl_no_limits<T> {
  static constexpr bool is_specialized = true, is_integer = true, is_exact = true;
  static constexpr bool is_signed = (T)-1 < (T)0;
  static constexpr int digits = sizeof(T) * 8 - is_signed, radix = 2;
  static constexpr int digits10 = digits * 30103 / 100000;
  static constexpr T max() { return is_signed ? (T)(((1ull << (digits - 1)) - 1) * 2 + 1) : (T)-1; }
  static constexpr T min() { return is_signed ? (T)(-max() - 1) : (T)0; }
  static constexpr T lowest() { return min(); }
};
template <class T, bool = msl_is_integer<T>>
struct msl_limits : msl_no_limits<T> {};
template <class T>
struct msl_limits<T, true> : msl_integer_limits<T> {};
// Under the name by which public code adds types of its own.
template <class T>
struct _numeric_limits_impl : msl_limits<T> {};
template <>
struct _numeric_limits_impl<bool> : msl_no_limits<bool> {
  static constexpr bool is_specialized = true, is_integer = true, is_exact = true;
  static constexpr int digits = 1, radix = 2;
  static constexpr bool max() { return true; }
};
#define MSL_FLOAT_LIMITS(T, largest, smallest, denormal, eps, bits, exponent)   \
  template <>                                                                   \
  struct _numeric_limits_impl<T> : msl_no_limits<T> {                           \
    static constexpr bool is_specialized = true, is_signed = true;              \
    static constexpr bool has_infinity = true, has_quiet_NaN = true;            \
    static constexpr int digits = bits, digits10 = (bits - 1) * 30103 / 100000; \
    static constexpr int max_exponent = exponent, min_exponent = 3 - exponent;  \
    static constexpr int radix = 2;                                             \
    static constexpr T max() { return (T)largest; }                             \
    static constexpr T lowest() { return (T) - largest; }                       \
    static constexpr T min() { return (T)smallest; }                            \
    static constexpr T denorm_min() { return (T)denormal; }                     \
    static constexpr T epsilon() { return (T)eps; }                             \
    static constexpr T infinity() { return (T)INFINITY; }                       \
    static constexpr T quiet_NaN() { return (T)NAN; }                           \
    static constexpr T signaling_NaN() { return (T)NAN; }                       \
  };
MSL_FLOAT_LIMITS(float, 0x1.fffffep127f, 0x1p-126f, 0x1p-149f, 0x1p-23f, 24, 128)
MSL_FLOAT_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-24f, 0x1p-10f, 11, 16)
MSL_FLOAT_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-133f, 0x1p-7f, 8, 128)
template <class T>
struct numeric_limits : _numeric_limits_impl<T> {};

template <class T, size_t N>
struct array {
  T elements[N];
  constexpr T& operator[](size_t i) { return elements[i]; }
  constexpr const T& operator[](size_t i) const { return elements[i]; }
  constexpr size_t size() const { return N; }
  constexpr bool empty() const { return N == 0; }
  constexpr T* data() { return elements; }
  constexpr const T* data() const { return elements; }
  constexpr T* begin() { return elements; }
  constexpr T* end() { return elements + N; }
  constexpr const T* begin() const { return elements; }
  constexpr const T* end() const { return elements + N; }
  constexpr T& front() { return elements[0]; }
  constexpr T& back() { return elements[N - 1]; }
  constexpr void fill(const T& x) {
    for (size_t i = 0; i < N; ++i) elements[i] = x;
  }
};

// <metal_uniform>
template <class T>
using uniform = T;
template <class T>
MSL_INLINE constexpr T make_uniform(T x) {
  return x;
}

template <class T, class F>
MSL_INLINE constexpr T as_type(F x) {
  static_assert(sizeof(T) == sizeof(F), "as_type: different sizes");
  return __builtin_bit_cast(T, x);
}

}  // namespace metal
