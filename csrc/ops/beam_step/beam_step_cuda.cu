// Beam search's step in one launch: blocks sum pieces of rows, and the last one of a sample to arrive chooses from all.
//
// Which block that is changes nothing: it reads what all have written. Compiled by nvcc and, for tests, by the
// emulator.
#include <algorithm>

#include "ops/beam_step/beam_choose.cuh"

namespace ofakern {
namespace {

// The sample of a row, -1 for none, -2 where the offsets do not ascend. For whole warps.
__device__ __forceinline__ int sample_of(const BeamCall& c, int row) {
  int found = -1;
  bool ordered = true;
  for (int from = 0; from < c.samples; from += 32) {
    const int b = from + lane();
    const int begin = b < c.samples ? c.row_offsets[b] : 0, end = b < c.samples ? c.row_offsets[b + 1] : 0;
    ordered = ordered && begin <= end;
    const unsigned here = ballot(begin <= row && row < end);
    if (here != 0) found = from + __ffs(static_cast<int>(here)) - 1;
  }
  return all(ordered) ? found : -2;
}

// The block's largest value, and sum.
__device__ __forceinline__ float largest_of_block(float v, float* scratch) {
  v = warp_max(v);
  if (lane() == 0) scratch[warp()] = v;
  sync_block();
  float most = kNever;
#pragma unroll
  for (int w = 0; w < kBeamThreads / 32; ++w) most = fmaxf(most, scratch[w]);
  return most;
}
__device__ __forceinline__ double sum_of_block(double v, double* scratch) {
  v = sum_of_lanes(v);
  if (lane() == 0) scratch[warp()] = v;
  sync_block();
  double sum = 0.0;
#pragma unroll
  for (int w = 0; w < kBeamThreads / 32; ++w) sum += scratch[w];
  return sum;
}

__device__ __forceinline__ bool any_of_block(bool p, int* scratch) {
  p = any(p);
  if (lane() == 0) scratch[warp()] = p ? 1 : 0;
  sync_block();
  int found = 0;
#pragma unroll
  for (int w = 0; w < kBeamThreads / 32; ++w) found |= scratch[w];
  return found != 0;
}

// What a piece leaves. may: the largest x of this thread's set that may be chosen; largest: of all; sum(from): of this
// thread's exp(x - from).
template <class Sum>
__device__ __forceinline__ void leave_piece(const BeamCall& c, i64 place, float may, float largest, bool given,
                                            const Sum& sum) {
  OFAKERN_SHARED(double, sums, kBeamThreads / 32);
  OFAKERN_SHARED(float, largest_of_warps, kBeamThreads / 32);
  c.maxima[place * kBeamThreads + static_cast<int>(threadIdx.x)] = may;
  largest = largest_of_block(largest, largest_of_warps);
  const double total = sum_of_block(static_cast<double>(sum(largest == kNever ? 0.0f : largest)), sums);
  if (threadIdx.x == 0) c.piece_sums[place] = {total, largest, given ? 1 : 0};
}

// A piece of a row without rules: its logits are all on their way at once.
template <class T>
__device__ __forceinline__ void sum_free(const BeamCall& c, const RowRules& r, i64 place, int lo) {
  const T* logits = static_cast<const T*>(c.step.logits) + r.from + lo;
  const int thread = static_cast<int>(threadIdx.x);
  const bool may_choose = r.forced < 0;
  float x[kSetSize], may = kNever, largest = kNever;
#pragma unroll
  for (int j = 0; j < kSetSize; ++j) {
    const int at = thread + j * kBeamThreads;
    x[j] = lo + at < r.length ? to_float(logits[at]) : kNever;
  }
#pragma unroll
  for (int j = 0; j < kSetSize; ++j) {
    x[j] *= r.scale;
    largest = fmaxf(largest, x[j]);
    if (may_choose && lo + thread + j * kBeamThreads != c.step.pad) may = fmaxf(may, x[j]);
  }
  leave_piece(c, place, may, largest, lo < r.length, [&](float from) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kSetSize; ++j) sum += exp_of(x[j] - from);
    return sum;
  });
}

// A piece with rules, or of a ragged row: read twice. The marks stay in memory for the second half.
__device__ __forceinline__ void sum_ruled(const BeamCall& c, const RowRules& r, i64 place, int lo) {
  OFAKERN_SHARED(unsigned, bits, 4 * kPieceWords);
  OFAKERN_SHARED(int, given_to_warps, kBeamThreads / 32);
  const Marks marks = {bits, bits + kPieceWords, bits + 2 * kPieceWords, bits + 3 * kPieceWords};
  const int thread = static_cast<int>(threadIdx.x);
  const i64 words = place * kPieceWords;
  if (r.flagged) {
    Marker(c.step, r, lo, marks).run();
    for (int i = thread; i < kPieceWords; i += kBeamThreads) c.seen[words + i] = marks.seen[i];
  }
  const bool may_choose = r.forced < 0;
  float may = kNever, largest = kNever;
  bool given = false;
#pragma unroll 4
  for (int at = thread; at < kPiece; at += kBeamThreads) {
    const Position p = position_at(c.step, r, marks, lo, at);
    given = given || p.counts;
    largest = fmaxf(largest, p.x);
    if (p.plain && may_choose) may = fmaxf(may, p.x);
    if (!r.flagged) continue;
    const unsigned plain_bits = ballot(p.plain), offered_bits = ballot(p.offered);
    if (lane() == 0) {
      c.plain[words + at / 32] = plain_bits;
      c.offered[words + at / 32] = offered_bits;
    }
  }
  given = any_of_block(given, given_to_warps);
  leave_piece(c, place, may, largest, given, [&](float from) {
    float sum = 0.0f;
#pragma unroll 4
    for (int at = thread; at < kPiece; at += kBeamThreads)
      sum += exp_of(position_at(c.step, r, marks, lo, at).x - from);
    return sum;
  });
}

__device__ __forceinline__ void sum_piece(const BeamCall& c, int row, int piece) {
  const RowRules r = rules_of(c.step, row);
  const i64 place = static_cast<i64>(row) * c.pieces + piece;
  const int lo = piece * kPiece;
  if (r.flagged || c.step.first != nullptr)
    sum_ruled(c, r, place, lo);
  else if (c.step.dtype == DType::f32)
    sum_free<float>(c, r, place, lo);
  else if (c.step.dtype == DType::bf16)
    sum_free<__nv_bfloat16>(c, r, place, lo);
  else
    sum_free<__half>(c, r, place, lo);
}

__device__ __forceinline__ void finish_empty(const BeamCall& c, int sample, bool ordered) {
  if (sample >= c.samples) return;
  const RowSpan span = rows_of(c, sample);
  if (ordered && span.begin < span.end) return;
  for (int i = 0; i < c.width; ++i)
    ordered ? write_candidate(c, sample, i, kNever, 0, -1, kNever) : write_fault(c, sample, i, 0, kBadOffsets);
}

__global__ void __launch_bounds__(kBeamThreads, 3) choose_beams(const BeamCall c) {
  OFAKERN_SHARED(int, place, 2);
  const unsigned tasks = static_cast<unsigned>(c.step.rows) * static_cast<unsigned>(c.pieces);
  const int row = static_cast<int>(min(blockIdx.x, tasks) / static_cast<unsigned>(c.pieces));
  const int piece = static_cast<int>(blockIdx.x % static_cast<unsigned>(c.pieces));
  const int sample = sample_of(c, row);
  if (blockIdx.x >= tasks) {  // samples without rows have nobody else
    finish_empty(c, static_cast<int>(blockIdx.x - tasks) * kBeamThreads + static_cast<int>(threadIdx.x), sample != -2);
    return;
  }
  if (sample < 0) return;
  if (is_looked_at(c, row)) sum_piece(c, row, piece);
  thread_fence();
  sync_block();
  if (threadIdx.x == 0) {
    const RowSpan span = rows_of(c, sample);
    const int others = (span.end - span.begin) * c.pieces - 1;
    place[0] = atomic_add(&c.arrived[sample], 1) == others ? 1 : 0;
  }
  sync_block();
  if (place[0] == 0) return;
  thread_fence();
  if (threadIdx.x == 0) c.arrived[sample] = 0;
  Chooser(c, sample).run();
}

// Where everything stands in the workspace.
struct BeamRoom {
  i64 sums, maxima, plain, offered, seen, totals, bytes;
};

BeamRoom room_of(i64 rows, i64 pieces) {
  BeamRoom room = {};
  i64 at = 0;
  const auto take = [&](i64 bytes) {
    const i64 here = at;
    at += (bytes + 255) / 256 * 256;  // apart from one another by whole cache lines
    return here;
  };
  room.sums = take(rows * pieces * static_cast<i64>(sizeof(PieceSum)));
  room.totals = take(rows * static_cast<i64>(sizeof(RowTotal)));
  room.maxima = take(rows * pieces * kBeamThreads * 4);
  for (i64* bits : {&room.plain, &room.offered, &room.seen}) *bits = take(rows * pieces * kPieceWords * 4);
  room.bytes = at;
  return room;
}

i64 pieces_of(const StepInputs& in) { return std::max<i64>((longest_row(in) + kPiece - 1) / kPiece, 1); }

i64 rows_in(const StepInputs& in) { return in.first.defined() ? in.first.shape[0] - 1 : in.logits.shape[0]; }

}  // namespace

std::int64_t beam_step_workspace_cuda(const BeamInputs& in) {
  return room_of(rows_in(in.step), pieces_of(in.step)).bytes;
}

void beam_step_cuda(const BeamInputs& in, const BeamOutputs& out, const TensorView& arrived,
                    const TensorView& workspace, Stream stream) {
  const i64 pieces = pieces_of(in.step), samples = in.row_offsets.shape[0] - 1;
  const BeamRoom room = room_of(rows_in(in.step), pieces);
  std::byte* base = workspace.as<std::byte>();
  BeamCall c = {};
  c.step = step_call(in.step);
  c.sums = in.sums.as<const float>();
  c.row_offsets = in.row_offsets.as<const int>();
  c.scores = out.scores.as<float>();
  c.origins = out.origins.as<int>();
  c.tokens = out.tokens.as<int>();
  c.log_probs = out.log_probs.as<float>();
  c.arrived = arrived.as<int>();
  c.piece_sums = reinterpret_cast<PieceSum*>(base + room.sums);
  c.maxima = reinterpret_cast<float*>(base + room.maxima);
  c.plain = reinterpret_cast<unsigned*>(base + room.plain);
  c.offered = reinterpret_cast<unsigned*>(base + room.offered);
  c.seen = reinterpret_cast<unsigned*>(base + room.seen);
  c.totals = reinterpret_cast<RowTotal*>(base + room.totals);
  c.samples = static_cast<int>(samples);
  c.pieces = static_cast<int>(pieces);
  c.width = static_cast<int>(out.scores.shape[1]);
  if (samples == 0) return;
  const i64 blocks = c.step.rows * pieces + (samples + kBeamThreads - 1) / kBeamThreads;
  const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(kBeamThreads)};
  launch<choose_beams>(grid, stream, c);
}

}  // namespace ofakern
