// The rasterizer on the CPU, and the binding of both devices to Python.
//
// Every image is cut into bands of 8 rows, small enough for the first-level cache. A band walks the
// Gaussians that touch it in depth order, and each of them its own few pixels, 8 at a time. Two
// parallel loops per direction: one over images (or Gaussians), one over strips of bands. Nothing
// is summed in an order that depends on the number of threads, so results are equal bit for bit.
//
// Letters: B objects, V views, I = B V images, i = b V + v, N Gaussians per object, H W pixels.
#include <torch/csrc/utils/pybind.h>   // not torch/extension.h: half the compile time
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>
#include "splat.h"
#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

using at::Tensor;

constexpr int BAND = 8;     // rows
constexpr int TASKS = 16;   // fewer images than this are cut into strips, to occupy all cores

// ---- vectors ------------------------------------------------------------------------------------

template <class T> Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T> void store(T* p, const Vec<T>& x) { std::memcpy(p, &x, sizeof x); }

template <class T> T sum(const Vec<T>& x) {
  T a[LANES], s = 0;
  std::memcpy(a, &x, sizeof x);
  for (int l = 0; l < LANES; l++) s += a[l];
  return s;
}

template <class T> Vec<T> lane_index() {   // 0 1 2 ... 7
  T a[LANES];
  for (int l = 0; l < LANES; l++) a[l] = T(l);
  return load(a);
}

// ---- project and sort ---------------------------------------------------------------------------

// Stable radix sort of the depths z (N), ascending -> order (N). Positive floats compare like
// their bits; what is not drawn has z = infinity and comes last.
template <class T> void sort_by_depth(const std::vector<Splat<T>>& s, int* order) {
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  std::vector<std::pair<Key, int>> a(s.size()), b(s.size());
  for (size_t n = 0; n < s.size(); n++) {
    std::memcpy(&a[n].first, &s[n].z, sizeof(T));
    a[n].second = int(n);
  }
  for (size_t shift = 0; shift < 8 * sizeof(T); shift += 11) {
    int start[2049] = {};
    for (const auto& e : a) start[(e.first >> shift & 2047) + 1]++;
    for (int k = 0; k < 2048; k++) start[k + 1] += start[k];
    for (const auto& e : a) b[start[e.first >> shift & 2047]++] = e;
    a.swap(b);
  }
  for (size_t n = 0; n < s.size(); n++) order[n] = a[n].second;
}

// The Gaussians of one image as splats (N) by depth, and order (N): which Gaussian each one is.
template <class T>
void project_image(const Scene<T>& scene, int64_t first, int N, const View<T>& view, T z_near,
                   Splat<T>* splats, int* order) {
  std::vector<Splat<T>> s(N);
  for (int n = 0; n < N; n++)
    if (!project(scene.load(first + n), view, z_near, s[n])) {
      s[n] = {};
      s[n].z = INFINITY, s[n].ry = -INFINITY;   // touches no row
    }
  sort_by_depth(s, order);
  for (int k = 0; k < N; k++) splats[k] = s[order[k]];
}

// ---- blend --------------------------------------------------------------------------------------

// Rows [y0, y1) of an image: planes of numbers that stay in cache while splats pass by. Plane 0 is
// trans; lanes beyond the image hold trans = -1, "finished", so nothing needs a mask.
template <class T> struct Band {
  int W, y0, y1, stride;    // stride: W and room for a vector that starts at the last pixel
  std::vector<T> data;      // (planes, BAND, stride)
  std::vector<int> list;    // splats that touch the band, by depth

  Band(int planes, int W, int N)
      : W(W), stride(W + LANES), data(size_t(planes) * BAND * stride), list(N + 1) {}

  T* at(int plane, int y, int x) { return &data[(size_t(plane) * BAND + y - y0) * stride + x]; }

  void start(int y, int H) {
    y0 = y, y1 = std::min(y + BAND, H);
    std::fill(data.begin(), data.end(), T(0));
    std::fill(at(0, y0, 0), at(1, y0, 0), T(-1));
    for (int r = y0; r < y1; r++) std::fill(at(0, r, 0), at(0, r, W), T(1));
  }
  bool finished() { return std::none_of(at(0, y0, 0), at(1, y0, 0), [](T t) { return t > 0; }); }
};

// Calls visit(k, x0, x1, r0, r1) for the splats k (N, by depth) that touch the band, with the
// pixels x0..x1 and rows r0..r1 of their box, until every pixel of the band is finished.
template <class T, class F> void walk(const Splat<T>* s, int N, Band<T>& band, F visit) {
  const T W = T(band.W), y0 = T(band.y0), y1 = T(band.y1);
  int n = 0;
  for (int k = 0; k < N; k++) {   // no branch: whether a splat is here cannot be predicted
    band.list[n] = k;
    n += (s[k].y + s[k].ry >= y0) & (s[k].y - s[k].ry <= y1) & (s[k].x + s[k].rx >= 0)
         & (s[k].x - s[k].rx <= W);
  }
  for (int i = 0; i < n; i++) {
    const int k = band.list[i];
    const int x0 = int(std::ceil(std::max(T(0), s[k].x - s[k].rx - T(.5))));
    const int x1 = int(std::floor(std::min(W - 1, s[k].x + s[k].rx - T(.5))));
    const int r0 = int(std::ceil(std::max(y0, s[k].y - s[k].ry - T(.5))));
    const int r1 = int(std::floor(std::min(y1 - 1, s[k].y + s[k].ry - T(.5))));
    if (x0 <= x1 && r0 <= r1) visit(k, x0, x1, r0, r1);
    if (i % 64 == 63 && band.finished()) return;
  }
}

// One band of image i. Planes of the band: trans, the sums of w times red, green, blue, depth.
template <class T>
void blend_band(const Splat<T>* splats /* (N) */, int N, const T* bg /* (3) */, Band<T>& band,
                const Images<T>& out, int64_t i) {
  const int plane = BAND * band.stride;
  walk(splats, N, band, [&](int k, int x0, int x1, int r0, int r1) {
    const Splat<T> s = splats[k];
    const T c[4] = {s.r, s.g, s.b, s.z};
    for (int x = x0; x <= x1; x += LANES) {
      const Vec<T> dx = s.x - T(.5) - T(x) - lane_index<T>();
      for (int y = r0; y <= r1; y++) {
        T* p = band.at(0, y, x);
        Vec<T> trans = load(p);
        Vec<T> a = alpha_of(s, dx, s.y - T(.5) - T(y));
        const Vec<T> w = blend<T>(a, trans);
        store(p, trans);
        for (int j = 0; j < 4; j++) {
          p += plane;
          store(p, Vec<T>(load(p) + w * c[j]));
        }
      }
    }
  });
  for (int y = band.y0; y < band.y1; y++)
    for (int x = 0; x < band.W; x++) {
      const int64_t at = int64_t(y) * band.W + x;
      const T trans = std::fabs(*band.at(0, y, x));
      for (int j = 0; j < 3; j++) out.plane(i, j)[at] = *band.at(1 + j, y, x) + trans * bg[j];
      out.plane(i, 3)[at] = 1 - trans;
      out.plane(i, 4)[at] = *band.at(4, y, x);
    }
}

// Its derivative: d_out -> moments (N) += ..., by the Gaussian's own number order[k].
// Planes of the band: trans, behind, the gradients of red, green, blue, alpha, depth.
template <class T>
void blend_band_vjp(const Splat<T>* splats /* (N) */, const int* order /* (N) */, int N,
                    const T* bg /* (3) */, Band<T>& band, const Images<T>& out,
                    const Images<T>& d_out, int64_t i, Moments<T>* moments) {
  for (int y = band.y0; y < band.y1; y++)
    for (int x = 0; x < band.W; x++) {
      const int64_t at = int64_t(y) * band.W + x;
      T behind = 0;   // <out - background, d_out>, since rgb = background + sum w (c - background)
      for (int j = 0; j < 5; j++) {
        const T d = *band.at(2 + j, y, x) = d_out.value(i, j, at);
        behind += (out.plane(i, j)[at] - (j < 3 ? bg[j] : 0)) * d;
      }
      *band.at(1, y, x) = behind;
    }
  const int plane = BAND * band.stride;
  walk(splats, N, band, [&](int k, int x0, int x1, int r0, int r1) {
    const Splat<T> s = splats[k];
    const T r = s.r - bg[0], g = s.g - bg[1], b = s.b - bg[2];
    Vec<T> m[10] = {};
    for (int x = x0; x <= x1; x += LANES) {
      const Vec<T> dx = s.x - T(.5) - T(x) - lane_index<T>();
      Vec<T> v0 = {}, v1 = {}, v2 = {};   // sum over rows of v (1, dy, dy^2): dx is fixed here
      for (int y = r0; y <= r1; y++) {
        T* p = band.at(0, y, x);
        const T dy = s.y - T(.5) - T(y);
        const Vec<T> d_r = load(p + 2 * plane), d_g = load(p + 3 * plane),
                     d_b = load(p + 4 * plane), d_a = load(p + 5 * plane),
                     d_z = load(p + 6 * plane);
        Vec<T> trans = load(p), behind = load(p + plane), w;
        const Vec<T> f = r * d_r + g * d_g + b * d_b + s.z * d_z + d_a;
        const Vec<T> v = blend_vjp<T>(alpha_of(s, dx, dy), f, trans, behind, w);
        store(p, trans), store(p + plane, behind);
        m[0] += w * d_r, m[1] += w * d_g, m[2] += w * d_b, m[3] += w * d_z;
        v0 += v, v1 += v * dy, v2 += v * (dy * dy);
      }
      m[4] += v0, m[5] += v0 * dx, m[6] += v1, m[7] += v0 * dx * dx, m[8] += v1 * dx, m[9] += v2;
    }
    Moments<T>& d = moments[order[k]];
    d.r += sum<T>(m[0]), d.g += sum<T>(m[1]), d.b += sum<T>(m[2]), d.z += sum<T>(m[3]);
    d.s += sum<T>(m[4]), d.sx += sum<T>(m[5]), d.sy += sum<T>(m[6]);
    d.sxx += sum<T>(m[7]), d.sxy += sum<T>(m[8]), d.syy += sum<T>(m[9]);
  });
}

// ---- all images ---------------------------------------------------------------------------------

struct Sizes {
  int64_t B, V, I;
  int N, H, W, bands, strips;   // strips of bands per image, whatever the number of threads

  Sizes(const Tensor& xyz, const Tensor& w2c, int64_t height, int64_t width)
      : B(w2c.size(0)), V(w2c.size(1)), I(B * V), N(int(xyz.size(1))), H(int(height)),
        W(int(width)), bands((H + BAND - 1) / BAND),
        strips(std::max(1, std::min(bands, int(TASKS / std::max<int64_t>(I, 1))))) {}
};

// Calls body(i, strip, band) for all bands of all images, strip by strip.
template <class T, class F> void each_band(const Sizes& n, int planes, F body) {
  at::parallel_for(0, n.I * n.strips, 1, [&](int64_t begin, int64_t end) {
    Band<T> band(planes, n.W, n.N);
    for (int64_t task = begin; task < end; task++) {
      const int strip = int(task % n.strips);
      for (int j = strip * n.bands / n.strips; j < (strip + 1) * n.bands / n.strips; j++) {
        band.start(j * BAND, n.H);
        body(task / n.strips, strip, band);
      }
    }
  });
}

template <class T>
void forward_cpu(const Scene<T>& scene, const T* bg /* (B,3) */, const T* w2c /* (B,V,4,4) */,
                 const T* K /* (B,V,4) */, T z_near, const Sizes& n, const Images<T>& out,
                 Splat<T>* splats /* (I,N) */, int* order /* (I,N) */) {
  at::parallel_for(0, n.I, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      project_image(scene, i / n.V * n.N, n.N, make_view(w2c + 16 * i, K + 4 * i, n.H, n.W), z_near,
                    splats + i * n.N, order + i * n.N);
  });
  each_band<T>(n, 5, [&](int64_t i, int, Band<T>& band) {
    blend_band(splats + i * n.N, n.N, bg + 3 * (i / n.V), band, out, i);
  });
}

template <class T>
void backward_cpu(const Scene<T>& scene, const T* bg /* (B,3) */, const T* w2c /* (B,V,4,4) */,
                  const T* K /* (B,V,4) */, const Sizes& n, const Images<T>& out,
                  const Splat<T>* splats /* (I,N) */, const int* order /* (I,N) */,
                  const Images<T>& d_out, const Scene<T>& d_scene) {
  std::vector<Moments<T>> moments(n.I * n.strips * n.N);   // (I, strips, N)
  each_band<T>(n, 7, [&](int64_t i, int strip, Band<T>& band) {
    blend_band_vjp(splats + i * n.N, order + i * n.N, n.N, bg + 3 * (i / n.V), band, out, d_out, i,
                   moments.data() + (i * n.strips + strip) * n.N);
  });
  std::vector<View<T>> views(n.I);
  for (int64_t i = 0; i < n.I; i++) views[i] = make_view(w2c + 16 * i, K + 4 * i, n.H, n.W);
  at::parallel_for(0, n.B * n.N, 256, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) {
      const Gaussian<T> g = scene.load(j);
      Gaussian<T> d_g = {};
      for (int64_t i = j / n.N * n.V; i < (j / n.N + 1) * n.V; i++) {
        T m[10] = {}, any = 0;
        for (int strip = 0; strip < n.strips; strip++)
          for (int k = 0; k < 10; k++)
            m[k] += reinterpret_cast<const T*>(&moments[(i * n.strips + strip) * n.N + j % n.N])[k];
        for (int k = 0; k < 10; k++) any += std::fabs(m[k]);
        // A Gaussian that no pixel of this view shows may hold NaN: it is not even looked at.
        if (any != 0) project_vjp(g, views[i], reinterpret_cast<const Moments<T>&>(m), d_g);
      }
      d_scene.store(j, d_g);
    }
  });
}

// ---- binding ------------------------------------------------------------------------------------

using Tensors = std::vector<Tensor>;   // xyz, scale, quat, opacity, sh: one dtype, contiguous

template <class T> T* ptr(const Tensor& x) { return x.data_ptr<T>(); }

template <class T> Scene<T> scene_of(const Tensors& g) {
  return {ptr<T>(g[0]), ptr<T>(g[1]), ptr<T>(g[2]), ptr<T>(g[3]), ptr<T>(g[4]),
          int(3 * g[4].size(2))};
}
template <class T> Images<T> images_of(const Tensors& x, const Sizes& n) {   // rgb, alpha, depth
  return {ptr<T>(x[0]), ptr<T>(x[1]), ptr<T>(x[2]), int64_t(n.H) * n.W};
}

#ifdef WITH_CUDA
uint32_t* words(const Tensor& x) { return reinterpret_cast<uint32_t*>(ptr<int>(x)); }
Dims dims_of(const Sizes& n) { return {int(n.B), int(n.V), n.N, n.H, n.W}; }

// All memory comes from PyTorch's allocator and its size is known beforehand: nothing waits for
// the device.
Tensors forward_on_cuda(const Tensors& g, const Tensor& background, const Tensor& w2c,
                        const Tensor& K, const Sizes& n, double z_near, Tensors out) {
  TORCH_CHECK(n.I * n.N < int64_t(1) << 30, "too many Gaussians x views for one call");
  const c10::cuda::CUDAGuard guard(g[0].device());
  const auto real = g[0].options();
  out.push_back(at::empty({mask_words(dims_of(n))}, real.dtype(at::kInt)));
  const Tensor scratch = at::empty({scratch_bytes(dims_of(n))}, real.dtype(at::kByte));
  C10_CUDA_CHECK(forward_cuda(
      dims_of(n), scene_of<float>(g), ptr<float>(background), ptr<float>(w2c), ptr<float>(K),
      float(z_near), images_of<float>(out, n), ptr<float>(out[3]), words(out[4]),
      words(out[5]), scratch.data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return out;
}

void backward_on_cuda(const Tensors& g, const Tensor& background, const Tensor& w2c,
                      const Tensor& K, const Sizes& n, const Tensors& out, const Tensors& d_out,
                      const Tensors& d_g) {
  const c10::cuda::CUDAGuard guard(g[0].device());
  const Tensor moments = at::empty({n.I, n.N, 10}, g[0].options());
  C10_CUDA_CHECK(backward_cuda(
      dims_of(n), scene_of<float>(g), ptr<float>(background), ptr<float>(w2c), ptr<float>(K),
      images_of<float>(out, n), ptr<float>(out[3]), words(out[4]),
      words(out[5]), images_of<float>(d_out, n), ptr<float>(moments),
      scene_of<float>(d_g), c10::cuda::getCurrentCUDAStream()));
}
#endif

// -> rgb, alpha, depth (B,V,3|1|1,H,W) and, for backward, splats (B,V,N,12), order (B,V,N) and on
// CUDA the masks
Tensors forward(const Tensors& g, const Tensor& background, const Tensor& w2c, const Tensor& K,
                int64_t H, int64_t W, double z_near) {
  const Sizes n(g[0], w2c, H, W);
  const auto real = g[0].options(), whole = real.dtype(at::kInt);
  const Tensors out = {at::empty({n.B, n.V, 3, H, W}, real), at::empty({n.B, n.V, 1, H, W}, real),
                       at::empty({n.B, n.V, 1, H, W}, real), at::empty({n.B, n.V, n.N, 12}, real),
                       at::empty({n.B, n.V, n.N}, whole)};
#ifdef WITH_CUDA
  if (g[0].is_cuda()) return forward_on_cuda(g, background, w2c, K, n, z_near, out);
#endif
  AT_DISPATCH_FLOATING_TYPES(g[0].scalar_type(), "rasterize", [&] {
    using T = scalar_t;
    forward_cpu<T>(scene_of<T>(g), ptr<T>(background), ptr<T>(w2c), ptr<T>(K), T(z_near), n,
                   images_of<T>(out, n), reinterpret_cast<Splat<T>*>(ptr<T>(out[3])),
                   ptr<int>(out[4]));
  });
  return out;
}

// out: all that forward returned; d_out: gradients of rgb, alpha, depth, empty where zero
// -> gradients of g.
Tensors backward(const Tensors& g, const Tensor& background, const Tensor& w2c, const Tensor& K,
                 const Tensors& out, const Tensors& d_out) {
  const Sizes n(g[0], w2c, out[0].size(3), out[0].size(4));
  Tensors d_g;
  for (const Tensor& x : g) d_g.push_back(at::empty_like(x));
#ifdef WITH_CUDA
  if (g[0].is_cuda()) {
    backward_on_cuda(g, background, w2c, K, n, out, d_out, d_g);
    return d_g;
  }
#endif
  AT_DISPATCH_FLOATING_TYPES(g[0].scalar_type(), "rasterize", [&] {
    using T = scalar_t;
    backward_cpu<T>(scene_of<T>(g), ptr<T>(background), ptr<T>(w2c), ptr<T>(K), n,
                    images_of<T>(out, n), reinterpret_cast<Splat<T>*>(ptr<T>(out[3])),
                    ptr<int>(out[4]), images_of<T>(d_out, n), scene_of<T>(d_g));
  });
  return d_g;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("backward", &backward, py::call_guard<py::gil_scoped_release>());
}
