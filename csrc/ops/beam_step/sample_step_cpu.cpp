// One drawn token per row. What may follow is listed in the order of ids; filters cut the list by a threshold that
// histograms find, so nothing is sorted. Compiled once per instruction set; see core/isa.h.
#include "ops/beam_step/step_rows.h"

namespace ofakern::OFAKERN_ISA {
namespace {

using u32 = std::uint32_t;

constexpr i64 kBins = 2048;
constexpr i64 kBlock = 64;  // entries whose maximum or sum is taken at once; tokens of a word of Bits

struct SampleScratch {
  Scratch rows;
  i32* tokens;       // [longest]; what is kept so far, ids ascending
  float* log_probs;  // [longest]
  float* weights;    // [longest]
  u32* keys;         // [longest]
  i32* places;       // [longest]
  double* bins;      // [kBins]
  i64 count;
  SampleScratch(Arena* arena, const StepPlan& plan)
      : rows(arena, plan),
        tokens(arena->take<i32>(plan.longest)),
        log_probs(arena->take<float>(plan.longest)),
        weights(arena->take<float>(plan.longest)),
        keys(arena->take<u32>(plan.longest)),
        places(arena->take<i32>(plan.longest)),
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
  for (i64 i = 0; i < s->count; ++i) {  // no branch: which one is kept is hard to foretell
    const bool kept = keep(i);
    s->tokens[count] = s->tokens[i];
    s->log_probs[count] = s->log_probs[i];
    s->weights[count] = s->weights[i];
    count += kept ? 1 : 0;
  }
  s->count = count;
}

// Of the entries in `places`, taken largest key first after entries that hold `before`: the key with which `limit` is
// reached. *before becomes what is held before that key.
template <class Weight>
OFAKERN_LOCAL u32 last_key(SampleScratch* s, i64 count, double limit, double* before, const Weight& weight) {
  u32 prefix = 0, known = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const u32 bins = shift == 0 ? 1024 : kBins;
    for (u32 b = 0; b < bins; ++b) s->bins[b] = 0;
    for (i64 i = 0; i < count; ++i) {
      const u32 key = s->keys[s->places[i]];
      if ((key & known) == prefix) s->bins[key >> shift & (bins - 1)] += weight(s->places[i]);
    }
    i64 bin = bins - 1, lowest = 0;
    double before_lowest = *before;
    for (; bin >= 0 && *before + s->bins[bin] < limit; --bin) {
      if (s->bins[bin] > 0) lowest = bin, before_lowest = *before;
      *before += s->bins[bin];
    }
    if (bin < 0) bin = lowest, *before = before_lowest;  // a finer histogram's sum rounds to less than the coarser's
    prefix |= static_cast<u32>(bin) << shift;
    known |= (bins - 1) << shift;
  }
  return prefix;
}

// Keeps entries, largest key first (equal keys: earlier first), while those before hold less than `limit`.
// weight(i): what entry i holds; coarse(i): a bin, the first for the largest keys, which spreads them evenly (the bits
// of a float do not).
template <class Weight, class Coarse>
OFAKERN_LOCAL void keep_largest(SampleScratch* s, double limit, const Weight& weight, const Coarse& coarse) {
  for (i64 b = 0; b < kBins; ++b) s->bins[b] = 0;
  for (i64 i = 0; i < s->count; ++i) s->bins[coarse(i)] += weight(i);
  double before = 0;
  i64 bin = 0;
  for (; bin < kBins && before + s->bins[bin] < limit; ++bin) before += s->bins[bin];
  if (bin == kBins) return;  // all of them together hold less
  i64 count = 0;
  for (i64 i = 0; i < s->count; ++i) {
    s->places[count] = static_cast<i32>(i);
    count += coarse(i) == bin ? 1 : 0;
  }
  const u32 last = last_key(s, count, limit, &before, weight);
  shorten(s, [&](i64 i) {
    if (coarse(i) != bin) return coarse(i) < bin;
    if (s->keys[i] != last) return s->keys[i] > last;
    const bool kept = before < limit;
    before += weight(i);
    return kept;
  });
}

// A bin for a distance from the best: 64 to each unit.
OFAKERN_HOT i64 bin_of(float distance) { return distance < 31.9f ? static_cast<i64>(distance * 64) : kBins - 1; }

OFAKERN_LOCAL float best_of(const SampleScratch* s) {
  Vec most = vset(kLowest);
  for (i64 i = 0; i + kWidth <= s->count; i += kWidth) most = vmax(most, vload(s->log_probs + i));
  float best = hmax(most);
  for (i64 i = s->count / kWidth * kWidth; i < s->count; ++i) best = max_of(best, s->log_probs[i]);
  return best;
}

// Weights in proportion to the probabilities, the best has 1; returns their sum.
OFAKERN_LOCAL double weigh(SampleScratch* s) {
  const float best = best_of(s);
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

// Keeps the most probable entries while those before hold less than `limit`.
template <class Weight>
OFAKERN_LOCAL void keep_probable(SampleScratch* s, double limit, const Weight& weight) {
  const float best = best_of(s);
  for (i64 i = 0; i < s->count; ++i) s->keys[i] = key_of(s->log_probs[i]);
  keep_largest(s, limit, weight, [&](i64 i) { return bin_of(best - s->log_probs[i]); });
}

// Drops entries below the top_k-th largest maximum of a block: as many are at least as large.
OFAKERN_LOCAL void drop_below_blocks(SampleScratch* s, i64 top_k) {
  constexpr i64 kMost = 1024;  // beyond it putting the maxima in order costs more than it saves
  if (top_k > s->count / kBlock || top_k > kMost) return;
  float* bounds = s->weights;
  i64 count = 0;
  for (i64 at = 0; at + kBlock <= s->count; at += kBlock) {
    Vec most = vload(s->log_probs + at);
    for (i64 i = kWidth; i < kBlock; i += kWidth) most = vmax(most, vload(s->log_probs + at + i));
    const float largest = hmax(most);
    if (count == top_k && !(largest > bounds[top_k - 1])) continue;
    i64 place = count < top_k ? count++ : top_k - 1;
    for (; place > 0 && largest > bounds[place - 1]; --place) bounds[place] = bounds[place - 1];
    bounds[place] = largest;
  }
  const float limit = bounds[top_k - 1];
  shorten(s, [&](i64 i) { return s->log_probs[i] >= limit; });
}

OFAKERN_LOCAL void keep_nucleus(SampleScratch* s, float mass) {
  const double limit = max_of(static_cast<double>(mass) * weigh(s), 1e-300);  // one is always left
  keep_probable(s, limit, [&](i64 i) { return static_cast<double>(s->weights[i]); });
}

OFAKERN_LOCAL void keep_typical(SampleScratch* s, float mass) {
  const double limit = max_of(static_cast<double>(mass) * weigh(s), 1e-300);
  double total = 0, mean = 0;  // log-probability of a token whose surprise is the entropy
  for (i64 i = 0; i < s->count; ++i) {
    total += static_cast<double>(s->weights[i]);
    mean += static_cast<double>(s->weights[i]) * static_cast<double>(s->log_probs[i]);
  }
  mean /= total;
  for (i64 i = 0; i < s->count; ++i)
    s->keys[i] = ~float_to_bits(static_cast<float>(std::fabs(static_cast<double>(s->log_probs[i]) - mean)));
  keep_largest(
      s, limit, [&](i64 i) { return static_cast<double>(s->weights[i]); },
      [&](i64 i) { return bin_of(bits_to_float(~s->keys[i])); });
}

OFAKERN_LOCAL void filter(const SampleInputs& in, i64 row, SampleScratch* s) {
  const i64 top_k = entry<i32>(in.top_k, row, 0);
  const float top_p = entry(in.top_p, row, 1.0f), typical_p = entry(in.typical_p, row, 1.0f);
  const float min_p = entry(in.min_p, row, 0.0f);
  if (top_k > 0 && top_k < s->count) {
    drop_below_blocks(s, top_k);
    keep_probable(s, static_cast<double>(top_k), [](i64) { return 1.0; });
  }
  if (top_p < 1) keep_nucleus(s, top_p);
  if (min_p > 0) {
    weigh(s);
    shorten(s, [&](i64 i) { return s->weights[i] >= min_p || s->weights[i] == 1.0f; });
  }
  if (typical_p < 1) keep_typical(s, typical_p);
}

// The place in the list where the cumulative weight exceeds uniform * total.
OFAKERN_LOCAL i64 draw(SampleScratch* s, float uniform) {
  const double wanted = static_cast<double>(uniform) * weigh(s);
  double cumulative = 0;
  i64 at = 0, last = 0;
  for (; at + kBlock <= s->count; at += kBlock) {
    DoubleSum sum = dzero();
    for (i64 i = 0; i < kBlock; i += kWidth) dadd(&sum, vload(s->weights + at + i));
    const double block = dtotal(sum);
    if (cumulative + block > wanted) break;
    cumulative += block;
    if (block > 0) last = at + kBlock - 1;
  }
  while (last > 0 && s->weights[last] == 0.0f) --last;  // where rounding leaves the sum below what is wanted
  for (; at < s->count; ++at) {
    if (s->weights[at] == 0.0f) continue;
    cumulative += static_cast<double>(s->weights[at]);
    last = at;
    if (cumulative > wanted) break;
  }
  return last;
}

// Lists kBlock tokens that no rule touches. False, and nothing is listed, when one of them has probability 0.
template <class T>
OFAKERN_LOCAL bool list_block(const T* logits, i64 first, const RowScores& scores, SampleScratch* s) {
  float x[kBlock];
  for (i64 i = 0; i < kBlock; i += kWidth) vstore(x + i, vmul(vload_as(logits + first + i), vset(scores.rules.scale)));
  float* log_probs = s->log_probs + s->count;
  i32* tokens = s->tokens + s->count;
  int impossible = 0;
  for (i64 i = 0; i < kBlock; ++i) {
    log_probs[i] = scores.plain(x[i]);
    tokens[i] = static_cast<i32>(first + i);
    impossible += log_probs[i] > kLowest ? 0 : 1;
  }
  if (impossible != 0) return false;
  s->count += kBlock;
  return true;
}

// Lists what may follow in a row whose softmax is over the vocabulary, with its log-probabilities.
template <class T>
OFAKERN_LOCAL void list_row(const StepPlan& plan, i64 row, const RowScores& scores, SampleScratch* s) {
  const StepInputs& in = *plan.in;
  const T* logits = in.logits.as<const T>() + row * in.logits.stride[0];
  const auto add = [&](i64 token) {
    const float p = scores.log_prob_of_logit(token, to_float(logits[token]));
    if (!(p > kLowest)) return;
    s->tokens[s->count] = static_cast<i32>(token);
    s->log_probs[s->count++] = p;
  };
  if (scores.rules.forced >= 0) {
    if (scores.rules.forced < plan.vocabulary) add(scores.rules.forced);
    return;
  }
  Bits& allowed = s->rows.allowed;
  if (scores.rules.state >= 0) {
    allow_state(plan, scores.rules, &allowed);
  } else {
    allowed.clear(0, plan.vocabulary);
    allowed.set_range(0, plan.vocabulary);
  }
  for (i64 w = 0; w < Bits::count(plan.vocabulary); ++w) {
    u64 word = allowed.word(w);
    if (word == ~u64{0} && scores.marks.special.word(w) == 0 && list_block(logits, w * kBlock, scores, s)) continue;
    for (; word != 0; word &= word - 1) add(w * kBlock + __builtin_ctzll(word));
  }
}

OFAKERN_LOCAL void list_listed(const RowScores& scores, SampleScratch* s) {
  const Scratch& listed = s->rows;
  int impossible = 0;
  for (i64 i = 0; i < listed.count; ++i) {
    s->tokens[i] = listed.tokens[i];
    s->log_probs[i] = scores.plain(listed.values[i]);
    impossible += s->log_probs[i] > kLowest ? 0 : 1;
  }
  for (i64 i = 0; i < listed.count && listed.special; ++i)
    if (scores.marks.special.at(listed.tokens[i]))
      s->log_probs[i] = scores.log_prob(listed.tokens[i], listed.values[i]);
  s->count = listed.count;
  const i64 forced = scores.rules.forced;
  if (impossible == 0 && !listed.special && forced < 0) return;
  shorten(s, [&](i64 i) { return s->log_probs[i] > kLowest && (forced < 0 || s->tokens[i] == forced); });
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
