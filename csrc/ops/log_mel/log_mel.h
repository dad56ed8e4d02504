// Log-mel spectrograms of packed waveforms; README.md here has the algorithm and what it costs.
//
//   s[i]     = the waveform, mirrored outside its ends (about the edge sample, or with the edge repeated)
//   x[f, n]  = s[first_sample + f * hop + n], n < frame; less its mean when remove_dc
//   y[f, n]  = (x[f, n] - preemphasis * x[f, max(n - 1, 0)]) * window[n], 0 for n >= frame
//   P[f, k]  = |sum over n of y[f, n] exp(-2 pi i k n / n_fft)|^power, k = 0 .. n_fft / 2
//   m[f, b]  = max(floor, sum over k of filter[b, k] P[f, k])
//   out[f,b] = ln m, or whisper: (max(log10 m, largest log10 m of the waveform - 8) + 4) / 4
//
// Source: Kaldi's feat/feature-fbank; Whisper's audio.py; librosa's mel filters.
#pragma once

#include <cstdint>

#include "core/stream.h"
#include "core/tensor_view.h"

namespace ofakern {

struct LogMelInputs {
  TensorView wave;     // f32 [N]
  TensorView bounds;   // i64 [2, B + 1]: where each waveform starts in `wave`, and where its rows start in `out`
  TensorView window;   // [frame], f32 or f64: what frames are transformed in
  TensorView roots;    // [n_fft, 2] like window: cosine and sine of 2 pi k / n_fft
  TensorView first;    // i32 [n_mels]: a filter's first bin
  TensorView offsets;  // i32 [n_mels + 1]: where its weights start
  TensorView weights;  // f32 [offsets[n_mels]]
  std::int64_t hop = 0;
  std::int64_t first_sample = 0;
  bool mirror_repeats_edge = false;
  bool remove_dc = false;
  double preemphasis = 0;
  int power = 2;  // or 1
  bool whisper = false;
  double floor = 0;
};

// What each backend checks. tables_are_read: the filters' tables are memory of the host, so that their entries are
// checked; a GPU leaves out what they name beyond the spectrum and the weights.
void check_log_mel(const LogMelInputs& inputs, bool tables_are_read);
void check_log_mel_out(const LogMelInputs& inputs, const TensorView& out);

// Bytes of scratch that log_mel_cpu needs. Both throw ValueError or TypeError for arguments that break the contract;
// n_fft / 2 must be a product of 2, 3 and 5.
std::int64_t log_mel_workspace(const LogMelInputs& inputs, int threads);

// out f32 [bounds[1][B], n_mels]: every element is written. The same bits for any number of threads.
void log_mel_cpu(const LogMelInputs& inputs, const TensorView& out, const TensorView& workspace, int threads);

// The same on a GPU, for n_fft up to 8192; bounds stays on the host. Neither waits for the device.
std::int64_t log_mel_cuda_workspace(const LogMelInputs& inputs);
void log_mel_cuda(const LogMelInputs& inputs, const TensorView& out, const TensorView& workspace, Stream stream);

}  // namespace ofakern
