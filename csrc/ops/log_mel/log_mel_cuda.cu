// log_mel on a GPU: a warp takes a frame from the waveform to the logarithms, in shared memory. README.md has the
// maths.
#include <string>

#include "core/check.h"
#include "ops/log_mel/log_mel.h"
#include "ops/log_mel/log_mel_fft.cuh"

namespace ofakern {
namespace {

using i64 = std::int64_t;

constexpr int kWaveforms = 48;    // that one launch takes, by value
constexpr int kMostWarps = 8;     // of a block
constexpr int kFramesOfWarp = 8;  // one after the other: the table of places is made once for all
constexpr int kRangeFrames = 64;  // of a block that limits the range
constexpr int kRangeThreads = 256;
constexpr i64 kLargestFft = 8192;  // what shared memory holds
constexpr std::size_t kShared = std::size_t{48} << 10;
constexpr float kLog10 = 0.434294481903251828f;

struct Waveform {
  i64 first_sample, length;
  i64 first_frame;  // in out
  int frames, first_block;
};

struct Waveforms {
  Waveform of[kWaveforms];
  int count;
};

struct Mel {
  const float* wave;
  const void *window, *roots;  // of what frames are transformed in
  const std::int32_t *first, *offsets;
  const float* weights;
  i64 first_sample;
  int frame, hop, n_fft, mels, weight_count, power, warps;
  bool repeats_edge, remove_dc, whisper;
  double preemphasis;
  float floor;
  FftPlan plan;
};

__device__ __forceinline__ const Waveform& waveform_at(const Waveforms& all, int block) {
  int n = 0;
  while (n + 1 < all.count && all.of[n + 1].first_block <= block) ++n;
  return all.of[n];
}

// The place that sample i of a waveform of `length` > 0 is read from, mirrored as often as it takes.
__device__ __forceinline__ i64 mirrored(i64 i, i64 length, bool repeats_edge) {
  if (i >= 0 && i < length) return i;
  const i64 edge = repeats_edge ? 1 : 0, both = 2 * (length - 1 + edge), period = both > 1 ? both : 1;
  if (i <= -length || i >= 2 * length - 1) i = (i % period + period) % period;
  if (i < 0) i = -i - edge;
  return i < length ? i : 2 * (length - 1) + edge - i;
}

template <class N>
__device__ __forceinline__ N lanes_sum(N v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += simt::shuffle_xor(v, mask);
  return v;
}

// signal [n_fft]: the frame less its mean, preemphasised, times the window, then zeros.
template <class N>
__device__ __forceinline__ void make_frame(const Mel& p, const Waveform& w, int frame, N* signal) {
  const float* const wave = p.wave + w.first_sample;
  const N* const window = static_cast<const N*>(p.window);
  const i64 begin = p.first_sample + static_cast<i64>(frame) * p.hop;
  const auto sample = [&](int n) { return static_cast<N>(wave[mirrored(begin + n, w.length, p.repeats_edge)]); };
  N mean = 0;
  if (p.remove_dc) {
    N sum = 0;
    for (int n = simt::lane(); n < p.frame; n += 32) sum += sample(n);
    mean = lanes_sum(sum) / static_cast<N>(p.frame);
  }
  const N factor = static_cast<N>(-p.preemphasis);
  for (int n = simt::lane(); n < p.n_fft; n += 32) {
    N value = 0;
    if (n < p.frame) {
      value = sample(n) - mean;
      if (p.preemphasis != 0.0) value = (sample(n > 0 ? n - 1 : 0) - mean) * factor + value;
      value *= window[n];
    }
    signal[n] = value;
  }
  simt::sync_warp();
}

// The real signal went through the transform as pairs, z[n] = x[2n] + i x[2n + 1]: see log_mel_cpu.cpp.
template <class N>
__device__ __forceinline__ void spectrum(const Mel& p, const std::uint16_t* places, const Complex<N>* z, float* power) {
  const auto* const roots = static_cast<const Complex<N>*>(p.roots);
  const int half = p.plan.size;
  for (int k = simt::lane(); 2 * k <= half; k += 32) {
    N low, high;
    if (k == 0) {
      const Complex<N> zero = z[places[0]];
      low = (zero.x + zero.y) * (zero.x + zero.y);
      high = (zero.x - zero.y) * (zero.x - zero.y);
    } else {
      const Complex<N> a = z[places[k]], b = z[places[half - k]];
      const Complex<N> even = {a.x + b.x, a.y - b.y}, odd = {a.y + b.y, b.x - a.x};
      const Complex<N> turned = rotate(odd, roots[k]), x = add(even, turned), y = sub(even, turned);
      low = static_cast<N>(0.25) * (x.x * x.x + x.y * x.y);
      high = static_cast<N>(0.25) * (y.x * y.x + y.y * y.y);
    }
    const auto above = static_cast<float>(high), below = static_cast<float>(low);
    power[half - k] = p.power == 2 ? above : sqrtf(above);
    power[k] = p.power == 2 ? below : sqrtf(below);
  }
  simt::sync_warp();
}

// NaN counts as larger than all, as in torch's max.
__device__ __forceinline__ float larger(float a, float b) { return a != a || a > b ? a : b; }

__device__ __forceinline__ float warp_largest(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = larger(simt::shuffle_xor(v, mask), v);
  return v;
}

// out [mels]: the logarithm of each filter's sum. Gives the largest. What lies outside the tables is not read.
__device__ __forceinline__ float filter(const Mel& p, const float* power, float* out) {
  const int bins = p.n_fft / 2 + 1;
  float largest = -INFINITY;
  for (int m = simt::lane(); m < p.mels; m += 32) {
    const int first = max(p.first[m], 0), begin = max(p.offsets[m], 0);
    const int count = min(min(p.offsets[m + 1], p.weight_count) - begin, bins - first);
    float sum = 0.0f;
    for (int k = 0; k < count; ++k) sum = fmaf(p.weights[begin + k], power[first + k], sum);
    const float logarithm = logf(sum < p.floor ? p.floor : sum) * (p.whisper ? kLog10 : 1.0f);
    out[m] = logarithm;
    largest = larger(logarithm, largest);
  }
  simt::sync_warp();
  return warp_largest(largest);
}

std::size_t places_bytes(const Mel& p) { return (static_cast<std::size_t>(p.plan.size) * 2 + 15) / 16 * 16; }
// A warp's signal and power, in bytes.
template <class N>
__host__ __device__ __forceinline__ int bytes_of_warp(int n_fft) {
  return n_fft * static_cast<int>(sizeof(N)) + (n_fft / 2 + 1 + 3) / 4 * 16;
}

// largest [frames of all waveforms]: each frame's, where the range will be limited.
template <class N>
__global__ void __launch_bounds__(kMostWarps * 32)
    log_mel_frames(const __grid_constant__ Waveforms waveforms, const __grid_constant__ Mel p, float* out,
                   float* largest) {
  auto* const places = reinterpret_cast<std::uint16_t*>(simt::dynamic_shared());
  std::byte* const own =
      reinterpret_cast<std::byte*>(places + (p.plan.size + 7) / 8 * 8) + simt::warp() * bytes_of_warp<N>(p.n_fft);
  N* const signal = reinterpret_cast<N*>(own);
  float* const power = reinterpret_cast<float*>(signal + p.n_fft);
  for (int k = static_cast<int>(threadIdx.x); k < p.plan.size; k += p.warps * 32)
    places[k] = static_cast<std::uint16_t>(place_of(p.plan, k));
  simt::sync_block();
  const int block = static_cast<int>(blockIdx.x);
  const Waveform& w = waveform_at(waveforms, block);
  const int begin = ((block - w.first_block) * p.warps + simt::warp()) * kFramesOfWarp;
  for (int f = begin; f < min(begin + kFramesOfWarp, w.frames); ++f) {
    make_frame(p, w, f, signal);
    fft(p.plan, reinterpret_cast<Complex<N>*>(signal), static_cast<const Complex<N>*>(p.roots));
    spectrum(p, places, reinterpret_cast<const Complex<N>*>(signal), power);
    const float most = filter(p, power, out + (w.first_frame + f) * p.mels);
    if (p.whisper && simt::lane() == 0) largest[w.first_frame + f] = most;
  }
}

// Whisper's range: at least the waveform's largest less 8, then (x + 4) / 4.
__global__ void __launch_bounds__(kRangeThreads)
    log_mel_range(const __grid_constant__ Waveforms waveforms, int mels, const float* largest, float* out) {
  OFAKERN_SHARED(float, found, kRangeThreads / 32);
  const int block = static_cast<int>(blockIdx.x), mine = static_cast<int>(threadIdx.x);
  const Waveform& w = waveform_at(waveforms, block);
  float most = -INFINITY;
  for (int f = mine; f < w.frames; f += kRangeThreads) most = larger(largest[w.first_frame + f], most);
  most = warp_largest(most);
  if (simt::lane() == 0) found[simt::warp()] = most;
  simt::sync_block();
  for (int n = 0; n < kRangeThreads / 32; ++n) most = larger(found[n], most);
  const float least = most - 8.0f;
  const int begin = (block - w.first_block) * kRangeFrames, rows = min(kRangeFrames, w.frames - begin);
  float* const x = out + (w.first_frame + begin) * mels;
  for (int n = mine; n < rows * mels; n += kRangeThreads) x[n] = fmaf(larger(least, x[n]), 0.25f, 1.0f);
}

// ---- a call ---------------------------------------------------------------------------------------------------------

template <class N>
Mel read(const LogMelInputs& in) {
  Mel p = {};
  p.wave = in.wave.as<const float>();
  p.window = in.window.data;
  p.roots = in.roots.data;
  p.first = in.first.as<const std::int32_t>();
  p.offsets = in.offsets.as<const std::int32_t>();
  p.weights = in.weights.as<const float>();
  p.first_sample = in.first_sample;
  p.frame = static_cast<int>(in.window.shape[0]);
  p.hop = static_cast<int>(in.hop);
  p.n_fft = static_cast<int>(in.roots.shape[0]);
  p.mels = static_cast<int>(in.first.shape[0]);
  p.weight_count = static_cast<int>(in.weights.shape[0]);
  p.power = in.power;
  p.repeats_edge = in.mirror_repeats_edge;
  p.remove_dc = in.remove_dc;
  p.whisper = in.whisper;
  p.preemphasis = in.preemphasis;
  p.floor = static_cast<float>(in.floor);
  p.plan = make_fft_plan(p.n_fft / 2);
  const std::size_t fit = (kShared - places_bytes(p)) / static_cast<std::size_t>(bytes_of_warp<N>(p.n_fft));
  p.warps = static_cast<int>(fit < 1 ? 1 : fit > kMostWarps ? kMostWarps : fit);
  return p;
}

// Calls body(waveforms, blocks) for every launch that the waveforms take, `frames` of one waveform to a block.
template <class Body>
void each_launch(const LogMelInputs& in, int frames, const Body& body) {
  const i64 count = in.bounds.shape[1] - 1;
  const i64 *samples = in.bounds.as<const i64>(), *rows = samples + count + 1;
  Waveforms waveforms = {};
  int blocks = 0;
  const auto flush = [&] {
    if (blocks > 0) body(static_cast<const Waveforms&>(waveforms), static_cast<unsigned>(blocks));
    waveforms.count = blocks = 0;
  };
  for (i64 n = 0; n < count; ++n) {
    const i64 own = rows[n + 1] - rows[n];
    if (own == 0) continue;
    waveforms.of[waveforms.count++] = {samples[n], samples[n + 1] - samples[n], rows[n], static_cast<int>(own), blocks};
    blocks += static_cast<int>((own + frames - 1) / frames);
    if (waveforms.count == kWaveforms) flush();
  }
  flush();
}

i64 scratch_bytes(const LogMelInputs& in) {
  return in.whisper ? 4 * in.bounds.as<const i64>()[in.bounds.numel() - 1] : 0;
}

void check_limits(const LogMelInputs& in) {
  check_log_mel(in, false);
  constexpr Checker check("log_mel");
  check.that(in.roots.shape[0] <= kLargestFft, "n_fft", "be at most 8192", std::to_string(in.roots.shape[0]));
}

template <class N>
void launch_frames(const LogMelInputs& in, float* frames, float* largest, Stream stream) {
  const Mel p = read<N>(in);
  const std::size_t shared = places_bytes(p) + static_cast<std::size_t>(bytes_of_warp<N>(p.n_fft) * p.warps);
  each_launch(in, p.warps * kFramesOfWarp, [&](const Waveforms& waveforms, unsigned blocks) {
    simt::launch<log_mel_frames<N>>({dim3(blocks), dim3(static_cast<unsigned>(p.warps * 32)), shared}, stream,
                                    waveforms, p, frames, largest);
  });
}

}  // namespace

std::int64_t log_mel_cuda_workspace(const LogMelInputs& inputs) {
  check_limits(inputs);
  return scratch_bytes(inputs);
}

void log_mel_cuda(const LogMelInputs& inputs, const TensorView& out, const TensorView& workspace, Stream stream) {
  check_limits(inputs);
  check_log_mel_out(inputs, out);
  constexpr Checker check("log_mel");
  check.workspace("workspace", workspace, scratch_bytes(inputs));
  if (inputs.first.shape[0] == 0) return;
  float *const frames = out.as<float>(), *const largest = workspace.as<float>();
  if (inputs.window.dtype == DType::f64)
    launch_frames<double>(inputs, frames, largest, stream);
  else
    launch_frames<float>(inputs, frames, largest, stream);
  if (!inputs.whisper) return;
  const int mels = static_cast<int>(inputs.first.shape[0]);
  each_launch(inputs, kRangeFrames, [&](const Waveforms& waveforms, unsigned blocks) {
    simt::launch<log_mel_range>({dim3(blocks), dim3(kRangeThreads)}, stream, waveforms, mels, largest, frames);
  });
}

}  // namespace ofakern
