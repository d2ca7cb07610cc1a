// The mathematics of one Gaussian in one view and of one pixel, shared by rasterize.cpp (CPU) and
// rasterize.cu (CUDA). T is float to render and train, double to check gradients. Below f is, where
// needed, its derivative f_vjp: it takes f's inputs and the gradient of its outputs, and gives the
// gradient of its inputs. d_x is dL/dx. No threads, no libraries. The last section is memory.
//
// The definition of all this is render_reference in rasterize.py; the conventions are listed there.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__CUDACC__) || defined(WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define HD inline __attribute__((always_inline))
#else
#define HD inline
#endif

// The constants of rasterize.py.
constexpr double C0 = 0.28209479177387814, C1 = 0.4886025119029199, LOW_PASS = 0.3,
                 ALPHA_MAX = 0.99, ALPHA_MIN = 1. / 255, T_STOP = 1e-4;
constexpr double LOG2_E = 1.4426950408889634, LOG2_MIN = -7.994353436858858;   // of ALPHA_MIN

// ---- types --------------------------------------------------------------------------------------

template <class T> struct Gaussian {   // also its gradient
  T xyz[3], scale[3], quat[4], opacity;
  T sh[12];                            // k0..k3 by rgb; k1..k3 = 0 for degree 0
};

template <class T> struct View {
  T R[9], t[3];                        // camera = R world + t
  T fx, fy, cx, cy;                    // pixels
  T u0, u1, v0, v1;                    // where the slopes x/z, y/z are held in the linearisation
  T eye[3];                            // the camera's centre in the world
};

template <class T> struct Splat {      // a Gaussian in an image
  T x, y;                              // centre, pixels
  T A, B, C, o;                        // log2 alpha = o + A dx^2 + B dx dy + C dy^2
  T r, g, b, z;                        // colour towards the camera, depth
  T rx, ry;                            // half size of the box outside which alpha < 1/255, pixels
};

// A splat's gradient needs only these sums over pixels: w = trans a, v = a dL/da,
// (dx, dy) = centre - pixel.
template <class T> struct Moments {
  T r, g, b, z;                        // sum w dL/dcolour, sum w dL/ddepth
  T s, sx, sy, sxx, sxy, syy;          // sum v (1, dx, dy, dx^2, dx dy, dy^2)
};

// w2c (4,4) row-major, K (4) = fx fy cx cy
template <class T> HD View<T> make_view(const T* w2c, const T* K, int H, int W) {
  View<T> c;
  for (int i = 0; i < 3; i++) {
    for (int j = 0; j < 3; j++) c.R[3 * i + j] = w2c[4 * i + j];
    c.t[i] = w2c[4 * i + 3];
  }
  for (int j = 0; j < 3; j++)
    c.eye[j] = -(c.R[j] * c.t[0] + c.R[3 + j] * c.t[1] + c.R[6 + j] * c.t[2]);   // -R^T t
  c.fx = K[0], c.fy = K[1], c.cx = K[2], c.cy = K[3];
  c.u0 = (T(-.15) * W - c.cx) / c.fx, c.u1 = (T(1.15) * W - c.cx) / c.fx;
  c.v0 = (T(-.15) * H - c.cy) / c.fy, c.v1 = (T(1.15) * H - c.cy) / c.fy;
  return c;
}

// ---- numbers ------------------------------------------------------------------------------------

// 2^x for x <= 1 as 2^n 2^f: n the integer nearest to x, 2^f a polynomial on [-1/2, 1/2]
// (relative error 1e-7). F and I: float and uint32_t, or vectors of them.
template <class F, class I> HD F exp2_by_bits(F x) {
  x = x < -115.f ? -115.f : x;                   // far below any alpha, and no denormal
  const F big = x + 12582912.f;                  // 1.5 2^23: the last bits of the sum are n
  const F f = x - (big - 12582912.f);
  F p = 0.00132764721f * f + 0.00967554143f;     // our own least-maximum fit
  p = p * f + 0.0555071327f;
  p = p * f + 0.240221197f;
  p = p * f + 0.693146967f;
  p = p * f + 1.00000007f;
  I n, bits;
  std::memcpy(&n, &big, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << 23;                               // add n to the exponent
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

HD float exp2_(float x) {
#ifdef __CUDA_ARCH__
  return exp2f(x);                               // one instruction, with denormals off
#else
  return exp2_by_bits<float, uint32_t>(x);
#endif
}
HD double exp2_(double x) { return std::exp2(x); }

// Vec<T>: 8 pixels at once. Only the CPU blends in vectors; without the GNU extension they are
// scalars and the same loops still work.
#if defined(__GNUC__) && !defined(__CUDACC__)
constexpr int LANES = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(32)));
template <class T> using Vec = std::conditional_t<sizeof(T) == 4, Floats, Doubles>;
HD Floats exp2_(Floats x) { return exp2_by_bits<Floats, Bits>(x); }
HD Doubles exp2_(Doubles x) {
  for (int i = 0; i < LANES; i++) x[i] = std::exp2(x[i]);
  return x;
}
#else
constexpr int LANES = 1;
template <class T> using Vec = T;
#endif

// a / b; on the device by the reciprocal, which is one instruction there
template <class T> HD T over(T a, T b) { return a / b; }
HD float over(float a, float b) {
#ifdef __CUDA_ARCH__
  return a * (1 / b);
#else
  return a / b;
#endif
}

template <class T> HD T minus_abs(T x) { return x < -x ? x : -x; }
HD float minus_abs(float x) { return std::fmin(x, -x); }

template <class T> HD T dot(const T* a, const T* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

template <class T> HD void cross(const T* a, const T* b, T* c) {
  c[0] = a[1] * b[2] - a[2] * b[1];
  c[1] = a[2] * b[0] - a[0] * b[2];
  c[2] = a[0] * b[1] - a[1] * b[0];
}

// ---- Gaussian -> splat --------------------------------------------------------------------------

// Rotation (3,3) of a quaternion w x y z of any length > 0.
template <class T> HD void rotation(const T* q, T* R) {
  const T n = 1 / std::sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const T w = n * q[0], x = n * q[1], y = n * q[2], z = n * q[3];
  R[0] = 1 - 2 * (y * y + z * z), R[1] = 2 * (x * y - w * z), R[2] = 2 * (x * z + w * y);
  R[3] = 2 * (x * y + w * z), R[4] = 1 - 2 * (x * x + z * z), R[5] = 2 * (y * z - w * x);
  R[6] = 2 * (x * z - w * y), R[7] = 2 * (y * z + w * x), R[8] = 1 - 2 * (x * x + y * y);
}

// d_q += ..., with the part along q removed: the length of q has no effect.
template <class T> HD void rotation_vjp(const T* q, const T* d, T* d_q) {
  const T n = 1 / std::sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const T w = n * q[0], x = n * q[1], y = n * q[2], z = n * q[3];
  const T a = d[7] - d[5], b = d[2] - d[6], c = d[3] - d[1];
  const T e = d[3] + d[1], f = d[2] + d[6], h = d[7] + d[5];
  const T d_w = 2 * (x * a + y * b + z * c);
  const T d_x = 2 * (w * a + y * e + z * f - 2 * x * (d[4] + d[8]));
  const T d_y = 2 * (w * b + x * e + z * h - 2 * y * (d[0] + d[8]));
  const T d_z = 2 * (w * c + x * f + y * h - 2 * z * (d[0] + d[4]));
  const T along = w * d_w + x * d_x + y * d_y + z * d_z;
  d_q[0] += n * (d_w - along * w), d_q[1] += n * (d_x - along * x);
  d_q[2] += n * (d_y - along * y), d_q[3] += n * (d_z - along * z);
}

// rgb = 1/2 + C0 k0 + C1 (-y k1 + z k2 - x k3), (x, y, z) = direction from the eye; unclamped.
template <class T> HD void colour(const Gaussian<T>& g, const View<T>& c, T* rgb) {
  const T v[3] = {g.xyz[0] - c.eye[0], g.xyz[1] - c.eye[1], g.xyz[2] - c.eye[2]};
  const T n = T(C1) / std::sqrt(dot(v, v));
  for (int i = 0; i < 3; i++)
    rgb[i] = T(.5) + T(C0) * g.sh[i]
             + n * (v[2] * g.sh[6 + i] - v[1] * g.sh[3 + i] - v[0] * g.sh[9 + i]);
}

// The direction is not held fixed: d_xyz gets a part too. d_rgb comes already gated by the clamp.
template <class T>
HD void colour_vjp(const Gaussian<T>& g, const View<T>& c, const T* d_rgb, Gaussian<T>& d_g) {
  T v[3] = {g.xyz[0] - c.eye[0], g.xyz[1] - c.eye[1], g.xyz[2] - c.eye[2]};
  const T n = 1 / std::sqrt(dot(v, v));
  T d_v[3] = {0, 0, 0};                          // gradient of the unit direction
  for (int i = 0; i < 3; i++) v[i] *= n;
  for (int i = 0; i < 3; i++) {
    d_g.sh[i] += T(C0) * d_rgb[i];
    const T d = T(C1) * d_rgb[i];
    d_g.sh[3 + i] -= d * v[1], d_g.sh[6 + i] += d * v[2], d_g.sh[9 + i] -= d * v[0];
    d_v[0] -= d * g.sh[9 + i], d_v[1] -= d * g.sh[3 + i], d_v[2] += d * g.sh[6 + i];
  }
  const T along = dot(v, d_v);
  for (int i = 0; i < 3; i++) d_g.xyz[i] += n * (d_v[i] - along * v[i]);
}

// What project and its derivative have in common.
template <class T> struct Projection {
  T u, v, z;                                     // slopes x/z, y/z and depth in the camera
  T hu, hv;                                      // the slopes, held near the image
  T R[9];                                        // the Gaussian's axes
  T P[6];                                        // (2,3) = J W: d(pixel) / d(world point)
  T M[6];                                        // (2,3) = J W R S, covariance = M M^T
};

template <class T> HD Projection<T> projection(const Gaussian<T>& g, const View<T>& c) {
  Projection<T> p;
  const T iz = 1 / (p.z = dot(c.R + 6, g.xyz) + c.t[2]);
  p.u = (dot(c.R, g.xyz) + c.t[0]) * iz, p.v = (dot(c.R + 3, g.xyz) + c.t[1]) * iz;
  p.hu = p.u < c.u0 ? c.u0 : p.u > c.u1 ? c.u1 : p.u;
  p.hv = p.v < c.v0 ? c.v0 : p.v > c.v1 ? c.v1 : p.v;
  for (int j = 0; j < 3; j++) {                  // J = [fx/z 0 -fx hu/z; 0 fy/z -fy hv/z]
    p.P[j] = c.fx * iz * (c.R[j] - p.hu * c.R[6 + j]);
    p.P[3 + j] = c.fy * iz * (c.R[3 + j] - p.hv * c.R[6 + j]);
  }
  rotation(g.quat, p.R);
  for (int j = 0; j < 3; j++) {
    p.M[j] = (p.P[0] * p.R[j] + p.P[1] * p.R[3 + j] + p.P[2] * p.R[6 + j]) * g.scale[j];
    p.M[3 + j] = (p.P[3] * p.R[j] + p.P[4] * p.R[3 + j] + p.P[5] * p.R[6 + j]) * g.scale[j];
  }
  return p;
}

// [A B; B C] = (M M^T + 0.3 I)^-1; returns the covariance xx, yy and the determinant, which is
// |M0 x M1|^2 + 0.3 (tr - 0.3): a sum of positive terms, so it never cancels to below 0.09.
template <class T> HD void conic(const T* M, T& A, T& B, T& C, T& xx, T& yy, T& det) {
  xx = dot(M, M) + T(LOW_PASS), yy = dot(M + 3, M + 3) + T(LOW_PASS);
  T m[3];
  cross(M, M + 3, m);
  det = dot(m, m) + T(LOW_PASS) * (xx + yy - T(LOW_PASS));
  A = yy / det, B = -dot(M, M + 3) / det, C = xx / det;
}

// d_M = -2 Q G (Q M) with Q = [A B; B C] and G = [d_A d_B/2; d_B/2 d_C]. Q M is formed first and
// from m = M0 x M1: along a needle, Q times the rows of M would be a difference of large numbers.
template <class T>
HD void conic_vjp(const T* M, T A, T B, T C, T det, T d_A, T d_B, T d_C, T* d_M) {
  T m[3], N[6];                                                 // N = Q M
  cross(M, M + 3, m);
  cross(M + 3, m, N);
  cross(m, M, N + 3);
  for (int j = 0; j < 6; j++) N[j] = (N[j] + T(LOW_PASS) * M[j]) / det;
  for (int j = 0; j < 3; j++) {
    const T a = d_A * N[j] + d_B / 2 * N[3 + j], b = d_B / 2 * N[j] + d_C * N[3 + j];   // G N
    d_M[j] = -2 * (A * a + B * b);
    d_M[3 + j] = -2 * (B * a + C * b);
  }
}

// False: not drawn. Every test is one that NaN fails, so whatever is drawn is finite.
template <class T> HD bool project(const Gaussian<T>& g, const View<T>& c, T z_near, Splat<T>& s) {
  const Projection<T> p = projection(g, c);
  T rgb[3], A, B, C, xx, yy, det;
  conic(p.M, A, B, C, xx, yy, det);
  colour(g, c, rgb);
  s.x = c.fx * p.u + c.cx, s.y = c.fy * p.v + c.cy, s.z = p.z, s.o = std::log2(g.opacity);
  s.A = T(-.5 * LOG2_E) * A, s.B = T(-LOG2_E) * B, s.C = T(-.5 * LOG2_E) * C;
  s.r = rgb[0] > 0 ? rgb[0] : 0, s.g = rgb[1] > 0 ? rgb[1] : 0, s.b = rgb[2] > 0 ? rgb[2] : 0;
  const T* q = g.quat;
  const T sum = s.x + s.y + s.z + xx + yy + det + s.o + rgb[0] + rgb[1] + rgb[2];
  if (!(s.z > z_near && g.opacity >= T(ALPHA_MIN) && sum - sum == 0
        && q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3] >= T(1e-8))) return false;
  // alpha >= 1/255  <=>  d^T Q d <= 2 ln(255 o): an ellipse. The 2e-3 covers rounding: alpha_of
  // skips every pixel outside the box, so the image does not depend on boxes.
  const T size = T(2 / LOG2_E) * (s.o - T(LOG2_MIN)) + T(2e-3);
  s.rx = std::sqrt(size * xx), s.ry = std::sqrt(size * yy);
  return true;
}

// d_g += the gradient that the moments m of this view give. Only for Gaussians that were drawn.
template <class T>
HD void project_vjp(const Gaussian<T>& g, const View<T>& c, const Moments<T>& m, Gaussian<T>& d_g) {
  const Projection<T> p = projection(g, c);
  T A, B, C, xx, yy, det, rgb[3], d_M[6], d_P[6] = {}, d_R[9];
  conic(p.M, A, B, C, xx, yy, det);
  // alpha = o e^p, p = -(A dx^2 + C dy^2)/2 - B dx dy, so with v = alpha dL/dalpha:
  d_g.opacity += m.s / g.opacity;
  const T d_x = -(A * m.sx + B * m.sy), d_y = -(B * m.sx + C * m.sy);
  conic_vjp(p.M, A, B, C, det, -m.sxx / 2, -m.sxy, -m.syy / 2, d_M);
  // M = P R S
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) {
      const T d_RS = p.P[i] * d_M[j] + p.P[3 + i] * d_M[3 + j], R = p.R[3 * i + j];
      d_g.scale[j] += d_RS * R;
      d_R[3 * i + j] = d_RS * g.scale[j];
      d_P[i] += d_M[j] * g.scale[j] * R, d_P[3 + i] += d_M[3 + j] * g.scale[j] * R;
    }
  rotation_vjp(g.quat, d_R, d_g.quat);
  // P, u, v ~ 1/z, so each adds -1/z of itself; a held slope adds 0
  const T iz = 1 / p.z;
  T d_u = c.fx * d_x, d_v = c.fy * d_y;
  if (p.hu == p.u) d_u -= c.fx * iz * dot(d_P, c.R + 6);
  if (p.hv == p.v) d_v -= c.fy * iz * dot(d_P + 3, c.R + 6);
  const T d_z = m.z - iz * (dot(d_P, p.P) + dot(d_P + 3, p.P + 3) + d_u * p.u + d_v * p.v);
  for (int j = 0; j < 3; j++)                    // (u, v, z) -> camera -> world
    d_g.xyz[j] += c.R[j] * d_u * iz + c.R[3 + j] * d_v * iz + c.R[6 + j] * d_z;
  colour(g, c, rgb);
  const T d_rgb[3] = {rgb[0] > 0 ? m.r : 0, rgb[1] > 0 ? m.g : 0, rgb[2] > 0 ? m.b : 0};
  colour_vjp(g, c, d_rgb, d_g);
}

// ---- splat -> pixel -----------------------------------------------------------------------------

// a = min(0.99, o e^p), p = -(A dx^2 + C dy^2)/2 - B dx dy, as 2^(log2 o + p log2 e), for which the
// splat holds the factors; 0 where below 1/255 or, by rounding, p > 0. The one test of visibility,
// in both directions. V = T, or Vec<T>: pixels of one row.
template <class T, class V> HD V alpha_of(const Splat<T>& s, V dx, T dy) {
  const V e = dx * (s.A * dx + s.B * dy) + (s.C * dy * dy + s.o);
  const V a = exp2_(e);
  return (e <= s.o) & (e >= T(LOG2_MIN)) ? a > T(ALPHA_MAX) ? T(ALPHA_MAX) : a : T(0);
}

// w = trans a, the splat's share of the pixel; trans <- trans (1 - a), the light that goes on.
// A splat that would leave less than 1e-4 is not drawn, a <- 0, and finishes the pixel: trans < 0
// from then on, and |trans| is what remains.
template <class T, class V> HD V blend(V& a, V& trans) {
  const V w = trans * a, next = trans - w;
  const auto stop = next < T(T_STOP);
  trans = stop ? minus_abs(trans) : next;
  a = stop ? T(0) : a;
  return stop ? T(0) : w;
}

// Front to back again. f = <c - background, d_rgb> + z d_depth + d_alpha is dL/dw. behind is the
// sum of w f over the splats not yet passed, at first all. A larger a dims those splats, hence
// dL/da = trans f - behind / (1 - a). Returns w and v = a dL/da (0 if clamped).
template <class T, class V> HD V blend_vjp(V a, V f, V& trans, V& behind, V& w) {
  w = blend<T>(a, trans);
  behind -= w * f;
  const V v = w * f - over(behind * a, T(1) - a);
  return a < T(ALPHA_MAX) ? v : T(0);
}

// ---- memory -------------------------------------------------------------------------------------

// The end of a loop up to `count` that is to be unrolled: the GPU keeps no array in registers that
// a run-time number indexes.
#ifdef __CUDA_ARCH__
#define UNROLL(most, count) (most)
#else
#define UNROLL(most, count) (count)
#endif

// The five parameters of B N Gaussians, or their gradients.
template <class T> struct Scene {
  T *xyz, *scale, *quat, *opacity, *sh;   // (B,N,3) (B,N,3) (B,N,4) (B,N) (B,N,K,3)
  int sh_size;                            // 3 K

  HD Gaussian<T> load(int64_t j) const {  // j = b N + n
    Gaussian<T> g = {};
    for (int k = 0; k < 3; k++) g.xyz[k] = xyz[3 * j + k], g.scale[k] = scale[3 * j + k];
    for (int k = 0; k < 4; k++) g.quat[k] = quat[4 * j + k];
    for (int k = 0; k < UNROLL(12, sh_size); k++)
      if (k < sh_size) g.sh[k] = sh[sh_size * j + k];
    g.opacity = opacity[j];
    return g;
  }
  HD void store(int64_t j, const Gaussian<T>& g) const {
    for (int k = 0; k < 3; k++) xyz[3 * j + k] = g.xyz[k], scale[3 * j + k] = g.scale[k];
    for (int k = 0; k < 4; k++) quat[4 * j + k] = g.quat[k];
    for (int k = 0; k < UNROLL(12, sh_size); k++)
      if (k < sh_size) sh[sh_size * j + k] = g.sh[k];
    opacity[j] = g.opacity;
  }
};

// I images or their gradients, as five planes each: red, green, blue, alpha, depth. A gradient that
// nobody asked for is a null pointer and reads as 0.
template <class T> struct Images {
  T *rgb, *alpha, *depth;                 // (I,3,H,W) (I,1,H,W) (I,1,H,W)
  int64_t HW;
  HD T* plane(int64_t i, int j) const {
    return j < 3 ? rgb + (3 * i + j) * HW : (j == 3 ? alpha : depth) + i * HW;
  }
  HD T value(int64_t i, int j, int64_t at) const {
    return (j < 3 ? rgb : j == 3 ? alpha : depth) ? plane(i, j)[at] : T(0);
  }
};

#if defined(__CUDACC__) || defined(WITH_CUDA)   // rasterize.cu; its comments say what is what
struct Dims {
  int B, V, N, H, W;
  int bits = 0;                           // enough to write N-1; only for rasterize.cu
};
int64_t mask_words(Dims n);
int64_t scratch_bytes(Dims n);
cudaError_t forward_cuda(Dims n, Scene<float> g, const float* bg, const float* w2c, const float* K,
                         float z_near, Images<float> out, float* splats, uint32_t* order,
                         uint32_t* masks, void* scratch, cudaStream_t stream);
cudaError_t backward_cuda(Dims n, Scene<float> g, const float* bg, const float* w2c,
                          const float* K, Images<float> out, const float* splats,
                          const uint32_t* order, const uint32_t* masks, Images<float> d_out,
                          float* moments, Scene<float> d_g, cudaStream_t stream);
#endif
