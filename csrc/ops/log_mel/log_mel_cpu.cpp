// Compiled once per instruction set; see core/isa.h. kWidth frames are one task's unit: lane l of a vector is frame l.
// V is what frames are transformed in: Vec, or VecD where small bands must be right beside loud ones.
#include "core/pack.h"
#include "core/parallel.h"
#include "core/vec_log.h"
#include "ops/log_mel/fft.h"
#include "ops/log_mel/log_mel.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr i64 kFramesPerTask = 64;  // a multiple of every kWidth: tasks are the same for every instruction set
template <class V>
constexpr bool kWide = Lanes<V>::kCount < kWidth;
constexpr float kLog10 = 0.434294481903251828f;

struct Mel {
  const float* wave;
  const i64 *samples, *frames;
  const float* weights;
  const void *window, *roots;  // of numbers as V has them
  const std::int32_t *first, *offsets;
  i64 waveforms, frame, hop, first_sample, n_fft, mels;
  bool repeats_edge, remove_dc, whisper;
  int power;
  double preemphasis;
  float floor;
  FftPlan plan;
};

Mel read(const LogMelInputs& in) {
  Mel p;
  p.wave = in.wave.as<const float>();
  p.samples = in.bounds.as<const i64>();
  p.frames = p.samples + in.bounds.shape[1];
  p.window = in.window.data;
  p.roots = in.roots.data;
  p.weights = in.weights.as<const float>();
  p.first = in.first.as<const std::int32_t>();
  p.offsets = in.offsets.as<const std::int32_t>();
  p.waveforms = in.bounds.shape[1] - 1;
  p.frame = in.window.shape[0];
  p.hop = in.hop;
  p.first_sample = in.first_sample;
  p.n_fft = in.roots.shape[0];
  p.mels = in.first.shape[0];
  p.repeats_edge = in.mirror_repeats_edge;
  p.remove_dc = in.remove_dc;
  p.whisper = in.whisper;
  p.power = in.power;
  p.preemphasis = in.preemphasis;
  p.floor = static_cast<float>(in.floor);
  p.plan = make_fft_plan(p.n_fft / 2);
  return p;
}

template <class V>
OFAKERN_HOT const Number<V>* roots_of(const Mel& p) {
  return static_cast<const Number<V>*>(p.roots);
}

// One thread's buffers: kWidth floats to each entry of the first three, as many bytes of `signal`'s.
struct Scratch {
  float *frames, *power, *mel, *samples;
  void* signal;  // where V is Vec, the frames themselves
};

// The workspace: places of frequencies, first task of each waveform, largest value of each task, then the threads' own.
struct Memory {
  std::int32_t* places;
  i64* tasks;
  float* largest;
  char* threads;
  i64 bytes_per_thread;
  i64 bytes;
};

i64 span_of(const Mel& p) { return (kWidth - 1) * p.hop + p.frame; }

i64 task_count(const Mel& p) {
  i64 count = 0;
  for (i64 w = 0; w < p.waveforms; ++w) count += ceil_div(p.frames[w + 1] - p.frames[w], kFramesPerTask);
  return count;
}

Memory lay_out(const Mel& p, bool wide, int threads, void* base) {
  char* at = static_cast<char*>(base);
  i64 used = 0;
  const auto take = [&](i64 bytes) {
    char* taken = at == nullptr ? nullptr : at + used;
    used += round_up(bytes, 64);
    return taken;
  };
  Memory m;
  m.places = reinterpret_cast<std::int32_t*>(take(p.plan.size * 4));
  m.tasks = reinterpret_cast<i64*>(take((p.waveforms + 1) * 8));
  m.largest = reinterpret_cast<float*>(take(task_count(p) * 4));
  const i64 vectors = (wide ? p.frame : 0) + p.n_fft + p.n_fft / 2 + 1 + p.mels;
  m.bytes_per_thread = round_up((vectors * kWidth + span_of(p)) * 4, 64);
  m.threads = take(m.bytes_per_thread * threads);
  m.bytes = used;
  return m;
}

template <class V>
Scratch scratch_of(const Mel& p, const Memory& m, int thread) {
  Scratch s;
  s.frames = reinterpret_cast<float*>(m.threads + m.bytes_per_thread * thread);
  float* const signal = s.frames + (kWide<V> ? p.frame * kWidth : 0);
  s.signal = signal;
  s.power = signal + p.n_fft * kWidth;
  s.mel = s.power + (p.n_fft / 2 + 1) * kWidth;
  s.samples = s.mel + p.mels * kWidth;
  return s;
}

// The place that sample i of a waveform of `length` > 0 is read from, mirrored as often as it takes.
i64 mirrored(i64 i, i64 length, bool repeats_edge) {
  const i64 edge = repeats_edge ? 1 : 0, period = max_of<i64>(2 * (length - 1 + edge), 1);
  if (i <= -length || i >= 2 * length - 1) i = (i % period + period) % period;
  if (i < 0) i = -i - edge;
  return i < length ? i : 2 * (length - 1) + edge - i;
}

// The samples of `count` frames from `begin` on: the waveform's own where those of kWidth frames lie inside, else a
// copy with its mirror image, and zeros for the frames that are none.
const float* frame_samples(const Mel& p, const float* wave, i64 length, i64 begin, i64 count, float* copy) {
  const i64 span = span_of(p), used = (count - 1) * p.hop + p.frame;
  if (begin >= 0 && begin + span <= length) return wave + begin;
  const i64 inside = min_of(max_of<i64>(-begin, 0), used), outside = max_of(min_of(length - begin, used), inside);
  for (i64 n = 0; n < inside; ++n) copy[n] = wave[mirrored(begin + n, length, p.repeats_edge)];
  std::memcpy(copy + inside, wave + begin + inside, static_cast<std::size_t>(outside - inside) * sizeof(float));
  for (i64 n = outside; n < used; ++n) copy[n] = wave[mirrored(begin + n, length, p.repeats_edge)];
  std::memset(copy + used, 0, static_cast<std::size_t>(span - used) * sizeof(float));
  return copy;
}

// signal [n_fft, lanes of V]: frames less their mean, preemphasised, times the window, then zeros. frames [frame,
// kWidth] may be the signal itself.
template <class V>
OFAKERN_LOCAL void make_signal(const Mel& p, const float* frames, Number<V>* signal) {
  using N = Number<V>;
  constexpr i64 kLanes = Lanes<V>::kCount;
  V mean = vset(N{0});
  if (p.remove_dc) {
    // Four partial sums: one chain of additions would wait for each.
    V sum[4] = {mean, mean, mean, mean};
    for (i64 n = 0; n < p.frame; ++n) sum[n % 4] = vadd(sum[n % 4], vfrom<V>(frames + n * kWidth));
    mean = vmul(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])), vset(N{1} / static_cast<N>(p.frame)));
  }
  const V factor = vset(static_cast<N>(-p.preemphasis));
  const N* window = static_cast<const N*>(p.window);
  V before = vsub(vfrom<V>(frames), mean);
  for (i64 n = 0; n < p.frame; ++n) {
    const V x = vsub(vfrom<V>(frames + n * kWidth), mean);
    vstore(signal + n * kLanes, vmul(vfma(before, factor, x), vset(window[n])));
    before = x;
  }
  std::memset(signal + p.frame * kLanes, 0, static_cast<std::size_t>((p.n_fft - p.frame) * kLanes) * sizeof(N));
}

// The real signal went through the transform as pairs, z[n] = x[2n] + i x[2n + 1]. With E and O the transforms of the
// even and odd samples: X[k] = E[k] + w^k O[k], X[M - k] = conj(E[k] - w^k O[k]), 2 E[k] = Z[k] + conj Z[M - k],
// 2i O[k] = Z[k] - conj Z[M - k]. power [n_fft / 2 + 1, kWidth]: the lanes' squares.
template <class V>
OFAKERN_LOCAL void spectrum(const Mel& p, const std::int32_t* places, const Number<V>* z, float* power) {
  const i64 half = p.plan.size;
  const Number<V>* roots = roots_of<V>(p);
  const Complex<V> zero = load_complex<V>(z, places[0]);
  const V low = vadd(zero.re, zero.im), high = vsub(zero.re, zero.im), quarter = constant<V>(0.25);
  vnarrow(power, vmul(low, low));
  vnarrow(power + half * kWidth, vmul(high, high));
  for (i64 k = 1; 2 * k <= half; ++k) {
    const Complex<V> a = load_complex<V>(z, places[k]), b = load_complex<V>(z, places[half - k]);
    const Complex<V> even = {vadd(a.re, b.re), vsub(a.im, b.im)}, odd = {vadd(a.im, b.im), vsub(b.re, a.re)};
    const Complex<V> turned = rotate(odd, roots[2 * k], roots[2 * k + 1]);
    const Complex<V> x = add(even, turned), y = sub(even, turned);
    vnarrow(power + k * kWidth, vmul(quarter, vfma(x.re, x.re, vmul(x.im, x.im))));
    vnarrow(power + (half - k) * kWidth, vmul(quarter, vfma(y.re, y.re, vmul(y.im, y.im))));
  }
}

// power of kWidth frames that lie `hop` samples apart.
template <class V>
OFAKERN_LOCAL void powers(const Mel& p, const Memory& m, const float* samples, const Scratch& s) {
  Number<V>* const signal = static_cast<Number<V>*>(s.signal);
  transpose_units(as_units(samples), p.hop, kWidth, p.frame, as_units(s.frames), kWidth);
  for (i64 lane = 0; lane < kWidth; lane += Lanes<V>::kCount) {
    make_signal<V>(p, s.frames + lane, signal);
    fft<V>(p.plan, signal, roots_of<V>(p));
    spectrum<V>(p, m.places, signal, s.power + lane);
  }
  if (p.power == 2) return;
  for (i64 k = 0; k <= p.plan.size; ++k) vstore(s.power + k * kWidth, vsqrt(vload(s.power + k * kWidth)));
}

// Of one lane's values: the largest that is a number, and their sum, which is NaN when one of them is.
struct Range {
  Vec largest, sum;
};

// mel [n_mels, kWidth]: the logarithm of each filter's sum.
OFAKERN_LOCAL Range filter(const Mel& p, const float* power, float* mel) {
  const Vec floor = vset(p.floor), base = vset(p.whisper ? kLog10 : 1.0f);
  Range range = {vset(-INFINITY), vzero()};
  for (i64 m = 0; m < p.mels; ++m) {
    const float *w = p.weights + p.offsets[m], *x = power + i64{p.first[m]} * kWidth;
    const i64 bins = p.offsets[m + 1] - p.offsets[m];
    Vec sum = vzero();
    for (i64 k = 0; k < bins; ++k) sum = vfma(vset(w[k]), vload(x + k * kWidth), sum);
    const Vec logarithm = vmul(vlog(vmax(floor, sum)), base);
    vstore(mel + m * kWidth, logarithm);
    range = {vmax(logarithm, range.largest), vadd(range.sum, logarithm)};
  }
  return range;
}

// NaN counts as larger than all, as in torch's max.
float larger(float a, float b) { return a != a || a > b ? a : b; }

float largest_of(const Range& range, i64 lanes) {
  float largest[kWidth], sum[kWidth], result = -INFINITY;
  vstore(largest, range.largest);
  vstore(sum, range.sum);
  for (i64 l = 0; l < lanes; ++l) result = larger(sum[l] != sum[l] ? sum[l] : largest[l], result);
  return result;
}

struct Task {
  i64 waveform, begin, end;  // frames of the waveform
};

Task task_at(const Mel& p, const Memory& m, i64 task) {
  i64 low = 0, high = p.waveforms;  // the last waveform whose first task is not after this one
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    (m.tasks[middle] <= task ? low : high) = middle;
  }
  const i64 begin = (task - m.tasks[low]) * kFramesPerTask;
  return {low, begin, min_of(begin + kFramesPerTask, p.frames[low + 1] - p.frames[low])};
}

// Returns the task's largest value.
template <class V>
OFAKERN_LOCAL float run_task(const Mel& p, const Memory& m, const Task& t, const Scratch& s, float* out) {
  const float* wave = p.wave + p.samples[t.waveform];
  const i64 length = p.samples[t.waveform + 1] - p.samples[t.waveform];
  float largest = -INFINITY;
  for (i64 f = t.begin; f < t.end; f += kWidth) {
    const i64 lanes = min_of<i64>(kWidth, t.end - f);
    powers<V>(p, m, frame_samples(p, wave, length, p.first_sample + f * p.hop, lanes, s.samples), s);
    largest = larger(largest_of(filter(p, s.power, s.mel), lanes), largest);
    transpose_units(as_units(s.mel), kWidth, p.mels, lanes, as_units(out + (p.frames[t.waveform] + f) * p.mels),
                    p.mels);
  }
  return largest;
}

// Whisper's range: at least the waveform's largest less 8, then (x + 4) / 4.
OFAKERN_LOCAL void limit_range(const Mel& p, const Memory& m, const Task& t, float* out) {
  float largest = -INFINITY;
  for (i64 task = m.tasks[t.waveform]; task < m.tasks[t.waveform + 1]; ++task)
    largest = larger(m.largest[task], largest);
  const Vec least = vset(largest - 8.0f), quarter = vset(0.25f), one = vset(1.0f);
  float* x = out + (p.frames[t.waveform] + t.begin) * p.mels;
  const i64 count = (t.end - t.begin) * p.mels;
  for (i64 n = 0; n < count; n += kWidth)
    vstore_n(x + n, vfma(vmax(vload_n(x + n, count - n), least), quarter, one), count - n);
}

template <class V>
OFAKERN_LOCAL void run(const LogMelInputs& in, float* out, void* workspace, int threads) {
  const Mel p = read(in);
  const Memory m = lay_out(p, kWide<V>, threads, workspace);
  fill_places(p.plan, m.places);
  m.tasks[0] = 0;
  for (i64 w = 0; w < p.waveforms; ++w)
    m.tasks[w + 1] = m.tasks[w] + ceil_div(p.frames[w + 1] - p.frames[w], kFramesPerTask);
  const i64 tasks = p.mels == 0 ? 0 : m.tasks[p.waveforms];
  parallel_for(tasks, threads, [&](i64 task, int thread) {
    const Task t = task_at(p, m, task);
    m.largest[task] = run_task<V>(p, m, t, scratch_of<V>(p, m, thread), out);
  });
  if (p.whisper) parallel_for(tasks, threads, [&](i64 task, int) { limit_range(p, m, task_at(p, m, task), out); });
}

bool is_wide(const LogMelInputs& in) { return in.window.dtype == DType::f64; }

}  // namespace

i64 log_mel_scratch(const LogMelInputs& in, int threads) {
  return lay_out(read(in), is_wide(in), threads, nullptr).bytes;
}

void log_mel(const LogMelInputs& in, const TensorView& result, const TensorView& workspace, int threads) {
  float* const out = result.as<float>();
  is_wide(in) ? run<VecD>(in, out, workspace.data, threads) : run<Vec>(in, out, workspace.data, threads);
}

}  // namespace ofakern::OFAKERN_ISA
