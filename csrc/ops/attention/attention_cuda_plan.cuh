// The work lists, made on the device once per call: a warp per slot.
#pragma once

#include "ops/attention/attention_cuda_call.cuh"

namespace ofakern {
namespace {

struct Plans {
  QueryBlock* queries[2];  // lists with blocks of rows[n] queries, slots[n] of them
  int rows[2], slots[2];
  KeyTile* tiles;
  unsigned char* order;
  int tile_slots;
  KeyBlock* keys;  // blocks of key_rows keys
  int key_rows, key_slots;
  int query_list;  // of which KeyBlock's slots are
};

__device__ __forceinline__ int warp_least(int v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = min(v, simt::shuffle_xor(v, mask));
  return v;
}
__device__ __forceinline__ int warp_most(int v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = max(v, simt::shuffle_xor(v, mask));
  return v;
}

struct Block {
  int sample, begin, end;
};

__device__ __forceinline__ Block find_block(const int* offsets, int samples, int size, int slot) {
  Block block{0, 0, 0};
  for (int first = 0; first < samples; first += 32) {
    const int s = first + simt::lane();
    const bool mine =
        s < samples && slot_of(offsets[s], s, size) <= slot && slot < slot_of(offsets[s + 1], s + 1, size);
    const unsigned votes = simt::ballot(mine);
    if (votes == 0) continue;
    block.sample = first + __ffs(static_cast<int>(votes)) - 1;
    const int begin = offsets[block.sample], end = offsets[block.sample + 1];
    block.begin = min(begin + (slot - slot_of(begin, block.sample, size)) * size, end);
    block.end = min(block.begin + size, end);
    break;
  }
  return block;
}

__device__ __forceinline__ int2 meet(int2 a, int2 b) { return make_int2(max(a.x, b.x), min(a.y, b.y)); }

// Hull and intersection over the lanes' rows, added to one by one.
struct Hull {
  int lo = INT_MAX, hi = 0, full_lo = 0, full_hi = INT_MAX;
  __device__ __forceinline__ void add(int2 run) {
    if (run.y > run.x) {
      lo = min(lo, run.x);
      hi = max(hi, run.y);
    }
    full_lo = max(full_lo, run.x);
    full_hi = min(full_hi, max(run.x, run.y));
  }
  __device__ __forceinline__ void gather() {
    lo = warp_least(lo), hi = warp_most(hi), full_lo = warp_most(full_lo), full_hi = warp_least(full_hi);
    if (hi == 0) lo = 0;
  }
};

__device__ __forceinline__ void plan_queries(const Call& call, QueryBlock* to, int size, int slot) {
  const Block block = find_block(call.q_offsets, call.samples, size, slot);
  QueryBlock plan{block.sample, block.begin, block.end, 0, 0, 0, 0, 0, {}};
  Hull visible;
  for (int i = block.begin + simt::lane(); i < block.end; i += 32) visible.add(call.visible[i]);
  visible.gather();
  const int i = block.begin + simt::lane();
  plan.seeing = simt::ballot(i < block.end && call.visible[i].y > call.visible[i].x);
  plan.lo = visible.lo, plan.hi = visible.hi, plan.full_lo = visible.full_lo, plan.full_hi = visible.full_hi;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Term& term = call.terms[t];
    Hull active;
    int least = INT_MAX, most = INT_MIN;
    if (term.table != nullptr) {
      for (int i = block.begin + simt::lane(); i < block.end; i += 32) {
        const int2 run = meet(call.visible[i], term.same[i]);
        active.add(run);
        if (run.y > run.x) least = min(least, term.q_coord[i]), most = max(most, term.q_coord[i]);
      }
    }
    active.gather();
    plan.terms[t] = {active.lo, active.hi, active.full_lo, active.full_hi, warp_least(least), warp_most(most)};
  }
  if (simt::lane() == 0) to[slot] = plan;
}

// How many of the tile's keys stand before this lane's: those that are seen, by rising coordinate.
__device__ __forceinline__ int rank_of(int coordinate, unsigned seen, bool& repeats) {
  const bool mine = (seen >> simt::lane() & 1u) != 0;
  int rank = 0;
  bool twice = false;
  for (int n = 0; n < 32; ++n) {
    const int other = simt::shuffle(coordinate, n);
    if ((seen >> n & 1u) != (mine ? 1u : 0u)) {
      rank += mine ? 0 : 1;
    } else {
      rank += other < coordinate || (other == coordinate && n < simt::lane());
      twice = twice || (mine && other == coordinate && n != simt::lane());
    }
  }
  repeats = simt::any(twice);
  return rank;
}

__device__ __forceinline__ void plan_tile(const Call& call, const Plans& plans, int slot) {
  const Block block = find_block(call.k_offsets, call.samples, kStream, slot);
  const int key = block.begin + simt::lane();
  const bool seen = key < block.end && call.key_seen[key] != 0;
  KeyTile tile{};
  tile.seen = simt::ballot(seen);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const Term& term = call.terms[t];
    tile.least[t] = INT_MAX, tile.most[t] = INT_MIN;
    if (term.table == nullptr) continue;
    const int coordinate = seen ? term.k_coord[key] : INT_MAX;  // of what nobody sees it may be anything
    tile.least[t] = warp_least(coordinate);
    tile.most[t] = warp_most(seen ? coordinate : INT_MIN);
    bool repeats;
    const int rank = rank_of(coordinate, tile.seen, repeats);
    if (repeats) tile.repeats |= 1u << t;
    plans.order[t * call.order_of_term + std::int64_t{slot} * kStream + rank] =
        static_cast<unsigned char>(simt::lane());
  }
  if (simt::lane() == 0) plans.tiles[slot] = tile;
}

__device__ __forceinline__ void plan_keys(const Call& call, const Plans& plans, int slot) {
  const Block block = find_block(call.k_offsets, call.samples, plans.key_rows, slot);
  const int size = plans.rows[plans.query_list];
  int first = INT_MAX, last = 0;
  for (int s = simt::lane(); s < call.samples; s += 32) {
    const int2 range = call.k_range[s];
    if (block.begin < block.end && range.x < block.end && range.y > block.begin) {
      first = min(first, slot_of(call.q_offsets[s], s, size));
      last = max(last, slot_of(call.q_offsets[s + 1], s + 1, size));
    }
  }
  first = warp_least(first), last = warp_most(last);
  const int origin = call.k_offsets[block.sample];
  const int tile = slot_of(origin, block.sample, kStream) + (block.begin - origin) / kStream;
  if (simt::lane() == 0) plans.keys[slot] = {block.begin, block.end, min(first, last), last, tile, {}};
}

__global__ void __launch_bounds__(32) attention_plan(const Call call, const Plans plans) {
  int slot = static_cast<int>(blockIdx.x);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (slot >= 0 && slot < plans.slots[n]) plan_queries(call, plans.queries[n], plans.rows[n], slot);
    slot -= plans.slots[n];
  }
  if (slot >= 0 && slot < plans.tile_slots) plan_tile(call, plans, slot);
  slot -= plans.tile_slots;
  if (slot >= 0 && slot < plans.key_slots) plan_keys(call, plans, slot);
}

}  // namespace
}  // namespace ofakern
