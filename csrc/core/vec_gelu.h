// The exact GELU, x * Phi(x), and its slope on vectors.
//
// AVX-512 looks 32 floats up in one instruction, which makes pieces cheaper than one formula for all. With t = |x|,
// x * Phi(x) = max(x, 0) - g(t), g(t) = t * Phi(-t); around each fifth up to 6 g is a polynomial of degree 5, whose
// derivative Horner's scheme gives too: 18 instructions for the value, 26 with the slope, where vec_normal.h takes 36
// and 37. Each piece is fitted in the Chebyshev sense to g and g', relative to their largest value there, the
// coefficients rounded from the highest down. Absolute errors: of the value 1.2e-8 where x < 0 (relative 1.5e-7 at -3,
// 3e-6 at -6), one rounding where x > 0; of the slope 1.1e-7. Beyond 6.1, where g is 3e-9, the value is 0 or x and the
// slope 0 or 1 exactly.
#pragma once

#include "core/vec_normal.h"

namespace ofakern::OFAKERN_ISA {
namespace {

struct GeluLanes {
  Vec value, slope;
};

#if defined(__AVX512F__)

constexpr int kGeluDegree = 5;
constexpr float kGeluPieces = 5.0f;  // per unit of t

// [5 - power][piece]; d = 5 * t - piece lies in [-1/2, 1/2].
alignas(64) constexpr float kGeluTable[kGeluDegree + 1][32] = {
    {-9.53877816e-07f, -3.64856646e-06f, -6.36612094e-06f, -7.5295693e-06f,
     -7.00666942e-06f, -5.15226293e-06f, -2.63179845e-06f, -1.66645748e-07f,
     1.69382736e-06f,  2.69440784e-06f,  2.87082207e-06f,  2.45457977e-06f,
     1.74573313e-06f,  1.00626903e-06f,  4.0343366e-07f,   2.85042834e-09f,
     -2.05787018e-07f, -2.72217335e-07f, -2.54443989e-07f, -2.00142239e-07f,
     -1.40049494e-07f, -8.94195225e-08f, -5.28249835e-08f, -2.91226918e-08f,
     -1.50694426e-08f, -7.34844896e-09f, -3.38708639e-09f, -1.47904722e-09f,
     -6.12975226e-10f, -2.41454606e-10f, -9.05050063e-11f, 0.0f},
    {0.000106905223f,  9.67602828e-05f,  7.11794055e-05f,  3.57342506e-05f,
     -1.25917995e-06f, -3.20816798e-05f, -5.16618638e-05f, -5.85025809e-05f,
     -5.43594069e-05f, -4.30230139e-05f, -2.88084721e-05f, -1.53124929e-05f,
     -4.75108982e-06f, 2.09900873e-06f,  5.54651388e-06f,  6.47676052e-06f,
     5.89904403e-06f,  4.65777066e-06f,  3.3174797e-06f,   2.17361776e-06f,
     1.32490368e-06f,  7.56669749e-07f,  4.06867173e-07f,  2.06694452e-07f,
     9.94618716e-08f,  4.54253737e-08f,  1.97212735e-08f,  8.14918355e-09f,
     3.20837712e-09f,  1.20454535e-09f,  4.3156162e-10f,   0.0f},
    {-1.23791295e-07f, 0.000412938389f,  0.000754212728f,  0.000970345282f,
     0.00103825075f,   0.000967881002f,  0.000795386266f,  0.000570163946f,
     0.000340751314f,  0.000144007456f,  1.6713394e-09f,   -8.74085817e-05f,
     -0.000126125931f, -0.000129962267f, -0.000113476504f, -8.86375201e-05f,
     -6.34743701e-05f, -4.22308476e-05f, -2.63167767e-05f, -1.54428362e-05f,
     -8.56510542e-06f, -4.50226617e-06f, -2.24757923e-06f, -1.06727725e-06f,
     -4.82690439e-07f, -2.08130359e-07f, -8.56337081e-08f, -3.36436585e-08f,
     -1.2629024e-08f,  -4.53174609e-09f, -1.55518143e-09f, 0.0f},
    {-0.0159576796f,  -0.0153288413f,  -0.0135523211f,  -0.0109297642f,
     -0.00787962321f, -0.00483943708f, -0.00217490923f, -0.000119803786f,
     0.00124229921f,  0.00195795856f,  0.00215964019f,  0.00201496296f,
     0.00168407615f,  0.00129310542f,  0.000924529682f, 0.000620461709f,
     0.000392898975f, 0.000235600441f, 0.000134128481f, 7.26357976e-05f,
     3.74719093e-05f, 1.84369637e-05f, 8.65973652e-06f, 3.8857961e-06f,
     1.66681343e-06f, 6.83837527e-07f, 2.68454215e-07f, 1.00879589e-07f,
     3.62989461e-08f, 1.25102337e-08f, 4.13071621e-09f, 0.0f},
    {0.100000001f,     0.0685063526f,    0.0394540392f,    0.0148636717f,
     -0.00397956837f,  -0.0166630931f,   -0.0235907193f,   -0.0257723592f,
     -0.0245348085f,   -0.0212359931f,   -0.0170463603f,   -0.0128281312f,
     -0.00910986774f,  -0.00613090629f,  -0.0039216266f,   -0.00238912948f,
     -0.0013883888f,   -0.000770523155f, -0.00040874767f,  -0.000207410048f,
     -0.000100729936f, -4.68430298e-05f, -2.0866868e-05f,  -8.90709453e-06f,
     -3.64418247e-06f, -1.42938984e-06f, -5.37619144e-07f, -1.93931157e-07f,
     -6.7101908e-08f,  -2.22737917e-08f, -7.0937558e-09f,  0.0f},
    {0.0f,
     0.0841480568f,
     0.1378313f,
     0.164551869f,
     0.169484317f,
     0.158655256f,
     0.138083607f,
     0.113059327f,
     0.0876788646f,
     0.0646745712f,
     0.0455002636f,
     0.0305875838f,
     0.0196740869f,
     0.0121190883f,
     0.0071543646f,
     0.00404969417f,
     0.00219884142f,
     0.00114555948f,
     0.000572790916f,
     0.000274922582f,
     0.000126684972f,
     5.60521548e-05f,
     2.38151988e-05f,
     9.71729514e-06f,
     3.80797701e-06f,
     1.43325883e-06f,
     5.18150671e-07f,
     1.79930652e-07f,
     6.0018607e-08f,
     1.92313685e-08f,
     5.91954263e-09f,
     0.0f},
};

struct GeluPiece {
  __m512i number;  // in the low five bits
  Vec d;
};

OFAKERN_HOT GeluPiece gelu_piece(Vec x) {
  const Vec t = {_mm512_min_ps(_mm512_set1_ps(6.2f), vabs(x).v)};  // NaN stays NaN
  const Vec scale = vset(kGeluPieces), magic = vset(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded
  const Vec rounded = vfma(t, scale, magic);
  return {_mm512_castps_si512(rounded.v), {_mm512_fmsub_ps(t.v, scale.v, vsub(rounded, magic).v)}};
}

OFAKERN_HOT Vec gelu_coefficient(int n, __m512i piece) {
  const float* const row = kGeluTable[n];
  return {_mm512_permutex2var_ps(_mm512_load_ps(row), piece, _mm512_load_ps(row + 16))};
}

OFAKERN_HOT Vec vgelu(Vec x) {
  const GeluPiece piece = gelu_piece(x);
  Vec g = gelu_coefficient(0, piece.number);
  for (int n = 1; n <= kGeluDegree; ++n) g = vfma(g, piece.d, gelu_coefficient(n, piece.number));
  return vsub(vmax(vzero(), x), g);
}

OFAKERN_HOT GeluLanes vgelu_with_slope(Vec x) {
  const GeluPiece piece = gelu_piece(x);
  Vec dg = gelu_coefficient(0, piece.number);
  Vec g = vfma(dg, piece.d, gelu_coefficient(1, piece.number));
  for (int n = 2; n <= kGeluDegree; ++n) {
    dg = vfma(dg, piece.d, g);
    g = vfma(g, piece.d, gelu_coefficient(n, piece.number));
  }
  const Vec falling = vmul(dg, vset(kGeluPieces));  // g'(t): the slope at -t
  return {vsub(vmax(vzero(), x), g), vselect(mask_negative(x), falling, vsub(vset(1.0f), falling))};
}

#else

// Infinities give NaN here.
OFAKERN_HOT Vec vgelu(Vec x) { return vmul(x, vnormal(x).distribution); }
OFAKERN_HOT GeluLanes vgelu_with_slope(Vec x) {
  const NormalLanes normal = vnormal(x);
  return {vmul(x, normal.distribution), vfma(x, normal.density, normal.distribution)};
}

#endif

}  // namespace
}  // namespace ofakern::OFAKERN_ISA
