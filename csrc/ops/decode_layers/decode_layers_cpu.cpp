// Compiled once per instruction set; see core/isa.h.
#include "core/arena.h"
#include "core/team.h"
#include "core/with_type.h"
#include "ops/decode_attention/decode_attention.h"
#include "ops/decode_layers/decode_layers_rows.h"
#include "ops/decode_linear/decode_linear.h"

namespace ofakern::OFAKERN_ISA {

// The kernels of the two ops that a layer is made of.
i64 decode_linear_workspace(const DecodeLinearInputs& in, const PackedHeader& header, int threads);
void decode_linear(const DecodeLinearInputs& in, const PackedHeader& header, const TensorView& out,
                   const TensorView& workspace, int threads);
i64 decode_attention_workspace(const DecodeAttentionInputs& in, int threads);
void decode_attention(const DecodeAttentionInputs& in, const TensorView& out, const TensorView& lse, void* workspace,
                      int threads);

namespace {

constexpr i64 kRowsTogether = 2;  // of one task between products

OFAKERN_LOCAL TensorView view(void* data, DType dtype, i64 rows, i64 columns, i64 depth = 0) {
  TensorView x;
  x.data = data;
  x.dtype = dtype;
  x.ndim = depth == 0 ? 2 : 3;
  x.shape[0] = rows;
  x.shape[1] = columns;
  x.stride[0] = depth == 0 ? columns : columns * depth;
  x.stride[1] = depth == 0 ? 1 : depth;
  if (depth != 0) {
    x.shape[2] = depth;
    x.stride[2] = 1;
  }
  return x;
}

OFAKERN_LOCAL DecodeLinearInputs product(const StepProjection& projection, const TensorView& x) {
  return {x, projection.packed, projection.scale, projection.bias};
}

OFAKERN_LOCAL PackedHeader header_of(const StepProjection& projection) {
  PackedHeader header;
  std::memcpy(&header, projection.packed.data, sizeof header);
  return header;
}

// Attention of layer l, over the rows' own past or over the source.
OFAKERN_LOCAL DecodeAttentionInputs attention_of(const StepModel& model, const StepInputs& in, i64 l, bool own,
                                                 void* q) {
  const StepCaches& caches = in.caches[l];
  const StepLayer& layer = model.layers[l];
  const i64 head_width = model.width / model.heads;
  DecodeAttentionInputs a = {};
  a.q = view(q, model.dtype, in.x.shape[0], model.heads, head_width);
  a.keys = own ? caches.own_keys : caches.source_keys;
  a.values = own ? caches.own_values : caches.source_values;
  a.row_offsets = in.row_offsets;
  a.value_width = head_width;
  a.scale = own ? layer.own_scale : layer.cross_scale;
  a.head_scale = own ? layer.own_heads : layer.cross_heads;
  if (!own) {
    a.runs = caches.runs;
    a.bias = in.cross_bias;
    return a;
  }
  a.slots = in.table;
  a.counts = in.counts;
  if (in.own_bias.defined()) {
    const i64 from = in.own_bias.shape[0] == 1 ? 0 : l;
    a.bias = view(in.own_bias.as<float>() + from * in.own_bias.stride[0], DType::f32, in.own_bias.shape[1],
                  in.own_bias.shape[2]);
  }
  return a;
}

// The memory of one call.
template <class T>
struct StepMemory {
  T *x, *seen, *wide, *q, *attended, *y, *hidden;
  float *lse, *rows;  // rows: one for each thread
  i64 row_stride;
  char* scratch;
  i64 scratch_bytes;

  static StepMemory take(const StepModel& model, const StepInputs& in, int threads, Arena& arena) {
    const i64 rows = in.x.shape[0], width = model.width;
    StepMemory m = {};
    m.x = arena.take<T>(rows * width);
    m.seen = arena.take<T>(rows * width);
    m.wide = arena.take<T>(rows * 3 * width);
    m.q = arena.take<T>(rows * width);
    m.attended = arena.take<T>(rows * width);
    m.y = arena.take<T>(rows * width);
    m.hidden = arena.take<T>(rows * model.hidden);
    m.lse = arena.take<float>(rows * model.heads);
    m.row_stride = round_up(max_of(width, model.hidden), 64) + 16;
    m.rows = arena.take<float>(m.row_stride * threads);
    m.scratch_bytes = scratch_of(model, in, threads);
    m.scratch = arena.take<char>(m.scratch_bytes);
    return m;
  }

  // The most that a kernel of the sequence needs.
  static i64 scratch_of(const StepModel& model, const StepInputs& in, int threads) {
    i64 most = 0;
    for (i64 l = 0; l < model.count; ++l) {
      const StepLayer& layer = model.layers[l];
      const StepProjection* const all[] = {&layer.own,       &layer.own_out, &layer.cross,
                                           &layer.cross_out, &layer.fc1,     &layer.fc2};
      for (const StepProjection* projection : all) {
        const PackedHeader header = header_of(*projection);
        const TensorView x = view(nullptr, model.dtype, in.x.shape[0], header.k);
        most = max_of(most, OFAKERN_ISA::decode_linear_workspace(product(*projection, x), header, threads));
      }
      for (int own = 0; own < 2; ++own)
        most = max_of(most,
                      OFAKERN_ISA::decode_attention_workspace(attention_of(model, in, l, own != 0, nullptr), threads));
    }
    return most;
  }
};

template <class T>
struct Step {
  const StepModel& model;
  const StepInputs& in;
  StepMemory<T> m;
  T* out;
  int threads;

  i64 row_count() const { return in.x.shape[0]; }

  void run() const {
    std::memcpy(static_cast<void*>(m.x), in.x.data, static_cast<std::size_t>(row_count() * model.width) * sizeof(T));
    const StepNorm none = {};
    join(none, nullptr, model.norm_first ? model.layers[0].own_norm : none, nullptr, m.seen);
    for (i64 l = 0; l < model.count; ++l) run_layer(l);
  }

  void run_layer(i64 l) const {
    const StepLayer& layer = model.layers[l];
    const i64 width = model.width;
    multiply(layer.own, m.seen, width, m.wide, 3 * width);
    scatter(in.caches[l]);
    attend(l, true);
    multiply(layer.own_out, m.attended, width, m.y, width);
    join(layer.own_extra, nullptr, model.norm_first ? layer.cross_norm : layer.own_norm, m.y, m.seen);
    multiply(layer.cross, m.seen, width, m.q, width);
    attend(l, false);
    multiply(layer.cross_out, m.attended, width, m.y, width);
    join(layer.cross_extra, nullptr, model.norm_first ? layer.final_norm : layer.cross_norm, m.y, m.seen);
    multiply(layer.fc1, m.seen, width, m.hidden, model.hidden);
    activate(layer.ffn_norm);
    multiply(layer.fc2, m.hidden, model.hidden, m.y, width);
    const bool last = l + 1 == model.count;
    const StepNorm& next = last ? model.finish : model.layers[l + 1].own_norm;
    join(StepNorm{}, layer.residual.as<const float>(), model.norm_first ? next : layer.final_norm, m.y,
         last ? out : m.seen);
  }

  void multiply(const StepProjection& projection, T* x, i64 depth, T* y, i64 width) const {
    const DecodeLinearInputs inputs = product(projection, view(x, model.dtype, row_count(), depth));
    OFAKERN_ISA::decode_linear(inputs, header_of(projection), view(y, model.dtype, row_count(), width),
                               view(m.scratch, DType::u8, 1, m.scratch_bytes), threads);
  }

  void attend(i64 l, bool own) const {
    const DecodeAttentionInputs inputs = attention_of(model, in, l, own, m.q);
    OFAKERN_ISA::decode_attention(inputs,
                                  view(m.attended, model.dtype, row_count(), model.heads, model.width / model.heads),
                                  view(m.lse, DType::f32, row_count(), model.heads), m.scratch, threads);
  }

  // body(row, z) for every row, z a thread's own row of floats.
  template <class Body>
  void for_rows(const Body& body) const {
    const i64 rows = row_count();
    parallel_for(ceil_div(rows, kRowsTogether), threads, [&](i64 task, int thread) {
      for (i64 r = task * kRowsTogether; r < min_of(rows, (task + 1) * kRowsTogether); ++r)
        body(r, m.rows + thread * m.row_stride);
    });
  }

  // Queries stand together for attention; keys and values go where they stay.
  void scatter(const StepCaches& caches) const {
    const i64 width = model.width;
    const std::size_t bytes = static_cast<std::size_t>(width) * sizeof(T);
    const std::int32_t* const slots = in.slots.as<const std::int32_t>();
    for_rows([&](i64 r, float*) {
      const T* const from = m.wide + r * 3 * width;
      std::memcpy(static_cast<void*>(m.q + r * width), from, bytes);
      std::memcpy(static_cast<void*>(caches.own_keys.as<T>() + slots[r] * width), from + width, bytes);
      std::memcpy(static_cast<void*>(caches.own_values.as<T>() + slots[r] * width), from + 2 * width, bytes);
    });
  }

  void join(const StepNorm& extra, const float* residual, const StepNorm& norm, const T* y, T* seen) const {
    const RowNorm before = row_norm(extra), after = row_norm(norm);
    const i64 width = model.width;
    for_rows([&](i64 r, float* z) {
      join_row(before, residual, after, model.norm_first, width, y == nullptr ? nullptr : y + r * width,
               m.x + r * width, seen + r * width, z);
    });
  }

  void activate(const StepNorm& norm) const {
    const RowNorm own = row_norm(norm);
    for_rows([&](i64 r, float* z) { activate_row(own, model.gelu, model.hidden, m.hidden + r * model.hidden, z); });
  }
};

template <class T>
OFAKERN_LOCAL void run_step(void* step) {
  static_cast<const Step<T>*>(step)->run();
}

}  // namespace

i64 decode_layers_workspace(const StepModel& model, const StepInputs& in, int threads) {
  return with_type(model.dtype, [&](auto type) {
    Arena arena(nullptr);
    StepMemory<decltype(type)>::take(model, in, threads, arena);
    return arena.used();
  });
}

void decode_layers(const StepModel& model, const StepInputs& in, const TensorView& out, void* workspace, int threads) {
  if (in.x.shape[0] == 0) return;
  with_type(model.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena(workspace);
    Step<T> step = {model, in, StepMemory<T>::take(model, in, threads, arena), out.as<T>(), threads};
    lead_team(threads, &run_step<T>, &step);
  });
}

}  // namespace ofakern::OFAKERN_ISA
