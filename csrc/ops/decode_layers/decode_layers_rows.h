// What stands between a layer's products: whole rows that are added, normalised and activated. Compiled once per ISA.
//
// Everything is rounded to T where the ops that this replaces would have stored it.
#pragma once

#include "core/parallel.h"
#include "core/row_stats.h"
#include "core/vec_gelu.h"
#include "ops/decode_layers/decode_layers.h"

namespace ofakern::OFAKERN_ISA {
namespace {

struct RowNorm {
  const float *weight, *bias;  // weight is null where there is no norm
  float eps;
};

OFAKERN_LOCAL RowNorm row_norm(const StepNorm& norm) {
  return {norm.weight.as<const float>(), norm.bias.as<const float>(), static_cast<float>(norm.eps)};
}

OFAKERN_HOT Vec rounded(Vec x, const float*) { return x; }
template <class T>
OFAKERN_HOT Vec rounded(Vec x, const T*) {
  T stored[kWidth];
  vstore_as(stored, x);
  return vload_as(stored);
}

// Calls body(x, n) for whole vectors (n == kWidth) and then for the tail (n < kWidth).
template <class Body>
OFAKERN_HOT void for_columns(i64 width, const Body& body) {
  i64 x = 0;
  for (; x + kWidth <= width; x += kWidth) body(x, i64{kWidth});
  if (x < width) body(x, width - x);
}

// store(x, n, vector) for each vector of the normalised row z, whose pad holds 0.
template <class Store>
OFAKERN_HOT void normalise(const RowNorm& norm, const float* z, i64 width, const Store& store) {
  const RowStats stats = row_stats(z, width, norm.eps);
  const Vec mean = vset(stats.mean), rstd = vset(stats.rstd);
  for_columns(width, [&](i64 x, i64 n) {
    const Vec xhat = vmul(vsub(vload(z + x), mean), rstd);
    store(x, n, vfma(xhat, vload_n(norm.weight + x, n), vload_n(norm.bias + x, n)));
  });
}

// One row of a sub-layer's end. y: what the sub-layer gives, or null where there is none yet; x: the residual,
// replaced; seen: what the next sub-layer sees of it, or null. z: room for a row of floats, padded to a vector.
template <class T>
OFAKERN_LOCAL void join_row(const RowNorm& extra, const float* residual, const RowNorm& norm, bool norm_first,
                            i64 width, const T* y, T* x, T* seen, float* z) {
  if (y == nullptr) {
    for_columns(width, [&](i64 i, i64 n) { vstore(z + i, vload_n(x + i, n)); });
  } else {
    for_columns(width, [&](i64 i, i64 n) { vstore(z + i, vload_n(y + i, n)); });
    if (extra.weight != nullptr)
      normalise(extra, z, width, [&](i64 i, i64, Vec value) { vstore(z + i, rounded(value, x)); });
    for_columns(width, [&](i64 i, i64 n) {
      Vec own = vload_n(x + i, n);
      if (residual != nullptr) own = rounded(vmul(own, vload_n(residual + i, n)), x);
      Vec total = rounded(vadd(own, vload(z + i)), x);
      if (n < kWidth) total = vselect(mask_first(static_cast<int>(n)), total, vzero());
      vstore(z + i, total);
      if (norm_first) vstore_n(x + i, total, n);
    });
  }
  if (norm.weight == nullptr) {
    for_columns(width, [&](i64 i, i64 n) {
      const Vec total = vload(z + i);
      vstore_n(x + i, total, n);
      if (seen != nullptr) vstore_n(seen + i, total, n);
    });
    return;
  }
  normalise(norm, z, width, [&](i64 i, i64 n, Vec value) {
    if (!norm_first) vstore_n(x + i, value, n);
    if (seen != nullptr) vstore_n(seen + i, value, n);
  });
}

// One row between the two products of the feed-forward part, in place.
template <class T>
OFAKERN_LOCAL void activate_row(const RowNorm& norm, bool gelu, i64 width, T* h, float* z) {
  for_columns(width, [&](i64 i, i64 n) {
    const Vec value = vload_n(h + i, n);
    const Vec y = gelu ? vgelu(value) : vmax(vzero(), value);
    vstore(z + i, y);
  });
  if (norm.weight == nullptr) return for_columns(width, [&](i64 i, i64 n) { vstore_n(h + i, vload(z + i), n); });
  normalise(norm, z, width, [&](i64 i, i64 n, Vec value) { vstore_n(h + i, value, n); });
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA
