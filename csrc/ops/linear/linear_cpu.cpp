// Compiled once per instruction set; see core/isa.h. The product itself: core/weight_gradient.h.
#include "core/parallel.h"
#include "core/weight_gradient.h"
#include "core/with_type.h"
#include "ops/linear/linear.h"

namespace ofakern::OFAKERN_ISA {
namespace {

template <class T>
OFAKERN_LOCAL WeightGradient<T> gradient_of(const TensorView& dy, const TensorView& x, int threads) {
  return {x.shape[0], dy.shape[1], x.shape[1], threads};
}

template <class T>
OFAKERN_LOCAL TokenRows<T> rows_of(const TensorView& x) {
  return {x.as<const T>(), x.shape[1]};
}

}  // namespace

i64 linear_backward_workspace(const TensorView& dy, const TensorView& x, int threads) {
  return with_type(x.dtype, [&](auto type) { return threads * gradient_of<decltype(type)>(dy, x, threads).scratch(); });
}

void linear_backward(const TensorView& dy, const TensorView& x, const TensorView& dweight, const TensorView& dbias,
                     void* workspace, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const WeightGradient<T> gradient = gradient_of<T>(dy, x, threads);
    T* const bias = dbias.defined() ? dbias.as<T>() : nullptr;
    parallel_for(gradient.blocks(), threads, [&](i64 block, int thread) {
      gradient.run(block, rows_of<T>(dy), rows_of<T>(x), dweight.as<T>(), bias, false,
                   static_cast<char*>(workspace) + thread * gradient.scratch());
    });
  });
}

}  // namespace ofakern::OFAKERN_ISA
