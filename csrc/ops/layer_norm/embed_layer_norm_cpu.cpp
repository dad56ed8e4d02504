// Token and type embeddings before LayerNorm; their gradient is a sum per table entry, over its rows in order.
// Compiled once per instruction set; see core/isa.h.
#include "core/with_type.h"
#include "ops/layer_norm/layer_norm_rows.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kEntriesPerTask = 64;
constexpr i64 kColumnsPerTask = 256;
constexpr i64 kRowsPerSum = 64;  // sums of sums: the error grows with the square root of what a plain sum's does

template <class T>
struct Embed {
  i64 width;
  const std::int64_t* tokens;
  const T* table;
  const std::int64_t* types;  // null: 0
  const T* type_table;        // null: none
  float scale;
  float* dz = nullptr;  // [N, width]

  OFAKERN_ALWAYS_INLINE i64 own_sums() const { return 0; }
  OFAKERN_ALWAYS_INLINE void begin(i64, float*) const {}
  template <bool BACKWARD>
  OFAKERN_ALWAYS_INLINE Vec z(i64 row, i64 i, i64 n, float*) const {
    const Vec value = vmul(vset(scale), vload_n(table + tokens[row] * width + i, n));
    if (type_table == nullptr) return value;
    return vadd(value, vload_n(type_table + (types == nullptr ? 0 : types[row]) * width + i, n));
  }
  OFAKERN_ALWAYS_INLINE void store(i64 row, i64 i, i64 n, Vec gradient, float*) const {
    vstore_n(dz + row * width + i, gradient, n);
  }
  OFAKERN_ALWAYS_INLINE void end(i64, const float*, float*) const {}
};

template <class T>
OFAKERN_LOCAL Embed<T> embed_source(const EmbedInputs& in, float* dz) {
  return {in.table.shape[1],
          in.tokens.as<const std::int64_t>(),
          in.table.as<const T>(),
          in.types.as<const std::int64_t>(),
          in.type_table.as<const T>(),
          static_cast<float>(in.scale),
          dz};
}

// The rows of each table entry: order[start[v], start[v + 1]), ascending. A counting sort; index null means all 0.
OFAKERN_LOCAL void group_rows(const std::int64_t* index, i64 rows, i64 entries, i64* start, i64* order) {
  std::memset(start, 0, static_cast<std::size_t>(entries + 2) * sizeof(i64));
  i64* const next = start + 1;  // next[v] moves from v's start to its end, which is where v + 1 starts
  for (i64 row = 0; row < rows; ++row) ++next[(index == nullptr ? 0 : index[row]) + 1];
  for (i64 v = 0; v < entries; ++v) next[v + 1] += next[v];
  for (i64 row = 0; row < rows; ++row) order[next[index == nullptr ? 0 : index[row]]++] = row;
}

// dtable[v, columns] = factor * sum of dz over the entry's rows.
template <class T>
OFAKERN_LOCAL void sum_entry(const float* dz, i64 width, const i64* order, i64 count, float factor, i64 begin, i64 end,
                             T* dtable) {
  const Vec scale = vset(factor);
  for (i64 x = begin; x < end; x += kWidth) {
    const i64 n = min_of<i64>(kWidth, end - x);
    Vec total = vzero();
    for (i64 r = 0; r < count; r += kRowsPerSum) {
      Vec part = vzero();
      const i64 stop = min_of(count, r + kRowsPerSum);
      for (i64 s = r; s < stop; ++s) part = vadd(part, vload_n(dz + order[s] * width + x, n));
      total = vadd(total, part);
    }
    vstore_n(dtable + x, vmul(scale, total), n);
  }
}

template <class T>
OFAKERN_LOCAL void table_gradient(const float* dz, i64 rows, i64 width, const std::int64_t* index, i64 entries,
                                  float factor, bool zeros, T* dtable, i64* start, i64* order, int threads) {
  group_rows(index, rows, entries, start, order);
  const i64 columns = ceil_div(width, kColumnsPerTask);
  parallel_for(ceil_div(entries, kEntriesPerTask) * columns, threads, [&](i64 task, int) {
    const i64 first = task / columns * kEntriesPerTask, begin = task % columns * kColumnsPerTask;
    const i64 last = min_of(entries, first + kEntriesPerTask), end = min_of(width, begin + kColumnsPerTask);
    for (i64 v = first; v < last; ++v)
      if (const i64 count = start[v + 1] - start[v]; count > 0 || !zeros)
        sum_entry(dz, width, order + start[v], count, factor, begin, end, dtable + v * width);
  });
}

}  // namespace

i64 embed_layer_norm_backward_workspace(i64 rows, i64 width, i64 entries, int threads) {
  const i64 floats =
      row_buffer_floats(width, threads) + chunks_of(rows) * partial_stride(width, 0) + round_up(rows * width, 16);
  return floats * static_cast<i64>(sizeof(float)) + (entries + 2 + rows) * static_cast<i64>(sizeof(i64));
}

void embed_layer_norm_forward(const EmbedInputs& in, const LayerNormAffine& affine, const TensorView& out,
                              const TensorView& stats, const TensorView& workspace, int threads) {
  with_type(in.table.dtype, [&](auto type) {
    using T = decltype(type);
    const ForwardRows<T> rows = forward_rows<T>(stats.shape[0], affine, out, stats, workspace);
    layer_norm_forward(rows, embed_source<T>(in, nullptr), threads);
  });
}

void embed_layer_norm_backward(const TensorView& dout, const EmbedInputs& in, const TensorView& stats,
                               const LayerNormAffine& affine, const TensorView& dtable, const TensorView& dtype_table,
                               bool zeros, const AffineGradients& gradients, const TensorView& workspace, int threads) {
  with_type(in.table.dtype, [&](auto type) {
    using T = decltype(type);
    const BackwardRows<T> p = backward_rows<T>(dout, stats, affine, gradients, workspace, threads);
    float* const dz = p.partials + chunks_of(p.rows) * partial_stride(p.width, 0);
    i64* const order = reinterpret_cast<i64*>(dz + round_up(p.rows * p.width, 16));
    i64* const start = order + p.rows;
    layer_norm_backward(p, embed_source<T>(in, dz), nullptr, threads);
    table_gradient(dz, p.rows, p.width, in.tokens.as<const std::int64_t>(), in.table.shape[0],
                   static_cast<float>(in.scale), zeros, dtable.as<T>(), start, order, threads);
    if (in.type_table.defined())
      table_gradient(dz, p.rows, p.width, in.types.as<const std::int64_t>(), in.type_table.shape[0], 1.0f, false,
                     dtype_table.as<T>(), start, order, threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA
