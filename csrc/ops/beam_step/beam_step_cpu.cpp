// Beam search's step. First every row that needs it is summed, by pieces; then every sample chooses from its rows.
//
// A row's candidates are found through the chunks' maxima: the width-th largest of them is a score that `width` tokens
// reach, so only chunks above it are read again. Compiled once per instruction set; see core/isa.h.
#include "ops/beam_step/step_rows.h"

namespace ofakern::OFAKERN_ISA {
namespace {

struct Candidate {
  float score, log_prob;
  i32 row, token;
};

OFAKERN_HOT bool before(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.row != b.row ? a.row < b.row : a.token < b.token;
}

// The best `width` candidates of a sample, in order.
struct Best {
  Candidate* found;
  i64 width, count;

  void offer(const Candidate& candidate) {
    if (!(candidate.score > kLowest)) return;
    if (count == width && !before(candidate, found[width - 1])) return;
    i64 place = count < width ? count++ : width - 1;
    for (; place > 0 && before(candidate, found[place - 1]); --place) found[place] = found[place - 1];
    found[place] = candidate;
  }
};

struct BeamPlan {
  StepPlan step;
  const BeamInputs* in;
  i64 batch, width;
  Scratch* scratch;  // [threads]
  Candidate* found;  // [threads, width]
  float* bounds;     // [threads, width]
};

OFAKERN_LOCAL BeamPlan plan_beams(const BeamInputs& in, i64 width, int threads, Arena* arena, bool measure) {
  BeamPlan plan = {};
  plan.in = &in;
  plan.step = plan_step(in.step, arena);
  plan.batch = in.row_offsets.shape[0] - 1;
  plan.width = width;
  plan.scratch = arena->take<Scratch>(threads);
  plan.found = arena->take<Candidate>(threads * width);
  plan.bounds = arena->take<float>(threads * width);
  for (int t = 0; t < threads; ++t) {
    const Scratch scratch(arena, plan.step);
    if (!measure) plan.scratch[t] = scratch;
  }
  return plan;
}

// Offers one row's tokens.
struct RowSearch {
  const BeamPlan& plan;
  const RowScores& scores;
  i64 row;     // of the call
  i32 origin;  // in its sample
  float sum;
  float* bounds;
  Best* best;

  void offer(i64 token, float log_prob) const {
    best->offer({sum + log_prob, log_prob, origin, static_cast<i32>(token)});
  }
  float worst() const { return best->count == best->width ? best->found[best->width - 1].score : kLowest; }

  // x must exceed this to reach `score`; the roundings behind x may lift it by a few units.
  float limit_of(float score) const {
    if (score == kLowest) return kLowest;
    const double x = static_cast<double>(score) - sum + scores.log_sum;
    const double size = std::fabs(score) + std::fabs(sum) + std::fabs(scores.log_sum);
    return static_cast<float>(x - 1e-6 * size - 1e-37);
  }

  // A score that `width` tokens of [lo, hi) reach: they stand in as many chunks.
  float reached_by_chunks(const float* maxima, i64 lo, i64 hi) const {
    const i64 width = plan.width, first = ceil_div(lo, kChunk);
    const i64 end = hi == plan.step.vocabulary ? plan.step.chunks : hi / kChunk;
    if (end - first < width) return kLowest;
    i64 count = 0;
    for (i64 chunk = first; chunk < end; ++chunk) {
      const float largest = maxima[chunk];
      if (count == width && !(largest > bounds[width - 1])) continue;
      i64 place = count < width ? count++ : width - 1;
      for (; place > 0 && largest > bounds[place - 1]; --place) bounds[place] = bounds[place - 1];
      bounds[place] = largest;
    }
    return sum + scores.plain(bounds[width - 1]);
  }

  // The tokens [lo, hi) of a row of the vocabulary.
  template <class T>
  void range(const T* logits, i64 lo, i64 hi) const {
    const float* maxima = plan.step.maxima + row * plan.step.chunks;
    const float scale = scores.rules.scale, reached = reached_by_chunks(maxima, lo, hi);
    float limit = limit_of(max_of(worst(), reached));
    for (i64 chunk = lo / kChunk; chunk * kChunk < hi; ++chunk) {
      if (!(maxima[chunk] > limit)) continue;
      const i64 end = min_of(hi, (chunk + 1) * kChunk);
      for (i64 at = max_of(lo, chunk * kChunk); at < end; at += kWidth) {
        const i64 n = min_of<i64>(kWidth, end - at);
        if (n == kWidth && !vany_above(vmul(vload_as(logits + at), vset(scale)), limit)) continue;
        for (i64 token = at; token < at + n; ++token) {
          const float x = to_float(logits[token]) * scale;
          if (x > limit && !scores.marks.special.at(token)) offer(token, scores.plain(x));
        }
      }
      limit = limit_of(max_of(worst(), reached));
    }
    scores.marks.special.each(lo, hi, [&](i64 token) {  // they are in no maximum
      offer(token, scores.log_prob_of_logit(token, to_float(logits[token])));
    });
  }

  // Listed tokens, whose x are known.
  void list(const Scratch& scratch) const {
    float limit = limit_of(worst());
    for (i64 at = 0; at < scratch.count; at += kWidth) {
      const i64 end = min_of<i64>(at + kWidth, scratch.count);
      if (!scratch.special && end == at + kWidth && !vany_above(vload(scratch.values + at), limit)) continue;
      for (i64 i = at; i < end; ++i) {
        const i64 token = scratch.tokens[i];
        const float x = scratch.values[i];
        if (scores.marks.special.at(token))
          offer(token, scores.log_prob(token, x));
        else if (x > limit)
          offer(token, scores.plain(x));
      }
      limit = limit_of(worst());
    }
  }

  void forced_in_list(const Scratch& scratch) const {
    for (i64 i = 0; i < scratch.count; ++i)
      if (scratch.tokens[i] == scores.rules.forced)
        offer(scores.rules.forced, scores.log_prob(scores.rules.forced, scratch.values[i]));
  }

  template <class T>
  void token(const T* logits, i64 token) const {
    if (token >= 0 && token < plan.step.vocabulary)
      offer(token, scores.log_prob_of_logit(token, to_float(logits[token])));
  }

  // What a state allows of a row whose softmax is over the whole vocabulary.
  template <class T>
  void state(const T* logits) const {
    const StepInputs& in = *plan.step.in;
    const Run ranges = run_of(in.range_first, scores.rules.state, in.ranges.shape[0]);
    const i32* bounds_of = in.ranges.as<const i32>();
    for (i64 i = ranges.begin; i < ranges.end; ++i)
      range(logits, max_of<i64>(bounds_of[3 * i], 0), min_of<i64>(bounds_of[3 * i + 1], plan.step.vocabulary));
    const Run tokens = run_of(in.state_first, scores.rules.state, in.state_tokens.shape[0]);
    for (i64 i = tokens.begin; i < tokens.end; ++i) {
      const i32 candidate = in.state_tokens.as<const i32>()[i];
      bool inside = false;
      for (i64 r = ranges.begin; r < ranges.end; ++r)
        inside = inside || (candidate >= bounds_of[3 * r] && candidate < bounds_of[3 * r + 1]);
      if (!inside) token(logits, candidate);
    }
  }
};

template <class T>
OFAKERN_LOCAL void search_row(const BeamPlan& plan, i64 row, i64 first_row, int thread, Best* best) {
  Scratch& scratch = plan.scratch[thread];
  RowScores scores;
  if (!score_row<T>(plan.step, row, &scratch, &scores)) return;
  const StepInputs& in = *plan.step.in;
  const RowSearch search = {plan,
                            scores,
                            row,
                            static_cast<i32>(row - first_row),
                            plan.in->sums.as<const float>()[row],
                            plan.bounds + thread * plan.width,
                            best};
  if (scores.rules.alone) {
    if (scores.rules.forced >= 0)
      search.forced_in_list(scratch);
    else
      search.list(scratch);
    return;
  }
  const T* logits = in.logits.as<const T>() + row * in.logits.stride[0];
  if (scores.rules.forced >= 0)
    search.token(logits, scores.rules.forced);
  else if (scores.rules.state >= 0)
    search.state(logits);
  else
    search.range(logits, 0, plan.step.vocabulary);
}

OFAKERN_LOCAL void write_sample(const Best& best, i64 sample, const BeamOutputs& out) {
  for (i64 i = 0; i < best.width; ++i) {
    const Candidate found = i < best.count ? best.found[i] : Candidate{kLowest, kLowest, 0, -1};
    const i64 place = sample * best.width + i;
    out.scores.as<float>()[place] = found.score;
    out.origins.as<i32>()[place] = found.row;
    out.tokens.as<i32>()[place] = found.token;
    out.log_probs.as<float>()[place] = found.log_prob;
  }
}

template <class T>
OFAKERN_LOCAL void run(const BeamPlan& plan, const BeamOutputs& out, int threads) {
  const i32* offsets = plan.in->row_offsets.as<const i32>();
  const float* sums = plan.in->sums.as<const float>();
  const auto skip = [&](i64 row) {
    return row < offsets[0] || row >= offsets[plan.batch] || sums[row] == kLowest || !is_live(plan.step, row);
  };
  sum_rows<T>(plan.step, threads, skip, [&](int thread) -> Marks& { return plan.scratch[thread].marks; });
  parallel_for(plan.batch, threads, [&](i64 sample, int thread) {
    Best best = {plan.found + thread * plan.width, plan.width, 0};
    for (i64 row = offsets[sample]; row < offsets[sample + 1]; ++row) {
      if (skip(row)) continue;
      if (sums[row] - sums[row] != 0)
        plan.step.faults[row] = 1 + kBadSum;
      else
        search_row<T>(plan, row, offsets[sample], thread, &best);
    }
    write_sample(best, sample, out);
  });
}

}  // namespace

i64 beam_step_workspace(const BeamInputs& in, i64 width, int threads) {
  Arena arena(nullptr);
  plan_beams(in, width, threads, &arena, true);
  return arena.used();
}

i64 beam_step(const BeamInputs& in, const BeamOutputs& out, void* workspace, int threads) {
  Arena arena(workspace);
  const BeamPlan plan = plan_beams(in, out.scores.shape[1], threads, &arena, false);
  std::memset(plan.step.faults, 0, static_cast<std::size_t>(plan.step.rows));
  with_type(in.step.logits.dtype, [&](auto type) { run<decltype(type)>(plan, out, threads); });
  return first_fault(plan.step);
}

}  // namespace ofakern::OFAKERN_ISA
