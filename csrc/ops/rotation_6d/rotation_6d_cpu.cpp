// Sixteen rotations at a time, one per lane of plain loops, which compilers turn into vector code on every instruction
// set. Compiled once per instruction set; see core/isa.h.
#include "core/parallel.h"
#include "core/with_type.h"
#include "ops/rotation_6d/rotation_6d.h"

namespace ofakern::OFAKERN_ISA {
namespace {

constexpr int kLanes = 16;
constexpr i64 kTaskRotations = 4096;
constexpr float kEps = 1e-12f;

#define OFAKERN_LANES for (int l = 0; l < kLanes; ++l)

struct Lanes {
  float v[kLanes];
};
struct Vector3 {
  Lanes x, y, z;
};

OFAKERN_HOT Lanes dot3(const Vector3& a, const Vector3& b) {
  Lanes r;
  OFAKERN_LANES r.v[l] = a.x.v[l] * b.x.v[l] + a.y.v[l] * b.y.v[l] + a.z.v[l] * b.z.v[l];
  return r;
}
OFAKERN_HOT Vector3 cross3(const Vector3& a, const Vector3& b) {
  Vector3 r;
  OFAKERN_LANES {
    r.x.v[l] = a.y.v[l] * b.z.v[l] - a.z.v[l] * b.y.v[l];
    r.y.v[l] = a.z.v[l] * b.x.v[l] - a.x.v[l] * b.z.v[l];
    r.z.v[l] = a.x.v[l] * b.y.v[l] - a.y.v[l] * b.x.v[l];
  }
  return r;
}
// a + s * b
OFAKERN_HOT Vector3 add_scaled(const Vector3& a, const Lanes& s, const Vector3& b) {
  Vector3 r;
  OFAKERN_LANES {
    r.x.v[l] = a.x.v[l] + s.v[l] * b.x.v[l];
    r.y.v[l] = a.y.v[l] + s.v[l] * b.y.v[l];
    r.z.v[l] = a.z.v[l] + s.v[l] * b.z.v[l];
  }
  return r;
}
OFAKERN_HOT Vector3 scaled(const Vector3& a, const Lanes& s) {
  Vector3 r;
  OFAKERN_LANES {
    r.x.v[l] = a.x.v[l] * s.v[l];
    r.y.v[l] = a.y.v[l] * s.v[l];
    r.z.v[l] = a.z.v[l] * s.v[l];
  }
  return r;
}
OFAKERN_HOT Lanes negated(Lanes a) {
  OFAKERN_LANES a.v[l] = -a.v[l];
  return a;
}

// A direction, and what its gradient needs: d(direction) = slope * (g - (direction . g) direction), or slope * g below
// eps.
struct Direction {
  Vector3 of;
  Lanes slope;  // 1 / max(length, eps)
  Lanes bends;  // 1, or 0 below eps
};

OFAKERN_HOT Direction normalised(const Vector3& a) {
  Direction d;
  const Lanes square = dot3(a, a);
  OFAKERN_LANES {
    const float length = __builtin_sqrtf(square.v[l]);
    d.bends.v[l] = length > kEps ? 1.0f : 0.0f;
    d.slope.v[l] = 1.0f / (length > kEps ? length : kEps);
  }
  d.of = scaled(a, d.slope);
  return d;
}

OFAKERN_HOT Vector3 through(const Direction& d, const Vector3& g) {
  Lanes along = dot3(d.of, g);
  OFAKERN_LANES along.v[l] *= -d.bends.v[l];
  return scaled(add_scaled(g, along, d.of), d.slope);
}

// Component `offset + i` of `count` records of `size` numbers, to lanes; the rest of the lanes is 0.
template <class T>
OFAKERN_HOT Lanes gather(const T* from, int size, int offset, int count) {
  Lanes r = {};
  for (int l = 0; l < count; ++l) r.v[l] = to_float(from[l * size + offset]);
  return r;
}
template <class T>
OFAKERN_HOT void scatter(const Lanes& a, T* to, int size, int offset, int count) {
  for (int l = 0; l < count; ++l) from_float(a.v[l], to + l * size + offset);
}
template <class T>
OFAKERN_HOT Vector3 gather3(const T* from, int size, int offset, int step, int count) {
  return {gather(from, size, offset, count), gather(from, size, offset + step, count),
          gather(from, size, offset + 2 * step, count)};
}
template <class T>
OFAKERN_HOT void scatter3(const Vector3& a, T* to, int size, int offset, int step, int count) {
  scatter(a.x, to, size, offset, count);
  scatter(a.y, to, size, offset + step, count);
  scatter(a.z, to, size, offset + 2 * step, count);
}

template <class T>
OFAKERN_LOCAL void forward_block(const T* x, T* out, int count) {
  const Vector3 a2 = gather3(x, 6, 3, 1, count);
  const Direction b1 = normalised(gather3(x, 6, 0, 1, count));
  const Direction b2 = normalised(add_scaled(a2, negated(dot3(b1.of, a2)), b1.of));
  scatter3(b1.of, out, 9, 0, 3, count);
  scatter3(b2.of, out, 9, 1, 3, count);
  scatter3(cross3(b1.of, b2.of), out, 9, 2, 3, count);
}

template <class T>
OFAKERN_LOCAL void backward_block(const T* dout, const T* x, T* dx, int count) {
  const Vector3 a2 = gather3(x, 6, 3, 1, count);
  const Direction b1 = normalised(gather3(x, 6, 0, 1, count));
  const Lanes along = dot3(b1.of, a2);
  const Direction b2 = normalised(add_scaled(a2, negated(along), b1.of));
  const Vector3 g3 = gather3(dout, 9, 2, 3, count);
  Lanes one;
  OFAKERN_LANES one.v[l] = 1.0f;
  const Vector3 g2 = add_scaled(gather3(dout, 9, 1, 3, count), one, cross3(g3, b1.of));
  const Vector3 du = through(b2, g2);
  const Lanes b1_du = dot3(b1.of, du);
  scatter3(add_scaled(du, negated(b1_du), b1.of), dx, 6, 3, 1, count);
  Vector3 g1 = add_scaled(gather3(dout, 9, 0, 3, count), one, cross3(b2.of, g3));
  g1 = add_scaled(add_scaled(g1, negated(along), du), negated(b1_du), a2);
  scatter3(through(b1, g1), dx, 6, 0, 1, count);
}

// body(first, count) for blocks of up to kLanes rotations.
template <class Body>
OFAKERN_LOCAL void for_blocks(i64 rotations, int threads, const Body& body) {
  parallel_for(ceil_div(rotations, kTaskRotations), threads, [&](i64 task, int) {
    const i64 end = min_of(rotations, (task + 1) * kTaskRotations);
    for (i64 first = task * kTaskRotations; first < end; first += kLanes)
      body(first, static_cast<int>(min_of<i64>(kLanes, end - first)));
  });
}

#undef OFAKERN_LANES

}  // namespace

void rotation_6d_forward(const TensorView& x, const TensorView& out, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_blocks(x.numel() / 6, threads, [&](i64 first, int count) {
      forward_block(x.as<const T>() + 6 * first, out.as<T>() + 9 * first, count);
    });
  });
}

void rotation_6d_backward(const TensorView& dout, const TensorView& x, const TensorView& dx, int threads) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_blocks(x.numel() / 6, threads, [&](i64 first, int count) {
      backward_block(dout.as<const T>() + 9 * first, x.as<const T>() + 6 * first, dx.as<T>() + 6 * first, count);
    });
  });
}

}  // namespace ofakern::OFAKERN_ISA
