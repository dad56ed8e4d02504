// One drawn token per row. What may follow is listed in the order of ids; filters cut the list by a threshold that a
// histogram over the bits of the keys finds, so nothing is sorted. Compiled once per instruction set; see core/isa.h.
#include "ops/beam_step/step_rows.h"

namespace ofakern::OFAKERN_ISA {
namespace {

using u32 = std::uint32_t;

constexpr i64 kBins = 2048;

struct SampleScratch {
  Scratch rows;
  i32* tokens;       // [vocabulary]; what is kept so far, ids ascending (ragged rows: as given)
  float* log_probs;  // [vocabulary]
  float* weights;    // [vocabulary]
  u32* keys;         // [vocabulary]
  double* bins;      // [kBins]
  i64 count;
  SampleScratch(Arena* arena, const StepPlan& plan)
      : rows(arena, plan),
        tokens(arena->take<i32>(plan.longest)),
        log_probs(arena->take<float>(plan.longest)),
        weights(arena->take<float>(plan.longest)),
        keys(arena->take<u32>(plan.longest)),
        bins(arena->take<double>(kBins)),
        count(0) {}
};

struct SamplePlan {
  StepPlan step;
  const SampleInputs* in;
  SampleScratch* scratch;  // [threads]
};

OFAKERN_LOCAL SamplePlan plan_samples(const SampleInputs& in, int threads, Arena* arena, bool measure) {
  SamplePlan plan = {};
  plan.in = &in;
  plan.step = plan_step(in.step, arena);
  plan.scratch = arena->take<SampleScratch>(threads);
  for (int t = 0; t < threads; ++t) {
    const SampleScratch scratch(arena, plan.step);
    if (!measure) plan.scratch[t] = scratch;
  }
  return plan;
}

// Larger floats have larger keys; -0 is 0.
OFAKERN_HOT u32 key_of(float x) {
  const u32 bits = float_to_bits(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Shortens the lists to the entries of which keep(i) holds.
template <class Keep>
OFAKERN_LOCAL void shorten(SampleScratch* s, const Keep& keep) {
  i64 count = 0;
  for (i64 i = 0; i < s->count; ++i) {
    if (!keep(i)) continue;
    s->tokens[count] = s->tokens[i];
    s->log_probs[count] = s->log_probs[i];
    s->weights[count++] = s->weights[i];
  }
  s->count = count;
}

// Keeps entries, largest key first (equal keys: earlier first), while those before hold less than `limit`.
// weight(i): what entry i holds.
template <class Weight>
OFAKERN_LOCAL void keep_largest(SampleScratch* s, double limit, const Weight& weight) {
  u32 prefix = 0, known = 0;
  double before = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const u32 bins = shift == 0 ? 1024 : kBins;
    for (u32 b = 0; b < bins; ++b) s->bins[b] = 0;
    for (i64 i = 0; i < s->count; ++i)
      if ((s->keys[i] & known) == prefix) s->bins[s->keys[i] >> shift & (bins - 1)] += weight(i);
    i64 bin = bins - 1, lowest = -1;
    double before_lowest = before;
    for (; bin >= 0 && before + s->bins[bin] < limit; --bin) {
      if (s->bins[bin] > 0) lowest = bin, before_lowest = before;
      before += s->bins[bin];
    }
    if (bin < 0 && shift == 21) return;                 // all of them together hold less
    if (bin < 0) bin = lowest, before = before_lowest;  // a finer histogram's sum rounds to less than the coarser's
    prefix |= static_cast<u32>(bin) << shift;
    known |= (bins - 1) << shift;
  }
  shorten(s, [&](i64 i) {
    if (s->keys[i] != prefix) return s->keys[i] > prefix;
    const bool kept = before < limit;
    before += weight(i);
    return kept;
  });
}

// Weights in proportion to the probabilities, the best has 1; returns their sum.
OFAKERN_LOCAL double weigh(SampleScratch* s) {
  float best = kLowest;
  for (i64 i = 0; i < s->count; ++i) best = max_of(best, s->log_probs[i]);
  DoubleSum sum = dzero();
  for (i64 i = 0; i < s->count; i += kWidth) {
    const i64 left = s->count - i;
    Vec w = exp_of(vsub(vload_n(s->log_probs + i, left), vset(best)));
    vstore_n(s->weights + i, w, left);
    if (left < kWidth) {
      float rest[kWidth] = {};
      for (i64 l = 0; l < left; ++l) rest[l] = s->weights[i + l];
      w = vload(rest);
    }
    dadd(&sum, w);
  }
  return dtotal(sum);
}

OFAKERN_LOCAL void key_by_probability(SampleScratch* s) {
  for (i64 i = 0; i < s->count; ++i) s->keys[i] = key_of(s->log_probs[i]);
}

OFAKERN_LOCAL void keep_typical(SampleScratch* s, float mass) {
  const double total = weigh(s);
  double mean = 0;  // log-probability of a token whose surprise is the entropy
  for (i64 i = 0; i < s->count; ++i) mean += static_cast<double>(s->weights[i]) * static_cast<double>(s->log_probs[i]);
  mean /= total;
  for (i64 i = 0; i < s->count; ++i)
    s->keys[i] = ~float_to_bits(static_cast<float>(std::fabs(static_cast<double>(s->log_probs[i]) - mean)));
  keep_largest(s, static_cast<double>(mass) * total, [&](i64 i) { return static_cast<double>(s->weights[i]); });
}

OFAKERN_LOCAL void filter(const SampleInputs& in, i64 row, SampleScratch* s) {
  const i64 top_k = entry<i32>(in.top_k, row, 0);
  const float top_p = entry(in.top_p, row, 1.0f), typical_p = entry(in.typical_p, row, 1.0f);
  const float min_p = entry(in.min_p, row, 0.0f);
  if (top_k > 0 && top_k < s->count) {
    key_by_probability(s);
    keep_largest(s, static_cast<double>(top_k), [](i64) { return 1.0; });
  }
  if (top_p < 1) {
    const double total = weigh(s);
    key_by_probability(s);
    const double limit = max_of(static_cast<double>(top_p) * total, 1e-300);  // one is always left
    keep_largest(s, limit, [&](i64 i) { return static_cast<double>(s->weights[i]); });
  }
  if (min_p > 0) {
    weigh(s);
    shorten(s, [&](i64 i) { return s->weights[i] >= min_p || s->weights[i] == 1.0f; });
  }
  if (typical_p < 1) keep_typical(s, typical_p);
}

// The place in the list where the cumulative weight exceeds uniform * total.
OFAKERN_LOCAL i64 draw(SampleScratch* s, float uniform) {
  weigh(s);
  double total = 0, cumulative = 0;
  for (i64 i = 0; i < s->count; ++i) total += static_cast<double>(s->weights[i]);
  const double wanted = static_cast<double>(uniform) * total;
  i64 last = 0;
  for (i64 i = 0; i < s->count; ++i) {
    if (s->weights[i] == 0.0f) continue;
    cumulative += static_cast<double>(s->weights[i]);
    last = i;
    if (cumulative > wanted) break;
  }
  return last;
}

// Lists what may follow in a row whose softmax is over the vocabulary, with its log-probabilities.
template <class T>
OFAKERN_LOCAL void list_row(const StepPlan& plan, i64 row, const RowScores& scores, SampleScratch* s) {
  const StepInputs& in = *plan.in;
  const T* logits = in.logits.as<const T>() + row * in.logits.stride[0];
  const auto add = [&](i64 token) {
    const float logit = to_float(logits[token]);
    const float p = scores.marks.special.at(token) ? scores.log_prob_of_logit(token, logit)
                                                   : scores.plain(logit * scores.rules.scale);
    if (!(p > kLowest)) return;
    s->tokens[s->count] = static_cast<i32>(token);
    s->log_probs[s->count++] = p;
  };
  if (scores.rules.forced >= 0) {
    if (scores.rules.forced < plan.vocabulary) add(scores.rules.forced);
  } else if (scores.rules.state >= 0) {
    allow_state(plan, scores.rules, &s->rows.allowed);
    s->rows.allowed.each(0, plan.vocabulary, add);
  } else {
    for (i64 token = 0; token < plan.vocabulary; ++token) add(token);
  }
}

OFAKERN_LOCAL void list_listed(const RowScores& scores, SampleScratch* s) {
  for (i64 i = 0; i < s->rows.count; ++i) {
    const i32 token = s->rows.tokens[i];
    if (scores.rules.forced >= 0 && token != scores.rules.forced) continue;
    const float p = scores.log_prob(token, s->rows.values[i]);
    if (!(p > kLowest)) continue;
    s->tokens[s->count] = token;
    s->log_probs[s->count++] = p;
  }
}

template <class T>
OFAKERN_LOCAL void sample_row(const SamplePlan& plan, i64 row, SampleScratch* s, i32* token, float* log_prob) {
  *token = -1;
  *log_prob = kLowest;
  RowScores scores;
  if (!is_live(plan.step, row) || !score_row<T>(plan.step, row, &s->rows, &scores)) return;
  s->count = 0;
  if (scores.rules.alone)
    list_listed(scores, s);
  else
    list_row<T>(plan.step, row, scores, s);
  if (s->count == 0) return;
  filter(*plan.in, row, s);
  const i64 place = draw(s, plan.in->uniforms.as<const float>()[row]);
  *token = s->tokens[place];
  *log_prob = s->log_probs[place];
}

}  // namespace

i64 sample_step_workspace(const SampleInputs& in, int threads) {
  Arena arena(nullptr);
  plan_samples(in, threads, &arena, true);
  return arena.used();
}

i64 sample_step(const SampleInputs& in, const TensorView& tokens, const TensorView& log_probs, void* workspace,
                int threads) {
  Arena arena(workspace);
  const SamplePlan plan = plan_samples(in, threads, &arena, false);
  std::memset(plan.step.faults, 0, static_cast<std::size_t>(plan.step.rows));
  with_type(in.step.logits.dtype, [&](auto type) {
    using T = decltype(type);
    const auto skip = [&](i64 row) { return !is_live(plan.step, row); };
    sum_rows<T>(plan.step, threads, skip, [&](int thread) -> Marks& { return plan.scratch[thread].rows.marks; });
    parallel_for(plan.step.rows, threads, [&](i64 row, int thread) {
      sample_row<T>(plan, row, plan.scratch + thread, tokens.as<i32>() + row, log_probs.as<float>() + row);
    });
  });
  return first_fault(plan.step);
}

}  // namespace ofakern::OFAKERN_ISA
