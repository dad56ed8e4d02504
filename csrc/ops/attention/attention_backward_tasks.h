// Backward pass, the work shared out: which samples make a task, what a task owns, and the sums over tasks.
#pragma once

#include "ops/attention/attention_backward.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Samples whose queries see overlapping keys: their gradients of keys are summed by one task.
struct Cluster {
  std::int32_t begin, end;  // in the array of samples sorted by their keys
  Interval keys;
};

// Gradients of keys [begin, end), which no query sees.
template <class T>
OFAKERN_LOCAL void zero_keys(const Problem<T>& p, const BackwardTensors<T>& g, i64 key_head, i64 begin, i64 end) {
  for (i64 j = begin; j < end; ++j) {
    const i64 token = j * p.key_heads + key_head;
    zero_row(g.dk + token * p.width, p.width);
    zero_row(g.dv + token * p.value_width, p.value_width);
    if (p.joined > 0) zero_row(g.dk_pos + token * p.joined, p.joined);
  }
}

// Writes dk, dv and a joined dk_pos of a member's keys from their transposed sums.
template <class T>
OFAKERN_LOCAL void close_keys(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s,
                              const BackwardMember<T>& member, i64 key_head) {
  constexpr i64 kKeys = BackwardScratch<T>::kKeys;
  const i64 width = max_of(p.depth, p.columns);
  float* rows = reinterpret_cast<float*>(s.units);  // kKeys x width floats do not fit: go by 16 keys
  constexpr i64 kStep = 16;
  for (i64 tile = 0; tile < member.keys.tile_count(); ++tile) {
    const i64 tile_keys = member.keys.tile_keys(tile), begin = member.keys.first + tile * kKeys;
    if (!member.touched[tile]) {
      zero_keys(p, g, key_head, begin, begin + tile_keys);
      continue;
    }
    for (i64 j0 = 0; j0 < tile_keys; j0 += kStep) {
      const i64 keys = min_of(kStep, tile_keys - j0), token = (begin + j0) * p.key_heads + key_head;
      transpose_units(as_units(member.dk + tile * kKeys * p.depth + j0), kKeys, p.depth, kStep, as_units(rows), width);
      for (i64 j = 0; j < keys; ++j) {
        store_scaled(rows + j * width, p.width, p.scale, g.dk + (token + j * p.key_heads) * p.width);
        if (p.joined > 0)
          store_scaled(rows + j * width + p.width, p.joined, p.scale, g.dk_pos + (token + j * p.key_heads) * p.joined);
      }
      transpose_units(as_units(member.dv + tile * kKeys * p.columns + j0), kKeys, p.columns, kStep, as_units(rows),
                      width);
      for (i64 j = 0; j < keys; ++j)
        store_scaled(rows + j * width, p.value_width, 1.0f, g.dv + (token + j * p.key_heads) * p.value_width);
    }
  }
}

// Writes the task's part of dk_pos from its transposed sums.
template <class T>
OFAKERN_LOCAL void close_positions(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s, i64 at,
                                   i64 key_head) {
  constexpr i64 kKeys = BackwardScratch<T>::kKeys, kStep = 16;
  float* rows = reinterpret_cast<float*>(s.units);
  for (i64 tile = 0; tile < s.positions.tile_count(); ++tile)
    for (i64 j0 = 0; j0 < s.positions.tile_keys(tile); j0 += kStep) {
      const i64 keys = min_of(kStep, s.positions.tile_keys(tile) - j0);
      if (s.dpositions.touched[tile])
        transpose_units(as_units(s.dpositions.dk + tile * kKeys * p.pos_depth + j0), kKeys, p.pos_depth, kStep,
                        as_units(rows), p.pos_depth);
      else
        zero_row(rows, kStep * p.pos_depth);
      for (i64 j = 0; j < keys; ++j)
        store_scaled(rows + j * p.pos_depth, p.pos_width, 1.0f,
                     g.partial_k_pos + ((at + tile * kKeys + j0 + j) * p.key_heads + key_head) * p.pos_width);
    }
}

// Sorts samples by their keys and joins those that overlap. Samples that see nothing stand in the first cluster.
template <class T>
OFAKERN_LOCAL i64 make_clusters(const Problem<T>& p, std::int32_t* order, Cluster* clusters) {
  for (i64 s = 0; s < p.samples; ++s) {
    const Interval range = p.k_range[s].empty() ? Interval{-1, -1} : p.k_range[s];
    i64 at = s;  // insertion: batches come sorted, or nearly so
    for (; at > 0; --at) {
      const Interval other = p.k_range[order[at - 1]];
      if ((other.empty() ? -1 : other.lo) <= range.lo) break;
      order[at] = order[at - 1];
    }
    order[at] = static_cast<std::int32_t>(s);
  }
  i64 count = 0;
  for (std::int32_t at = 0; at < p.samples; ++at) {
    const Interval range = p.k_range[order[at]];
    if (count > 0 && (range.empty() || clusters[count - 1].keys.empty() || range.lo < clusters[count - 1].keys.hi)) {
      Cluster& open = clusters[count - 1];
      open.end = at + 1;
      if (open.keys.empty()) open.keys = range;
      if (!range.empty()) open.keys.hi = max_of(open.keys.hi, range.hi);
    } else {
      clusters[count++] = {at, at + 1, range.empty() ? Interval{0, 0} : range};
    }
  }
  return count;
}

// With shared positions a task is a chunk and a key head; `rows`: where its partial gradients of the positions begin.
struct PositionTask {
  Chunk chunk;
  PositionRows rows;
};

// Fills `tasks` (or only counts, when null); `end` is behind the last row of the partial gradients.
template <class T>
OFAKERN_LOCAL i64 position_tasks(const Problem<T>& p, PositionTask* tasks, PositionRows& end) {
  i64 count = 0;
  end = {0, 0};
  if (!p.shared()) return 0;
  for_chunks(p, [&](const Chunk& chunk) {
    if (tasks != nullptr) tasks[count] = {chunk, end};
    end = {end.q + chunk.q_rows, end.k + chunk.k_rows};
    ++count;
  });
  return count;
}

template <class T>
struct BackwardMemory {
  std::int32_t* order;
  Cluster* clusters;
  i64 cluster_count;
  float* partial_tables[2];
  float* partial_head_scale;
  PositionTask* tasks;  // of shared positions
  i64 task_count;
  float *partial_q_pos, *partial_k_pos;
  char* threads;
  i64 bytes_per_thread, span;

  // Longest hull over clusters, without memory to sort in: chains of overlapping samples end to end.
  static i64 longest_cluster(const Problem<T>& p) {
    i64 lo = p.keys, hi = 0, longest = 0;
    bool sorted = true;
    Interval open = {0, 0};
    std::int32_t previous = -1;
    for (i64 s = 0; s < p.samples; ++s) {
      const Interval range = p.k_range[s];
      if (range.empty()) continue;
      sorted = sorted && range.lo >= previous;
      previous = range.lo;
      lo = min_of<i64>(lo, range.lo);
      hi = max_of<i64>(hi, range.hi);
      open = open.empty() || range.lo >= open.hi ? range : Interval{open.lo, max_of(open.hi, range.hi)};
      longest = max_of<i64>(longest, open.hi - open.lo);
    }
    return sorted ? longest : max_of<i64>(0, hi - lo);
  }

  static BackwardMemory take(Problem<T>& p, int threads, Arena& arena) {
    BackwardMemory memory = {};
    take_reversed_tables(p, arena);
    memory.order = arena.take<std::int32_t>(p.samples);
    memory.clusters = arena.take<Cluster>(p.samples);
    for (int t = 0; t < p.term_count; ++t)
      memory.partial_tables[t] = arena.take<float>(p.samples * p.heads * p.terms[t].rows);
    memory.partial_head_scale = arena.take<float>(p.samples * p.heads);
    PositionRows rows;
    memory.task_count = position_tasks(p, nullptr, rows);
    memory.tasks = arena.take<PositionTask>(memory.task_count);
    memory.partial_q_pos = arena.take<float>(rows.q * p.heads * p.pos_width);
    memory.partial_k_pos = arena.take<float>(rows.k * p.key_heads * p.pos_width);
    memory.span = p.shared() ? p.max_span() : longest_cluster(p);
    Arena one(nullptr);
    BackwardScratch<T>::take(p, memory.span, one);
    memory.bytes_per_thread = round_up(one.used(), 4096) + 64;
    memory.threads = arena.take<char>(memory.bytes_per_thread * threads);
    return memory;
  }
};

// All queries of the scratch's members, for the heads that share one key head.
template <class T>
OFAKERN_LOCAL void backward_members(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s,
                                    const Chunk& chunk, PositionRows at, i64 key_head) {
  const auto run = p.term_count == 0   ? backward_block<0, T>
                   : p.term_count == 1 ? backward_block<1, T>
                                       : backward_block<2, T>;
  for (i64 head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
    for (i64 m = 0; m < s.member_count; ++m) {
      BackwardMember<T>& member = s.members[m];
      const i64 slot = member.sample * p.heads + head;
      for (int t = 0; t < p.term_count; ++t) {
        member.dtables[t] = g.partial_tables[t] + slot * p.terms[t].rows;
        zero_row(member.dtables[t], p.terms[t].rows);
      }
      member.dhead_scale = g.partial_head_scale + slot;
      *member.dhead_scale = 0.0f;
    }
    for (i64 first = 0; first < chunk.q_rows; first += s.kQueries)
      run(p, g, s, chunk, at, head, first, min_of(s.kQueries, chunk.q_rows - first));
  }
}

template <class T>
OFAKERN_LOCAL void open_keys(const Problem<T>& p, BackwardMember<T>& member, i64 key_head, Interval keys) {
  member.keys.pack(p, key_head, keys, true);
  for (i64 tile = 0; tile < member.keys.tile_count(); ++tile) member.touched[tile] = false;
}

// A cluster's samples, one after the other on the same keys.
template <class T>
OFAKERN_LOCAL void backward_cluster(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s,
                                    const Cluster& cluster, const std::int32_t* order, i64 key_head) {
  BackwardMember<T>& member = s.members[0];
  s.member_count = 1;
  open_keys(p, member, key_head, cluster.keys);
  for (i64 at = cluster.begin; at < cluster.end; ++at) {
    const i64 rows = p.queries_of(order[at]);
    member.set(p, order[at], 0, rows);
    backward_members(p, g, s, Chunk{0, 0, 1, rows, 0}, PositionRows{}, key_head);
  }
  close_keys(p, g, s, member, key_head);
}

// A chunk's samples together, each on its own keys.
template <class T>
OFAKERN_LOCAL void backward_chunk(const Problem<T>& p, const BackwardTensors<T>& g, BackwardScratch<T>& s,
                                  const PositionTask& task, i64 key_head) {
  s.member_count = task.chunk.to - task.chunk.from;
  for (i64 m = 0; m < s.member_count; ++m) {
    const i64 sample = p.members[task.chunk.from + m];
    s.members[m].set(p, sample, 0, p.queries_of(sample));
    open_keys(p, s.members[m], key_head, p.keys_of(sample));
  }
  s.positions.pack(p, task.chunk, key_head, true);
  for (i64 tile = 0; tile < s.positions.tile_count(); ++tile) s.dpositions.touched[tile] = false;
  backward_members(p, g, s, task.chunk, task.rows, key_head);
  for (i64 m = 0; m < s.member_count; ++m) {
    const i64 sample = s.members[m].sample;
    const Interval keys = p.keys_of(sample);
    close_keys(p, g, s, s.members[m], key_head);
    zero_keys(p, g, key_head, keys.empty() ? p.k_offsets[sample] : keys.hi, p.k_offsets[sample + 1]);
  }
  close_positions(p, g, s, task.rows.k, key_head);
}

struct PartRows {
  i64 first, count, at;
};

// Writes rows of a position gradient: the chunks' parts, added in the chunks' order to the first that has the row.
// chunk_rows(n) says which rows [first, first + count) chunk n has, and where its part begins.
template <class T, class ChunkRows>
OFAKERN_LOCAL void reduce_positions(i64 rows, i64 width, i64 chunks, float* partial, float scale, T* gradient,
                                    int threads, const ChunkRows& chunk_rows) {
  constexpr i64 kBlock = 32;
  parallel_for(ceil_div(rows, kBlock), threads, [&](i64 block, int) {
    for (i64 r = block * kBlock; r < min_of(rows, (block + 1) * kBlock); ++r) {
      float* sum = nullptr;
      for (i64 n = 0; n < chunks; ++n) {
        const auto part = chunk_rows(n);
        if (r < part.first || r >= part.first + part.count) continue;
        float* row = partial + (part.at + r - part.first) * width;
        if (sum == nullptr)
          sum = row;
        else
          for (i64 x = 0; x < width; x += kWidth)
            vstore_n(sum + x, vadd(vload_n(sum + x, width - x), vload_n(row + x, width - x)), width - x);
      }
      if (sum == nullptr)
        zero_row(gradient + r * width, width);
      else
        store_scaled(sum, width, scale, gradient + r * width);
    }
  });
}

// Sums the samples' partial gradients, in their order.
template <class T>
OFAKERN_LOCAL void reduce_partials(const Problem<T>& p, const BackwardTensors<T>& g, int threads) {
  parallel_for(p.heads, threads, [&](i64 head, int) {
    for (int t = 0; t < p.term_count; ++t) {
      const i64 rows = p.terms[t].rows;
      float* gradient = g.dtables[t] + head * rows;
      zero_row(gradient, rows);
      for (i64 sample = 0; sample < p.samples; ++sample) {
        const float* partial = g.partial_tables[t] + (sample * p.heads + head) * rows;
        for (i64 r = 0; r < rows; ++r) gradient[r] += partial[rows - 1 - r];
      }
    }
    if (g.dhead_scale == nullptr) return;
    g.dhead_scale[head] = 0.0f;
    for (i64 sample = 0; sample < p.samples; ++sample)
      g.dhead_scale[head] += g.partial_head_scale[sample * p.heads + head];
  });
}

template <class T>
OFAKERN_LOCAL void backward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                            const TensorView& dout, const TensorView& dlse, const AttentionGradients& gradients,
                            void* workspace, int threads) {
  Problem<T> p = make_problem<T>(in);
  Arena arena(workspace);
  const BackwardMemory<T> memory = BackwardMemory<T>::take(p, threads, arena);
  BackwardTensors<T> g = {};
  g.out = out.as<const T>();
  g.lse = lse.as<const float>();
  take_strides(dout, &g.dout, g.dout_stride);
  g.dlse = dlse.defined() ? dlse.as<const float>() : nullptr;
  g.dq = gradients.dq.as<T>();
  g.dk = gradients.dk.as<T>();
  g.dv = gradients.dv.as<T>();
  g.dq_pos = gradients.dq_pos.defined() ? gradients.dq_pos.as<T>() : nullptr;
  g.dk_pos = gradients.dk_pos.defined() ? gradients.dk_pos.as<T>() : nullptr;
  for (int t = 0, slot = 0; slot < 2; ++slot)
    if (in.terms[slot].table.defined()) {
      g.dtables[t] = gradients.dtables[slot].as<float>();
      g.partial_tables[t] = memory.partial_tables[t];
      ++t;
    }
  g.dhead_scale = gradients.dhead_scale.defined() ? gradients.dhead_scale.as<float>() : nullptr;
  g.partial_head_scale = memory.partial_head_scale;

  g.partial_q_pos = memory.partial_q_pos;
  g.partial_k_pos = memory.partial_k_pos;
  reverse_tables(p, threads);
  const auto run = [&](i64 tasks, const auto& task) {
    parallel_for(tasks * p.key_heads, threads, [&](i64 index, int thread) {
      Arena own(memory.threads + memory.bytes_per_thread * thread);
      BackwardScratch<T> scratch = BackwardScratch<T>::take(p, memory.span, own);
      const AmxTiles tiles;
      task(scratch, index / p.key_heads, index % p.key_heads);
    });
  };
  if (p.shared()) {
    PositionRows rows;
    position_tasks(p, memory.tasks, rows);
    run(memory.task_count, [&](BackwardScratch<T>& scratch, i64 task, i64 key_head) {
      backward_chunk(p, g, scratch, memory.tasks[task], key_head);
    });
    const auto q_rows = [&](i64 n) {
      const PositionTask& task = memory.tasks[n];
      return PartRows{p.sets[task.chunk.set].q_first, task.chunk.q_rows, task.rows.q};
    };
    const auto k_rows = [&](i64 n) {
      const PositionTask& task = memory.tasks[n];
      return PartRows{p.sets[task.chunk.set].k_first, task.chunk.k_rows, task.rows.k};
    };
    reduce_positions(in.q_pos.shape[0], p.heads * p.pos_width, memory.task_count, g.partial_q_pos, p.scale, g.dq_pos,
                     threads, q_rows);
    reduce_positions(in.k_pos.shape[0], p.key_heads * p.pos_width, memory.task_count, g.partial_k_pos, p.scale,
                     g.dk_pos, threads, k_rows);
  } else {
    const i64 clusters = make_clusters(p, memory.order, memory.clusters);
    run(clusters, [&](BackwardScratch<T>& scratch, i64 c, i64 key_head) {
      const Cluster& cluster = memory.clusters[c];
      backward_cluster(p, g, scratch, cluster, memory.order, key_head);
      zero_keys(p, g, key_head, c == 0 ? 0 : memory.clusters[c - 1].keys.hi, cluster.keys.lo);
      if (c == clusters - 1) zero_keys(p, g, key_head, cluster.keys.hi, p.keys);
    });
    if (clusters == 0)
      for (i64 key_head = 0; key_head < p.key_heads; ++key_head) zero_keys(p, g, key_head, 0, p.keys);
  }
  reduce_partials(p, g, threads);
}

}  // namespace
}  // namespace ofakern::OFAKERN_ISA
