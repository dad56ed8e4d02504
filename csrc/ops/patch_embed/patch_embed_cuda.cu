// patch_embed on a GPU: the folded weight, tiles of rows, and what is summed over tokens. README.md has the maths.
#include <string>

#include "core/check.h"
#include "ops/patch_embed/patch_embed_rows.cuh"
#include "ops/patch_embed/patch_embed_sums.cuh"

namespace ofakern {
namespace {

constexpr int kFoldThreads = 128;

// A row of the weight times its channel's ratio, in the order of packed pixels, 0 outside; and what its row of y has
// beside the product, summed with the weights as they were rounded: a rounding then counts as with normalised pixels.
template <class T>
__global__ void __launch_bounds__(kFoldThreads)
    patch_fold(const T* weight, const float* bias, const float* type_embedding,
               const __grid_constant__ Channels channels, int width, int depth, int ld, T* folded, float* vector) {
  OFAKERN_SHARED(float, sums, kFoldThreads / 32);
  const int d = static_cast<int>(blockIdx.x), mine = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int k = mine; k < ld; k += kFoldThreads) {
    T rounded = simt::from_float<T>(0.0f);
    if (k < depth && d < width) {
      const Native native = native_of(channels, k);
      rounded = simt::from_float<T>(simt::to_float(weight[static_cast<i64>(d) * depth + native.at]) *
                                    channels.ratio[native.channel]);
      sum += simt::to_float(rounded) * channels.constant[native.channel];
    }
    folded[static_cast<i64>(d) * ld + k] = rounded;
  }
  sum = simt::warp_sum(sum);
  if (simt::lane() == 0) sums[simt::warp()] = sum;
  simt::sync_block();
  if (mine != 0) return;
  float all = 0.0f;
  for (int n = 0; n < kFoldThreads / 32; ++n) all += sums[n];
  if (bias != nullptr && d < width) all += bias[d];
  if (type_embedding != nullptr && d < width) all += type_embedding[d];
  vector[d] = all;
}

// A tile of tokens; or with dout the tile of their gradients before LayerNorm, and its parts (differentiate_rows).
template <class T>
__global__ void __launch_bounds__(kTokens)
    patch_rows(const __grid_constant__ Images images, const Patch patch, const T* folded, const float* vector,
               float scale, int width, const Embedding<T> embedding, T* y, const T* dout, float* parts, i64 part_step) {
  std::byte* const shared = simt::dynamic_shared();
  const int number = static_cast<int>(blockIdx.x);
  const Tile tile = tile_at(images, number);
  const i64 first = (tile.set->first_token + tile.first) * width;
  const RowProduct<T> product = {patch, tile, folded, vector, scale, width, y + first};
  multiply_rows(product, shared);
  if (dout == nullptr)
    finish_rows(embedding, tile, width, product.y);
  else
    differentiate_rows(embedding, tile, width, dout + first, product.y, parts + static_cast<i64>(number) * width,
                       part_step, reinterpret_cast<RowGradient*>(shared));
}

// ---- a call ---------------------------------------------------------------------------------------------------------

constexpr Checker kCheck("patch_embed");

i64 round_to(i64 n, i64 step) { return (n + step - 1) / step * step; }

i64 tokens_of(const TensorView& x, const i64* patch) {
  return x.shape[0] * (x.shape[1] / patch[0]) * (x.shape[3] / patch[1]) * (x.shape[4] / patch[2]);
}

// Sizes of a call.
struct Call {
  Patch patch;
  Channels channels;
  i64 width, high, tokens, tiles;
  float scale;
};

bool interleaved(const PatchEmbedInputs& in) { return in.image_count > 0 && in.images[0].stride[4] != 1; }

Channels make_channels(const PatchEmbedInputs& in, bool bytes) {
  const i64 count = in.weight.shape[1];
  Channels c = {};
  c.count = static_cast<int>(count);
  c.volume = static_cast<int>(in.weight.numel() / in.weight.shape[0] / count);
  c.interleaved = interleaved(in);
  const double *scale = in.normalise.as<const double>(), *shift = scale + count;
  for (i64 n = 0; n < count; ++n) {
    const double offset = shift[n] + (bytes ? static_cast<double>(kCentre) * scale[n] : 0.0);
    c.ratio[n] = static_cast<float>(scale[n] / scale[0]);
    c.constant[n] = static_cast<float>(offset / scale[n] * scale[0]);
    c.scale[n] = static_cast<float>(scale[n]);
    c.offset[n] = static_cast<float>(offset);
  }
  return c;
}

// Whether 16 pixels at a time are contiguous and aligned everywhere.
bool in_vectors(const PatchEmbedInputs& in, i64 run) {
  bool all = in.image_count > 0 && in.images[0].dtype == DType::u8 && run % 16 == 0;
  for (i64 i = 0; i < in.image_count; ++i) {
    const TensorView& x = in.images[i];
    all = all && reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
    for (const int d : {0, 1, 3}) all = all && (x.stride[d] % 16 == 0 || x.shape[d] == 1);
    all = all && (interleaved(in) || x.stride[2] % 16 == 0 || x.shape[2] == 1);
  }
  return all;
}

void check_limits(const PatchEmbedInputs& in) {
  const i64* w = in.weight.shape;
  kCheck.that(w[0] % 8 == 0 && w[0] <= kWidest, "weight", "have D a multiple of 8 up to 2048", std::to_string(w[0]));
  kCheck.that(w[1] <= kMaxChannels, "weight", "have at most 16 channels", std::to_string(w[1]));
  kCheck.that(w[1] * w[2] * w[3] * w[4] <= kDeepest, "weight", "have at most 8192 pixels of a patch",
              std::to_string(w[1] * w[2] * w[3] * w[4]));
  for (i64 i = 0; i < in.image_count; ++i) {
    const i64* stride = in.images[i].stride;
    double span = 0.0;
    for (int d = 1; d < 5; ++d) span += static_cast<double>(w[d == 1 ? 2 : d == 2 ? 1 : d]) * std::abs(stride[d]);
    kCheck.that(span < 2147483648.0, "images", "have patches that span less than 2^31 elements", std::to_string(span));
  }
}

Call make_call(const PatchEmbedInputs& in) {
  check_limits(in);
  const i64* w = in.weight.shape;
  const bool bytes = in.image_count == 0 || in.images[0].dtype == DType::u8;
  Call call = {};
  const i64 depth = w[1] * w[2] * w[3] * w[4], run = interleaved(in) ? w[4] * w[1] : w[4];
  call.patch = {static_cast<int>(w[2]),
                static_cast<int>(w[3]),
                static_cast<int>(run),
                static_cast<int>(depth),
                static_cast<int>(round_to(depth, kStep)),
                in.image_count == 0 ? DType::u8 : in.images[0].dtype,
                in_vectors(in, run)};
  call.channels = make_channels(in, bytes);
  call.width = w[0];
  call.high = round_to(w[0], kColumns);
  for (i64 i = 0; i < in.image_count; ++i) {
    const i64 tokens = tokens_of(in.images[i], w + 2);
    call.tokens += tokens;
    call.tiles += (tokens + kTokens - 1) / kTokens;
  }
  call.scale = static_cast<float>(in.normalise.as<const double>()[0]);
  return call;
}

// Calls body(images, tiles, first tile) for every launch that the call's images take.
template <class Body>
void each_launch(const PatchEmbedInputs& in, const Body& body) {
  const i64* patch = in.weight.shape + 2;
  Images images = {};
  i64 token = 0, first_tile = 0;
  int tiles = 0;
  const auto flush = [&] {
    if (tiles > 0) body(static_cast<const Images&>(images), tiles, first_tile);
    first_tile += tiles;
    images.count = tiles = 0;
  };
  for (i64 i = 0; i < in.image_count; ++i) {
    const TensorView& x = in.images[i];
    const i64 tokens = tokens_of(x, patch);
    if (tokens == 0) continue;
    const i64* s = x.stride;
    const int rows = static_cast<int>(x.shape[3] / patch[1]), columns = static_cast<int>(x.shape[4] / patch[2]);
    images.of[images.count++] = {x.data,
                                 s[0],
                                 s[1],
                                 s[2],
                                 s[3],
                                 token,
                                 rows,
                                 columns,
                                 static_cast<int>(x.shape[1] / patch[0]) * rows * columns,
                                 static_cast<int>(tokens),
                                 tiles};
    token += tokens;
    tiles += static_cast<int>((tokens + kTokens - 1) / kTokens);
    if (images.count == kImages) flush();
  }
  flush();
}

// The workspace, laid out from `base` (null: sizes only).
template <class T>
struct Memory {
  T *folded, *dy;
  float *vector, *parts, *sums;
  i64 splits, bytes;

  static Memory of(const PatchEmbedInputs& in, const Call& call, bool backward, void* base) {
    Memory m = {};
    const auto take = [&](i64 bytes) {
      std::byte* const at = base == nullptr ? nullptr : static_cast<std::byte*>(base) + m.bytes;
      m.bytes += round_to(bytes, 256);
      return at;
    };
    m.folded = reinterpret_cast<T*>(take(call.high * call.patch.ld * static_cast<i64>(sizeof(T))));
    m.vector = reinterpret_cast<float*>(take(call.high * 4));
    if (!backward) return m;
    if (in.ln_weight.defined())
      m.dy = reinterpret_cast<T*>(take(call.tokens * call.width * static_cast<i64>(sizeof(T))));
    m.parts = reinterpret_cast<float*>(take(3 * call.width * (call.tiles + 1) * 4));
    each_launch(in,
                [&](const Images&, int tiles, i64) { m.splits += sum_splits(call.width, call.patch.depth, tiles); });
    m.sums = reinterpret_cast<float*>(take(m.splits * call.width * call.patch.depth * 4));
    return m;
  }
};

const float* floats(const TensorView& x) { return x.defined() ? x.as<const float>() : nullptr; }

template <class T>
void launch_rows(const PatchEmbedInputs& in, const Call& call, const Memory<T>& m, T* y, const T* dout, Stream stream) {
  const auto width = static_cast<int>(call.width);
  simt::launch<patch_fold<T>>({dim3(static_cast<unsigned>(call.high)), dim3(kFoldThreads)}, stream,
                              in.weight.as<const T>(), floats(in.bias), floats(in.type_embedding), call.channels, width,
                              call.patch.depth, call.patch.ld, m.folded, m.vector);
  const Embedding<T> embedding = {in.position.defined() ? in.position.as<const T>() : nullptr,
                                  in.position_index.defined() ? in.position_index.as<const std::int32_t>() : nullptr,
                                  floats(in.ln_weight),
                                  floats(in.ln_bias),
                                  in.position.defined() ? static_cast<int>(in.position.shape[0]) : 0,
                                  static_cast<float>(in.eps)};
  const std::size_t shared = row_shared_bytes<T>(call.patch.ld, call.patch.vectors);
  each_launch(in, [&](const Images& images, int tiles, i64 first_tile) {
    simt::launch<patch_rows<T>>({dim3(static_cast<unsigned>(tiles)), dim3(kTokens), shared}, stream, images, call.patch,
                                m.folded, m.vector, call.scale, width, embedding, y, dout,
                                m.parts + first_tile * call.width, call.tiles * call.width);
  });
}

}  // namespace

std::int64_t patch_embed_forward_cuda_workspace(const PatchEmbedInputs& inputs) {
  check_patch_embed(inputs, false);
  return Memory<float>::of(inputs, make_call(inputs), false, nullptr).bytes;
}

std::int64_t patch_embed_backward_cuda_workspace(const PatchEmbedInputs& inputs) {
  check_patch_embed(inputs, false);
  return Memory<float>::of(inputs, make_call(inputs), true, nullptr).bytes;
}

void patch_embed_forward_cuda(const PatchEmbedInputs& inputs, const TensorView& out, const TensorView& workspace,
                              Stream stream) {
  check_patch_embed_rows("out", out, check_patch_embed(inputs, false), inputs.weight);
  const Call call = make_call(inputs);
  simt::with_type(inputs.weight.dtype, [&](auto type) {
    using T = decltype(type);
    const auto memory = Memory<T>::of(inputs, call, false, workspace.data);
    kCheck.workspace("workspace", workspace, memory.bytes);
    if (call.tokens > 0) launch_rows<T>(inputs, call, memory, out.as<T>(), nullptr, stream);
  });
}

void patch_embed_backward_cuda(const PatchEmbedInputs& inputs, const TensorView& dout,
                               const PatchEmbedGradients& gradients, const PatchEmbedPlaces& places,
                               const TensorView& workspace, Stream stream) {
  check_patch_embed_rows("dout", dout, check_patch_embed(inputs, false), inputs.weight);
  check_patch_embed_gradients(inputs, gradients);
  check_places(inputs, places);
  const Call call = make_call(inputs);
  simt::with_type(inputs.weight.dtype, [&](auto type) {
    using T = decltype(type);
    const auto m = Memory<T>::of(inputs, call, true, workspace.data);
    kCheck.workspace("workspace", workspace, m.bytes);
    const T* dy = m.dy != nullptr ? m.dy : dout.as<const T>();
    if (m.dy != nullptr && call.tokens > 0) launch_rows<T>(inputs, call, m, m.dy, dout.as<const T>(), stream);
    const SumSizes sizes = {call.width, call.tokens, call.tiles, call.patch};
    float* const totals = m.parts + 3 * call.width * call.tiles;
    if (m.dy == nullptr) launch_column_parts(sizes, dy, m.parts, stream);
    launch_part_sums(sizes, m.parts, totals, inputs.ln_weight.defined(), gradients, stream);
    i64 splits = 0;
    each_launch(inputs, [&](const Images& images, int tiles, i64) {
      const i64 own = sum_splits(call.width, call.patch.depth, tiles);
      launch_weight_sums(sizes, images, tiles, own, dy, m.sums + splits * call.width * call.patch.depth, stream);
      splits += own;
    });
    launch_weight_gradient<T>(sizes, call.channels, m.sums, splits, totals, gradients.dweight, stream);
    if (inputs.position.defined()) launch_position_gradient(inputs, places, dy, gradients.dposition, stream);
  });
}

}  // namespace ofakern
