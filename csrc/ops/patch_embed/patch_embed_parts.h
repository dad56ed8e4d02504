// What both passes share: the walk over patches, pixels into packed rows, the folded weight, the row y before
// LayerNorm.
#pragma once

#include "core/gemm_driver.h"
#include "ops/patch_embed/patch_embed.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Sizes of a call. A patch is `runs` stretches of `run` contiguous pixels: rows of W in planar images (order c, kt, i,
// j, as in the weight), rows of (W, C) in interleaved ones (order kt, i, j, c).
template <class T>
struct PatchProblem {
  const PatchEmbedInputs* in;
  i64 width, channels, frames, height, columns;  // D, C, kt, ph, pw
  i64 k;                                         // pixels of a patch
  i64 tokens;
  bool planar;

  i64 area() const { return height * columns; }
};

template <class T>
OFAKERN_LOCAL PatchProblem<T> make_patch_problem(const PatchEmbedInputs& in) {
  const i64* shape = in.weight.shape;
  PatchProblem<T> p = {&in, shape[0], shape[1], shape[2], shape[3], shape[4], 0, 0, true};
  p.k = p.channels * p.frames * p.area();
  for (i64 i = 0; i < in.image_count; ++i) {
    const i64* s = in.images[i].shape;
    p.tokens += s[0] * (s[1] / p.frames) * (s[3] / p.height) * (s[4] / p.columns);
  }
  p.planar = in.image_count == 0 || in.images[0].stride[4] == 1;
  return p;
}

// Patches in the order of tokens.
template <class T>
class PatchWalk {
 public:
  PatchWalk(const PatchProblem<T>& problem, i64 token) : p_(&problem), view_(problem.in->images) {
    open();
    while (token >= per_tensor_) {
      token -= per_tensor_;
      ++view_;
      open();
    }
    image_ = token / per_image_;
    number_ = token % per_image_;
    frame_ = number_ / (rows_ * columns_);
    row_ = number_ / columns_ % rows_;
    column_ = number_ % columns_;
  }

  // Only when another token follows.
  void next() {
    ++number_;
    if (++column_ < columns_) return;
    column_ = 0;
    if (++row_ < rows_) return;
    row_ = 0;
    if (++frame_ < frames_) return;
    frame_ = number_ = 0;
    if (++image_ < view_->shape[0]) return;
    image_ = 0;
    do {
      ++view_;
      open();
    } while (per_tensor_ == 0);
  }

  i64 number() const { return number_; }  // inside the image
  const TensorView& view() const { return *view_; }
  template <class Pixel>
  const Pixel* corner() const {
    const i64* s = view_->stride;
    return view_->as<const Pixel>() + image_ * s[0] + frame_ * p_->frames * s[1] + row_ * p_->height * s[3] +
           column_ * p_->columns * s[4];
  }

 private:
  void open() {
    const i64* shape = view_->shape;
    frames_ = shape[1] / p_->frames;
    rows_ = shape[3] / p_->height;
    columns_ = shape[4] / p_->columns;
    per_image_ = frames_ * rows_ * columns_;
    per_tensor_ = per_image_ * shape[0];
  }

  const PatchProblem<T>* p_;
  const TensorView* view_;
  i64 frames_, rows_, columns_, per_image_, per_tensor_;
  i64 image_, frame_, row_, column_, number_;
};

// ---- pixels --------------------------------------------------------------------------------------------------------

template <class Pixel, class Elem>
OFAKERN_HOT void centred_run(const Pixel* src, i64 count, const float* centre, Elem* dst) {
  i64 x = 0;
  for (; x + kWidth <= count; x += kWidth) vstore_as(dst + x, vsub(vload_as(src + x), vload(centre + x)));
  if (x < count) {
    const int left = static_cast<int>(count - x);
    vstore_partial(dst + x, vsub(vload_partial(src + x, left), vload(centre + x)), left);
  }
}

// The usual patch: its runs are one vector each.
template <class Pixel, class Elem>
OFAKERN_HOT void centred_vectors(const Pixel* src, i64 step, i64 count, const float* centre, Elem* dst) {
  for (i64 i = 0; i < count; ++i)
    vstore_as(dst + i * kWidth, vsub(vload_as(src + i * step), vload(centre + i * kWidth)));
}

// Asks for the pixels below a patch, which a block of a few rows of patches reads soon: their rows lie too far apart
// for the hardware to see them coming. Once per cache line.
template <class Pixel, class T>
OFAKERN_HOT void prefetch_below(const PatchProblem<T>& p, const PatchWalk<T>& walk) {
  const i64* stride = walk.view().stride;
  const Pixel* corner = walk.template corner<Pixel>() + p.height * stride[3];
  if (reinterpret_cast<std::uintptr_t>(corner) % 64 >= static_cast<std::uintptr_t>(p.columns) * sizeof(Pixel)) return;
  for (i64 c = 0; c < (p.planar ? p.channels : 1); ++c)
    for (i64 i = 0; i < p.height; ++i) __builtin_prefetch(corner + c * stride[2] + i * stride[3]);
}

// dst[0, k) = the patch's pixels minus centre.
template <class Pixel, class T, class Elem>
OFAKERN_LOCAL void centred_patch(const PatchProblem<T>& p, const PatchWalk<T>& walk, const float* centre, Elem* dst) {
  const i64* stride = walk.view().stride;
  const Pixel* corner = walk.template corner<Pixel>();
  const i64 planes = p.planar ? p.channels : 1, run = p.planar ? p.columns : p.columns * p.channels;
  for (i64 c = 0; c < planes; ++c)
    for (i64 f = 0; f < p.frames; ++f) {
      const Pixel* row = corner + c * stride[2] + f * stride[1];
      if (run == kWidth) {
        centred_vectors(row, stride[3], p.height, centre, dst);
        dst += p.height * run;
        centre += p.height * run;
        continue;
      }
      for (i64 i = 0; i < p.height; ++i, row += stride[3], dst += run, centre += run)
        centred_run(row, run, centre, dst);
    }
}

// gemm_driver's prologue: pixels as rows of A.
template <class Pixel, class T>
struct PatchRows {
  const PatchProblem<T>& p;
  const float* centre;

  template <class Elem>
  void operator()(i64 row, i64 rows, Elem* dst, i64 ld) const {
    PatchWalk<T> walk(p, row);
    for (i64 r = 0; r < rows; ++r, dst += ld) {
      if (r > 0) walk.next();
      prefetch_below<Pixel>(p, walk);
      centred_patch<Pixel>(p, walk, centre, dst);
      zero_row(dst + p.k, packed_depth<Elem>(p.k) - p.k);
    }
  }
};

template <class T, class Body>
OFAKERN_LOCAL void with_pixels(const PatchProblem<T>& p, const Body& body) {
  switch (p.in->image_count == 0 ? DType::u8 : p.in->images[0].dtype) {
    case DType::u8:
      return body(std::uint8_t{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    default:
      return body(float{});
  }
}

// ---- the folded weight ---------------------------------------------------------------------------------------------

// pixel' = scale (pixel - centre) + offset. The centre is the integer nearest to the mean of 8-bit pixels, so that a
// centred pixel is an integer of at most 8 bits, exact in bf16, and the products sum no large common part.
struct Normaliser {
  const double *scale, *shift;
  bool bytes;

  double centre(i64 c) const {
    if (!bytes) return 0.0;
    const double mean = -shift[c] / scale[c];
    return mean < 0.0 ? 0.0 : mean > 255.0 ? 255.0 : __builtin_floor(mean + 0.5);
  }
  double offset(i64 c) const { return shift[c] + scale[c] * centre(c); }
};

template <class T>
OFAKERN_LOCAL Normaliser make_normaliser(const PatchProblem<T>& p) {
  const double* both = p.in->normalise.template as<const double>();
  return {both, both + p.channels, p.in->image_count == 0 || p.in->images[0].dtype == DType::u8};
}

// What a pass multiplies by: y = scale * (centred pixels · weight) + bias.
template <class T>
struct FoldedWeight {
  using Elem = Packed<T>;
  float* centre;  // [k], by the order of packed pixels; readable to a whole vector
  float* bias;    // [D], bias and type and the folded offsets; the same
  float scale;    // channel 0's; other channels' weights carry their ratio to it, so that equal scales round nothing
  Elem* rows;     // [D, k]
  Elem* panels;

  static FoldedWeight take(const PatchProblem<T>& p, Arena& arena) {
    FoldedWeight w = {};
    w.centre = arena.take<float>(p.k + kWidth);
    w.bias = arena.take<float>(p.width + kWidth);
    w.rows = arena.take<Elem>(p.width * p.k);
    w.panels = arena.take<Elem>(weight_elements<Elem>(p.width, p.k));
    return w;
  }
};

// Index of weight[d, c, f, i, j] inside row d, in the order of packed pixels: calls body(native, packed, c).
template <class T, class Body>
OFAKERN_HOT void each_weight(const PatchProblem<T>& p, const Body& body) {
  const i64 volume = p.frames * p.area();
  for (i64 c = 0; c < p.channels; ++c)
    for (i64 x = 0; x < volume; ++x) body(c * volume + x, p.planar ? c * volume + x : x * p.channels + c, c);
}

// One channel of a row of the weight times `ratio`, rounded; returns the sum of what was written.
template <class T, class Elem>
OFAKERN_HOT float fold_planar(const T* src, i64 count, float ratio, Elem* dst) {
  Vec sum = vzero();
  for (i64 x = 0; x < count; x += kWidth) {
    vstore_n(dst + x, vmul(vload_n(src + x, count - x), vset(ratio)), count - x);
    sum = vadd(sum, vload_n(dst + x, count - x));
  }
  return hsum(sum);
}
template <class T, class Elem>
OFAKERN_HOT float fold_interleaved(const T* src, i64 count, float ratio, Elem* dst, i64 step) {
  float sum = 0.0f;
  for (i64 x = 0; x < count; ++x) {
    from_float(to_float(src[x]) * ratio, dst + x * step);
    sum += to_float(dst[x * step]);
  }
  return sum;
}

// The offsets are summed with the weights as they were rounded: what is left of the rounding then scales with the
// normalised pixel, as in a product of normalised pixels.
template <class T>
OFAKERN_LOCAL float fold_row(const PatchProblem<T>& p, const Normaliser& normal, i64 d,
                             typename FoldedWeight<T>::Elem* dst) {
  const T* row = p.in->weight.template as<const T>() + d * p.k;
  const i64 volume = p.frames * p.area();
  double total = 0.0;
  for (i64 c = 0; c < p.channels; ++c) {
    const float ratio = static_cast<float>(normal.scale[c] / normal.scale[0]);
    const T* from = row + c * volume;
    const float sum = p.planar ? fold_planar(from, volume, ratio, dst + c * volume)
                               : fold_interleaved(from, volume, ratio, dst + c, p.channels);
    total += static_cast<double>(sum) * normal.offset(c) / normal.scale[c];
  }
  return static_cast<float>(total * normal.scale[0]);
}

OFAKERN_HOT float entry(const TensorView& x, i64 i) { return x.defined() ? x.as<const float>()[i] : 0.0f; }

template <class T>
OFAKERN_LOCAL void set_centres(const PatchProblem<T>& p, FoldedWeight<T>& w) {
  const Normaliser normal = make_normaliser(p);
  each_weight(p, [&](i64, i64 packed, i64 c) { w.centre[packed] = static_cast<float>(normal.centre(c)); });
  zero_row(w.centre + p.k, kWidth);
}

template <class T>
OFAKERN_LOCAL void fold_weight(const PatchProblem<T>& p, FoldedWeight<T>& w, int threads) {
  const Normaliser normal = make_normaliser(p);
  w.scale = static_cast<float>(normal.scale[0]);
  set_centres(p, w);
  zero_row(w.bias + p.width, kWidth);
  parallel_for(ceil_div(p.width, 16), threads, [&](i64 task, int) {
    for (i64 d = task * 16; d < min_of(p.width, task * 16 + 16); ++d)
      w.bias[d] = fold_row(p, normal, d, w.rows + d * p.k) + entry(p.in->bias, d) + entry(p.in->type_embedding, d);
  });
  using Elem = typename FoldedWeight<T>::Elem;
  pack_weight(WeightSource<Elem>{w.rows, p.k, 1}, p.width, p.k, w.panels, threads);
}

// ---- rows of y -----------------------------------------------------------------------------------------------------

// A row's position embedding, token by token.
template <class T>
class PositionWalk {
 public:
  PositionWalk(const PatchProblem<T>& p, i64 token)
      : walk_(p, token),
        table_(p.in->position.template as<const T>()),
        index_(p.in->position_index.defined() ? p.in->position_index.template as<const std::int32_t>() + token
                                              : nullptr),
        width_(p.width) {}
  void next() {
    if (index_ != nullptr)
      ++index_;
    else
      walk_.next();
  }
  i64 place() const { return index_ != nullptr ? *index_ : walk_.number(); }
  // Null without a table.
  const T* row() const { return table_ == nullptr ? nullptr : table_ + place() * width_; }

 private:
  PatchWalk<T> walk_;
  const T* table_;
  const std::int32_t* index_;
  i64 width_;
};

struct RowStatistics {
  float mean, rstd;
};

// y = scale * c + bias + position, in place; lanes beyond the width become 0. Gives y's statistics, of one sweep: what
// is summed are distances from the first vector's mean, which is off by at most sqrt(width / kWidth) deviations, so
// that nothing cancels.
template <class T>
class RowSweep {
 public:
  RowSweep(const FoldedWeight<T>& w, i64 width, const T* position, float* c)
      : w_(w), width_(width), position_(position), c_(c) {}

  RowStatistics run(float eps) {
    const i64 head = min_of<i64>(kWidth, width_), whole = width_ / kWidth * kWidth;
    const float shift = hsum(finish(0, head)) / static_cast<float>(head);
    const Vec base = vset(shift);
    Vec sum[2] = {vzero(), vzero()}, square[2] = {vzero(), vzero()};
    const auto add = [&](i64 lane, Vec d) {
      sum[lane] = vadd(sum[lane], d);
      square[lane] = vfma(d, d, square[lane]);
    };
    if (width_ >= kWidth) add(0, vsub(vload(c_), base));
    for (i64 x = kWidth; x < whole; x += kWidth) add(x / kWidth % 2, vsub(finish(x, kWidth), base));
    if (whole < width_) {
      const Vec y = whole == 0 ? vload(c_) : finish(whole, width_ - whole);
      add(0, vselect(mask_first(static_cast<int>(width_ - whole)), vsub(y, base), vzero()));
    }
    const float count = static_cast<float>(width_);
    const float off = hsum(vadd(sum[0], sum[1])) / count, mean_square = hsum(vadd(square[0], square[1])) / count;
    const float variance = mean_square - off * off;
    return {shift + off, 1.0f / __builtin_sqrtf((variance > 0.0f || variance != variance ? variance : 0.0f) + eps)};
  }

 private:
  Vec finish(i64 x, i64 n) const {
    Vec y = vfma(vload(c_ + x), vset(w_.scale), vload(w_.bias + x));
    if (position_ != nullptr) y = vadd(y, vload_n(position_ + x, n));
    if (n < kWidth) y = vselect(mask_first(static_cast<int>(n)), y, vzero());
    vstore(c_ + x, y);
    return y;
  }

  const FoldedWeight<T>& w_;
  i64 width_;
  const T* position_;
  float* c_;
};

template <class T>
OFAKERN_LOCAL RowStatistics finish_row(const FoldedWeight<T>& w, i64 width, const T* position, float* c, float eps) {
  return RowSweep<T>(w, width, position, c).run(eps);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA
