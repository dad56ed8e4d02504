// Checks every argument against the contract in log_mel.h, for all of its backends.
#include <string>

#include "core/check.h"
#include "ops/log_mel/log_mel.h"

namespace ofakern {
namespace {

constexpr std::int64_t kLargestFft = 1 << 16;

constexpr Checker kCheck("log_mel");

// Text is made only where a rule is broken: these checks run over every entry of every call.
template <class Index>
void check_rising(const char* argument, const Index* offsets, std::int64_t count) {
  bool rising = offsets[0] == 0;
  for (std::int64_t n = 0; n < count; ++n) rising = rising && offsets[n] <= offsets[n + 1];
  if (!rising)
    kCheck.fail_value(argument, "rise from 0",
                      "first " + std::to_string(offsets[0]) + ", last " + std::to_string(offsets[count]));
}

void check_last(const char* argument, std::int64_t last, std::int64_t expected) {
  if (last != expected) kCheck.fail_value(argument, "end at " + std::to_string(expected), std::to_string(last));
}

void check_waveforms(const LogMelInputs& in) {
  kCheck.plain("wave", in.wave, "[N]", {-1}, DType::f32);
  kCheck.dtype("bounds", in.bounds, {DType::i64});
  kCheck.shape("bounds", in.bounds, "[2, B + 1]", {2, -1});
  kCheck.device("bounds", in.bounds, Device::cpu);
  kCheck.contiguous("bounds", in.bounds);
  const std::int64_t waveforms = in.bounds.shape[1] - 1;
  if (waveforms < 0) kCheck.fail_value("bounds", "have B + 1 columns", "none");
  const std::int64_t *samples = in.bounds.as<const std::int64_t>(), *frames = samples + waveforms + 1;
  check_rising("bounds[0]", samples, waveforms);
  check_rising("bounds[1]", frames, waveforms);
  check_last("bounds[0]", samples[waveforms], in.wave.shape[0]);
  for (std::int64_t n = 0; n < waveforms; ++n)
    if (samples[n] == samples[n + 1] && frames[n] != frames[n + 1])
      kCheck.fail_value("bounds[1]", "have no frame of a waveform without samples",
                        std::to_string(frames[n + 1] - frames[n]) + " of waveform " + std::to_string(n));
}

void check_transform(const LogMelInputs& in) {
  kCheck.dtype("roots", in.roots, {DType::f32, DType::f64});
  kCheck.plain("roots", in.roots, "[n_fft, 2]", {-1, 2}, in.roots.dtype);
  const std::int64_t n_fft = in.roots.shape[0];
  std::int64_t rest = n_fft / 2;
  for (const std::int64_t factor : {2, 3, 5})
    while (rest > 0 && rest % factor == 0) rest /= factor;
  if (n_fft % 2 != 0 || rest != 1 || n_fft > kLargestFft)
    kCheck.fail_value("n_fft", "be twice a product of 2, 3 and 5, at most " + std::to_string(kLargestFft),
                      std::to_string(n_fft));
  kCheck.plain("window", in.window, "[frame]", {-1}, in.roots.dtype);
  kCheck.that(in.window.shape[0] >= 1 && in.window.shape[0] <= n_fft, "frame", "lie in 1..n_fft",
              std::to_string(in.window.shape[0]));
  if (in.hop < 1 || in.hop > kLargestFft)
    kCheck.fail_value("hop", "lie in 1.." + std::to_string(kLargestFft), std::to_string(in.hop));
  if (in.first_sample < -n_fft || in.first_sample > in.hop)
    kCheck.fail_value("first_sample", "lie in -n_fft..hop", std::to_string(in.first_sample));
  kCheck.that(in.power == 1 || in.power == 2, "power", "be 1 or 2", std::to_string(in.power));
}

void check_filters(const LogMelInputs& in, bool tables_are_read) {
  kCheck.plain("first", in.first, "[n_mels]", {-1}, DType::i32);
  const std::int64_t mels = in.first.shape[0], bins = in.roots.shape[0] / 2 + 1;
  kCheck.plain("offsets", in.offsets, "[n_mels + 1]", {mels + 1}, DType::i32);
  kCheck.plain("weights", in.weights, "[offsets[n_mels]]", {-1}, DType::f32);
  if (!tables_are_read) return;
  const std::int32_t *first = in.first.as<const std::int32_t>(), *offsets = in.offsets.as<const std::int32_t>();
  check_rising("offsets", offsets, mels);
  check_last("offsets", offsets[mels], in.weights.shape[0]);
  for (std::int64_t m = 0; m < mels; ++m)
    if (first[m] < 0 || first[m] + std::int64_t{offsets[m + 1]} - offsets[m] > bins)
      kCheck.fail_value("first", "keep a filter inside the " + std::to_string(bins) + " bins",
                        std::to_string(first[m]));
}

}  // namespace

void check_log_mel(const LogMelInputs& in, bool tables_are_read) {
  check_waveforms(in);
  check_transform(in);
  check_filters(in, tables_are_read);
}

void check_log_mel_out(const LogMelInputs& in, const TensorView& out) {
  const std::int64_t rows = in.bounds.as<const std::int64_t>()[in.bounds.numel() - 1];
  kCheck.plain("out", out, "[F, n_mels]", {rows, in.first.shape[0]}, DType::f32);
}

}  // namespace ofakern
