// Compiled once per instruction set; see core/isa.h.
#include "core/gemm_driver.h"
#include "core/with_type.h"
#include "ops/decode_linear/decode_linear.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// gemm_driver's prologue: rows of x as they are.
template <class T>
struct CopyRows {
  const T* x;
  i64 stride, k;

  template <class Elem>
  void operator()(i64 row, i64 rows, Elem* dst, i64 ld) const {
    for (i64 r = 0; r < rows; ++r) copy_row(x + (row + r) * stride, k, dst + r * ld, packed_depth<Elem>(k));
  }
};

// gemm_driver's epilogue: scale, bias, rounding.
template <class T>
struct WriteRows {
  T* out;
  i64 n;
  const float *scale, *bias;  // or null

  void operator()(i64 row, i64 rows, i64 column, i64 columns, const float* c, i64 ldc) const {
    for (i64 r = 0; r < rows; ++r, c += ldc)
      for (i64 x = 0; x < columns; x += kWidth) {
        const i64 left = columns - x;
        Vec y = vload(c + x);
        if (scale != nullptr) y = vmul(y, vload_n(scale + column + x, left));
        if (bias != nullptr) y = vadd(y, vload_n(bias + column + x, left));
        vstore_n(out + (row + r) * n + column + x, y, left);
      }
  }
};

template <class T>
OFAKERN_LOCAL MatmulPlan<Packed<T>> make_plan(const DecodeLinearInputs& in, const PackedHeader& header) {
  return plan_matmul<Packed<T>>(in.x.shape[0], header.n, header.k, false);
}

template <class T, class Stored>
OFAKERN_LOCAL void run(const DecodeLinearInputs& in, const PackedHeader& header, const TensorView& out,
                       const TensorView& workspace, int threads) {
  using Elem = Packed<T>;
  const Stored* panels = reinterpret_cast<const Stored*>(in.packed.as<const char>() + kPackedHeaderBytes);
  multiply(make_plan<T>(in, header), make_weight<Elem, Stored>(panels, header.n, header.k), workspace.data, threads,
           CopyRows<T>{in.x.as<const T>(), in.x.stride[0], header.k},
           WriteRows<T>{out.as<T>(), header.n, in.scale.as<const float>(), in.bias.as<const float>()});
}

}  // namespace

i64 decode_linear_elements(i64 n, i64 k, DType dtype) {
  return with_type(dtype, [&](auto type) { return weight_elements<Packed<decltype(type)>>(n, k); });
}

void decode_linear_pack(const TensorView& weight, DType dtype, void* panels, int threads) {
  const i64 n = weight.shape[0], k = weight.shape[1];
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (weight.dtype == DType::u8)
      pack_weight_as_stored<Packed<T>>(weight.as<const std::int8_t>(), n, k, static_cast<std::int8_t*>(panels),
                                       threads);
    else
      pack_weight_as_stored<Packed<T>>(weight.as<const T>(), n, k, static_cast<T*>(panels), threads);
  });
}

i64 decode_linear_workspace(const DecodeLinearInputs& in, const PackedHeader& header, int threads) {
  return with_type(in.x.dtype, [&](auto type) {
    using T = decltype(type);
    const MatmulPlan<Packed<T>> plan = make_plan<T>(in, header);
    return header.bytes ? matmul_scratch<Packed<T>, std::int8_t>(plan, threads)
                        : matmul_scratch<Packed<T>, T>(plan, threads);
  });
}

void decode_linear(const DecodeLinearInputs& in, const PackedHeader& header, const TensorView& out,
                   const TensorView& workspace, int threads) {
  with_type(in.x.dtype, [&](auto type) {
    using T = decltype(type);
    header.bytes ? run<T, std::int8_t>(in, header, out, workspace, threads)
                 : run<T, T>(in, header, out, workspace, threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA
