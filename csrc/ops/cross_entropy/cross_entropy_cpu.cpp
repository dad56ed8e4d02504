// Compiled once per instruction set; see core/isa.h.
#include "core/with_type.h"
#include "ops/cross_entropy/cross_entropy_gradient.h"

namespace ofakern::OFAKERN_ISA {
namespace {

OFAKERN_LOCAL Wanted wanted(bool losses, bool best, const CrossEntropyGradients& gradients) {
  return {losses, best, gradients.dhidden.defined(), gradients.dweight.defined(), gradients.dbias.defined()};
}

template <class T>
struct Pass {
  Problem<T> p;
  Wanted want;
  Chunk<T> c;
  int threads;
  CrossEntropyLosses losses;
  CrossEntropyGradients gradients;
  const float *dloss, *lse;  // of a backward call

  // Tokens with a label; a backward call leaves out those without a gradient too.
  i64 choose() {
    i64 count = 0;
    for (i64 i = 0; i < p.tokens; ++i)
      if (p.labels[i] != kIgnored && (dloss == nullptr || dloss[i] != 0.0f)) c.chosen[count++] = i;
    return count;
  }

  void clear() {
    const std::size_t bytes = static_cast<std::size_t>(p.tokens) * sizeof(float);
    // Without tokens there may be no memory, and memset must not see that.
    if (want.losses && bytes > 0) {
      std::memset(losses.loss.data, 0, bytes);
      std::memset(losses.nll.data, 0, bytes);
      std::memset(losses.lse.data, 0, bytes);
      for (i64 i = 0; want.best && i < p.tokens; ++i) losses.best.as<i64>()[i] = kIgnored;
    }
    if (want.dhidden && bytes > 0) zero_row(gradients.dhidden.as<T>(), p.tokens * p.width);
    if (want.dbias) zero_row(c.dbias, p.vocabulary);
  }

  // body(task, bench) with tiles configured; which thread runs a task changes nothing.
  template <class Body>
  void each_of(i64 tasks, const Body& body) {
    parallel_for(tasks, threads, [&](i64 task, int thread) {
      const AmxTiles tiles;
      body(task, c.benches[thread]);
    });
  }

  // Pads of the last group: probability and coefficients 0.
  void pad_tokens() {
    for (i64 token = c.count; token < round_up(c.count, kTokenMultiple); ++token) {
      c.lse[token] = kInfinity;
      c.scale[token] = c.each[token] = c.label_scale[token] = 0.0f;
      for (i64 b = 0; c.block_max != nullptr && b < p.blocks(); ++b) c.block_max[b * c.capacity + token] = 0.0f;
    }
  }

  // Allowed ids of each token: of a backward call they are counted from the bits.
  void take_dloss() {
    for (i64 token = 0; token < c.count; ++token) {
      const i64 row = c.row(token);
      c.lse[token] = lse[row];
      c.allowed[token] = static_cast<float>(p.vocabulary);
    }
    if (p.masked()) {
      each_of(c.groups(), [&](i64 group, Workbench<T>&) {
        const std::uint64_t* bits = c.bits + group * p.vocabulary;
        for (i64 t = 0; t < c.group_tokens(group); ++t) {
          i64 allowed = 0;
          for (i64 v = 0; v < p.vocabulary; ++v) allowed += static_cast<i64>(bits[v] >> t & 1u);
          c.allowed[group * kGroup + t] = static_cast<float>(allowed);
        }
      });
    }
    for (i64 token = 0; token < c.count; ++token) set_coefficients(p, c, token, dloss[c.row(token)]);
  }

  void run_chunk(bool add) {
    const i64 groups = c.groups();
    each_of(groups, [&](i64 group, Workbench<T>& bench) {
      pack_group(p, c, bench, group);
      if (p.masked()) mark_allowed(p, c, group);
    });
    if (p.masked()) each_of(p.blocks(), [&](i64 block, Workbench<T>&) { find_used(p, c, block); });
    if (want.losses) {
      each_of(p.blocks(), [&](i64 block, Workbench<T>& bench) { score_block(p, c, bench, block); });
      each_of(groups, [&](i64 group, Workbench<T>&) { finish_losses(p, c, losses, group); });
    } else {
      take_dloss();
    }
    if (!want.gradients()) return;
    pad_tokens();
    T* dweight = want.dweight ? gradients.dweight.as<T>() : nullptr;
    each_of(kPartials, [&](i64 run, Workbench<T>& bench) { gradient_of_run(p, c, bench, run, add, dweight); });
    if (want.dhidden) {
      T* dhidden = gradients.dhidden.as<T>();
      each_of(groups, [&](i64 group, Workbench<T>&) { finish_dhidden(p, c, group, dhidden); });
    }
  }

  void run() {
    clear();
    const i64 total = choose();
    if (total == 0) {
      if (want.dweight) zero_row(gradients.dweight.as<T>(), p.vocabulary * p.width);
    } else {
      const i64 chunks = ceil_div(total, c.capacity), share = round_up(ceil_div(total, chunks), kGroup);
      for (c.first = 0; c.first < total; c.first += share) {
        c.count = min_of(share, total - c.first);
        run_chunk(c.first > 0);
      }
    }
    if (want.dbias)
      for (i64 v = 0; v < p.vocabulary; ++v) from_float(c.dbias[v], gradients.dbias.as<T>() + v);
  }
};

template <class T>
OFAKERN_LOCAL void run_pass(const CrossEntropyInputs& in, const Wanted& want, const CrossEntropyLosses& losses,
                            const CrossEntropyGradients& gradients, const float* dloss, const float* lse,
                            void* workspace, int threads) {
  Pass<T> pass = {make_problem<T>(in), want, {}, threads, losses, gradients, dloss, lse};
  Arena arena(workspace);
  pass.c = Chunk<T>::take(pass.p, want, threads, arena);
  pass.run();
}

}  // namespace

i64 cross_entropy_workspace(const CrossEntropyInputs& in, bool with_losses, bool with_best,
                            const CrossEntropyGradients& gradients, int threads) {
  return with_type(in.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena(nullptr);
    Chunk<T>::take(make_problem<T>(in), wanted(with_losses, with_best, gradients), threads, arena);
    return arena.used();
  });
}

void cross_entropy_forward(const CrossEntropyInputs& in, const CrossEntropyLosses& losses,
                           const CrossEntropyGradients& gradients, const TensorView& workspace, int threads) {
  with_type(in.hidden.dtype, [&](auto type) {
    run_pass<decltype(type)>(in, wanted(true, losses.best.defined(), gradients), losses, gradients, nullptr, nullptr,
                             workspace.data, threads);
  });
}

void cross_entropy_backward(const CrossEntropyInputs& in, const TensorView& dloss, const TensorView& lse,
                            const CrossEntropyGradients& gradients, const TensorView& workspace, int threads) {
  with_type(in.hidden.dtype, [&](auto type) {
    run_pass<decltype(type)>(in, wanted(false, false, gradients), {}, gradients, dloss.as<const float>(),
                             lse.as<const float>(), workspace.data, threads);
  });
}

}  // namespace ofakern::OFAKERN_ISA
