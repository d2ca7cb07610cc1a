// The rasterizer on CUDA devices: kernels and their launch. Free of PyTorch, so that plain nvcc
// compiles it where there is no GPU: nvcc -arch=sm_90 -std=c++17 -c rasterize.cu
//
//   project        thread = Gaussian            its splat in every view, and the keys to sort by
//   sort           cub; block = image if small  order: the splats of every image by depth
//   bin            warp = 32 splats by depth    bits: which rows and columns of tiles they touch
//   blend          warp = tile, lane = pixel    walks the tile's splats front to back
//   blend_vjp      the same walk; then lane = splat sums the moments, one atomic per (tile, splat)
//   project_vjp    thread = Gaussian            its moments in every view -> its gradient
//
// A tile is 8 x 4 pixels, what one warp draws without waiting for any other. Its splats are the
// set bits of (its row's mask & its column's mask): a Gaussian's box overlaps a tile if it overlaps
// both. The masks stand in for the usual sorted list of (tile, splat) pairs. Their size follows
// from the sizes of the call, so nothing is read back by the host, and a CUDA graph can hold it
// all. Their price is a scan of N / 32 words per tile: with millions of Gaussians per image, lists
// would win. Left out: any dtype but float; gradients of cameras; a backward without atomics (the
// images are reproducible to the bit, the gradients to rounding).
//
// Letters: B objects, V views, I = B V images, i = b V + v, N Gaussians per object, H W pixels.
#include <algorithm>
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>
#include "splat.h"

using Sp = Splat<float>;

constexpr int TILE_W = 8, TILE_H = 4;   // pixels; one warp
constexpr int BLOCK = 4;                // tiles of a block: 2 x 2
constexpr int CHUNK = 1024;             // splats that a warp looks through at a time: 32 words
constexpr int BATCH = 16;               // splats that it draws at a time
constexpr int RING = BATCH + 32;        // and holds: a batch and what one load may add
#ifndef BLOCK_SORT
#define BLOCK_SORT (16 * 1024)          // splats of an image that one block can sort, in 66 KiB
#endif
constexpr uint32_t CULLED = 0x7fffffff;   // the last of all depth keys
constexpr unsigned ALL = ~0u;           // lanes of a warp

__host__ __device__ inline int rows(Dims n) { return (n.H + TILE_H - 1) / TILE_H; }
__host__ __device__ inline int columns(Dims n) { return (n.W + TILE_W - 1) / TILE_W; }
__host__ __device__ inline int chunks(Dims n) { return (n.N + CHUNK - 1) / CHUNK; }

// Which Gaussian of its object an entry of `order` is: the higher bits say which image.
__device__ inline int number(Dims n, uint32_t entry) { return entry & ((1u << n.bits) - 1); }

// ---- memory -------------------------------------------------------------------------------------

// Splats lie in memory as three float4 each, what `bin` needs first: x y rx ry | A B C o | r g b z.
__device__ inline Sp load(const float4* p /* (3) */) {
  const float4 a = p[0], b = p[1], c = p[2];
  return {a.x, a.y, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, a.z, a.w};
}

// p += x in one instruction where there is one
__device__ inline void add(float4* p, float4 x) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(p, x);
#else
  float* q = reinterpret_cast<float*>(p);
  atomicAdd(q, x.x), atomicAdd(q + 1, x.y), atomicAdd(q + 2, x.z), atomicAdd(q + 3, x.w);
#endif
}

__device__ inline void add(float2* p, float2 x) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(p, x);
#else
  atomicAdd(&p->x, x.x), atomicAdd(&p->y, x.y);
#endif
}

// Moments lie apart: r g b z | s sx sy sxx, and behind those of all images sxy syy.
template <class F4> __device__ auto second_order(Dims n, F4* moments /* (I,N,2) */) {
  using F2 = std::conditional_t<std::is_const<F4>::value, const float2, float2>;
  return reinterpret_cast<F2*>(moments + 2 * int64_t(n.B) * n.V * n.N);
}

// ---- project and sort ---------------------------------------------------------------------------

// Key: the bits of z, which order positive floats. Index: the image, then n.bits of the Gaussian.
__global__ void project_kernel(Dims n, Scene<float> scene, const float* w2c /* (I,4,4) */,
                               const float* K /* (I,4) */, float z_near,
                               float4* splats /* (I,N,3) */, uint32_t* keys /* (I,N) */,
                               uint32_t* index /* (I,N) or none */) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x, b = j / n.N;   // j = b N + n
  if (b >= n.B) return;
  const Gaussian<float> g = scene.load(j);
  for (int i = b * n.V; i < (b + 1) * n.V; i++) {
    const int64_t at = int64_t(i) * n.N + j % n.N;
    Sp s;
    const bool seen = project(g, make_view(w2c + 16 * i, K + 4 * i, n.H, n.W), z_near, s);
    keys[at] = seen ? __float_as_uint(s.z) : CULLED;
    if (index) index[at] = uint32_t(i) << n.bits | uint32_t(j % n.N);
    float4* p = splats + 3 * at;
    p[0] = seen ? float4{s.x, s.y, s.rx, s.ry} : float4{0, 0, -INFINITY, -INFINITY};
    if (seen) p[1] = {s.A, s.B, s.C, s.o}, p[2] = {s.r, s.g, s.b, s.z};   // else never read
  }
}

// Sorts one image per block, in shared memory. ITEMS: splats per thread. Digits that all depths of
// the image share are left out: an object at some distance has 23 or 24 bits to sort by, not 31.
template <int ITEMS> using Sorter = cub::BlockRadixSort<uint32_t, 1024, ITEMS, uint16_t>;

template <int ITEMS> __global__ void __launch_bounds__(1024)
sort_kernel(int N, const uint32_t* keys /* (I,N) */, uint32_t* order /* (I,N) */) {
  extern __shared__ __align__(16) char memory[];
  __shared__ uint32_t least, most;
  uint32_t key[ITEMS], lo = CULLED, hi = 0;
  uint16_t value[ITEMS];
  keys += int64_t(blockIdx.x) * N, order += int64_t(blockIdx.x) * N;
  if (threadIdx.x == 0) least = CULLED, most = 0;
  __syncthreads();
  for (int k = 0; k < ITEMS; k++) {
    value[k] = threadIdx.x * ITEMS + k;
    key[k] = value[k] < N ? keys[value[k]] : CULLED;   // what is beyond N stays last: ties by index
    lo = min(lo, key[k]), hi = key[k] < CULLED ? max(hi, key[k]) : hi;
  }
  for (int d = 16; d; d /= 2)
    lo = min(lo, __shfl_xor_sync(ALL, lo, d)), hi = max(hi, __shfl_xor_sync(ALL, hi, d));
  if (threadIdx.x % 32 == 0) atomicMin(&least, lo), atomicMax(&most, hi);
  __syncthreads();
  for (int k = 0; k < ITEMS; k++) key[k] = min(key[k], most + 1) - least;
  Sorter<ITEMS>(*reinterpret_cast<typename Sorter<ITEMS>::TempStorage*>(memory))
      .SortBlockedToStriped(key, value, 0, 32 - __clz(most + 1 - least));
  for (int k = 0; k < ITEMS; k++)
    if (k * 1024 + threadIdx.x < N) order[k * 1024 + threadIdx.x] = value[k];
}

// The moments of a Gaussian in all its views -> its gradient. A view that does not show it has
// only zeros, and is not looked at: the Gaussian may hold NaN.
__global__ void __launch_bounds__(128)
project_vjp_kernel(Dims n, Scene<float> scene, const float* w2c /* (I,4,4) */,
                   const float* K /* (I,4) */, const float4* moments /* (I,N,2) and float2 (I,N) */,
                   Scene<float> d_scene) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x, b = j / n.N;
  if (b >= n.B) return;
  const Gaussian<float> g = scene.load(j);
  Gaussian<float> d_g = {};
  for (int i = b * n.V; i < (b + 1) * n.V; i++) {
    const int64_t at = int64_t(i) * n.N + j % n.N;
    const float4 x = moments[2 * at], y = moments[2 * at + 1];
    const float2 z = second_order(n, moments)[at];
    const Moments<float> m = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w, z.x, z.y};
    if (x.x != 0 || x.y != 0 || x.z != 0 || x.w != 0 || y.x != 0 || y.y != 0 || y.z != 0
        || y.w != 0 || z.x != 0 || z.y != 0)
      project_vjp(g, make_view(w2c + 16 * i, K + 4 * i, n.H, n.W), m, d_g);
  }
  d_scene.store(j, d_g);
}

// ---- bin ----------------------------------------------------------------------------------------

// Bits lo..hi of a word, as far as it has them.
__device__ inline uint32_t ones(int lo, int hi) {
  lo = max(lo, 0), hi = min(hi, 31);
  return lo > hi ? 0 : (ALL << lo) & (ALL >> (31 - hi));
}

// Bit k % 32 of word k / 32 of mask r: does the k-th splat by depth touch row r of tiles, or, from
// rows(n) on, column r - rows(n)? One block: 32 warps, 1024 splats, 32 masks at a time.
__global__ void bin_kernel(Dims n, const float4* splats /* (I,N,3) */,
                           const uint32_t* order /* (I,N) */,
                           uint32_t* masks /* (I,rows+columns,words) */) {
  __shared__ uint32_t words[32][33];
  const int i = blockIdx.x / chunks(n), chunk = blockIdx.x % chunks(n);
  const int k = chunk * CHUNK + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int R = rows(n), all = R + columns(n);
  int r0 = 0, r1 = -1, c0 = 0, c1 = -1;   // the first and last row and column; none
  if (k < n.N) {
    const int64_t first = int64_t(i) * n.N;
    const float4 s = splats[3 * (first + number(n, order[first + k]))];   // x y rx ry
    const int x0 = max(0, int(ceilf(s.x - s.z - .5f))), y0 = max(0, int(ceilf(s.y - s.w - .5f)));
    const int x1 = min(n.W - 1, int(floorf(s.x + s.z - .5f)));
    const int y1 = min(n.H - 1, int(floorf(s.y + s.w - .5f)));
    if (x0 <= x1 && y0 <= y1)
      r0 = y0 / TILE_H, r1 = y1 / TILE_H, c0 = R + x0 / TILE_W, c1 = R + x1 / TILE_W;
  }
  for (int r = 0; r < all; r += 32) {
    // Lane k holds the bits r of splat k and is to hold the bits k of mask r: swap the off-diagonal
    // halves, then quarters, ... of the 32 x 32 matrix.
    uint32_t x = ones(r0 - r, r1 - r) | ones(c0 - r, c1 - r);
    for (int d = 16, m = 0xffff; d; d /= 2, m ^= m << d) {
      const uint32_t y = __shfl_xor_sync(ALL, x, d);
      x = lane & d ? (x & ~m) | ((y >> d) & m) : (x & m) | ((y << d) & ~m);
    }
    words[lane][warp] = x;
    __syncthreads();
    if (r + warp < all)
      masks[((int64_t(i) * all + r + warp) * chunks(n) + chunk) * 32 + lane] = words[warp][lane];
    __syncthreads();
  }
}

// ---- blend --------------------------------------------------------------------------------------

// The tile of this warp and the pixel of this lane. Blocks start by their number, and the busy ones
// should not be last: rows of tiles come from the middle of the image outwards. `spread`: one tile
// of every image, then the next tile; otherwise one image, then the next, which keeps it in cache.
struct Place {
  int i, r, c, x, y;   // image; row and column of the tile; pixel
  bool inside;
  float px, py;        // where the pixel is sampled
  int64_t at;          // of the pixel in a plane

  __device__ Place(Dims n, bool spread) {
    const int images = n.B * n.V, tiles = gridDim.x / images, down = (rows(n) + 1) / 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i = spread ? blockIdx.x % images : blockIdx.x / tiles;
    const int block = spread ? blockIdx.x / images : blockIdx.x % tiles;
    const int across = tiles / down, k = block / across;
    r = (k % 2 ? down / 2 - (k + 1) / 2 : down / 2 + k / 2) * 2 + warp / 2;
    c = block % across * 2 + warp % 2;
    x = c * TILE_W + lane % TILE_W, y = r * TILE_H + lane / TILE_W;
    inside = x < n.W && y < n.H;
    px = x + .5f, py = y + .5f, at = int64_t(y) * n.W + x;
  }
};

inline int tile_blocks(Dims n) { return (columns(n) + 1) / 2 * ((rows(n) + 1) / 2); }   // per image

// Bit 8 y + x: can alpha be 1/255 or more at pixel (x, y) of the tile at (x0, y0)? It is where
// -A dx^2 - B dx dy - C dy^2 <= size: in a row, given dy, an interval about dx = -B/2A dy, of half
// width sqrt(size (1 - dy^2/ry^2) / -A). The .02 covers the rounding of alpha_of for needles.
__device__ inline uint32_t footprint(const Sp& s, int x0, int y0) {
  const float inverse = -1 / s.A, wide = (s.o - float(LOG2_MIN) + .02f) * inverse;
  const float tall = wide / (s.ry * s.ry), slope = -.5f * s.B * inverse;
  uint32_t pixels = 0;
#pragma unroll
  for (int y = 0; y < TILE_H; y++) {
    const float dy = s.y - (y0 + y + .5f), middle = s.x - (x0 + .5f) + slope * dy;
    const float half = sqrtf(fmaxf(wide - tall * dy * dy, 0));
    const int first = max(0, int(ceilf(middle - half)));
    const int last = min(TILE_W - 1, int(floorf(middle + half)));
    pixels |= first <= last ? ((2u << last) - (1u << first)) << (TILE_W * y) : 0;
  }
  return pixels;
}

// What a warp keeps at hand: the next splats of its tile.
struct Hand {
  float4 splat[RING][3];
  int index[RING];              // which Gaussian each one is
  uint16_t queue[CHUNK];        // which splats of the chunk touch the tile
};

// Calls visit(first, count) for up to BATCH splats in `hand` at a time, by depth; it returns which
// pixels are not yet finished. Loads run ahead of their use: while one batch is drawn, the next
// splats, the indices of those after them and the next masks are on their way.
template <class F>
__device__ void walk(Dims n, const Place& p, const float4* splats /* (I,N,3) */,
                     const uint32_t* order /* (I,N) */,
                     const uint32_t* masks /* (I,rows+columns,words) */, Hand& hand, F visit) {
  const int lane = threadIdx.x % 32;
  const int64_t words = 32 * int64_t(chunks(n));
  const uint32_t* row = masks + (p.i * int64_t(rows(n) + columns(n)) + p.r) * words + lane;
  const uint32_t* column = row + (rows(n) - p.r + p.c) * words;
  splats += 3 * int64_t(p.i) * n.N, order += int64_t(p.i) * n.N;

  int chunk = 0, from = 0, total = 0;            // the queue holds from..total of chunk - 1
  uint32_t ahead[4];                             // the masks of this chunk and up to three more
  auto next = [&]() -> int {                     // each lane's Gaussian, or -1
    while (from >= total && chunk < chunks(n)) {
      if (chunk % 4 == 0)
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int at = (chunk + k) * 32;
          ahead[k] = chunk + k < chunks(n) ? row[at] & column[at] : 0;
        }
      uint32_t bits = ahead[0];
      ahead[0] = ahead[1], ahead[1] = ahead[2], ahead[2] = ahead[3];
      chunk++;
      if (!__any_sync(ALL, bits)) continue;
      int end = __popc(bits);                    // of this lane's part of the queue
      for (int d = 1; d < 32; d *= 2) {
        const int below = __shfl_up_sync(ALL, end, d);
        end += lane >= d ? below : 0;
      }
      from = 0, total = __shfl_sync(ALL, end, 31);
      __syncwarp();                              // the queue has been read
      for (int at = end - __popc(bits); bits; bits &= bits - 1)
        hand.queue[at++] = uint16_t(lane * 32 + __ffs(bits) - 1);
      __syncwarp();
    }
    const int at = from + lane;
    from += 32;
    return at < total ? number(n, order[(chunk - 1) * CHUNK + hand.queue[at]]) : -1;
  };

  int now = next(), head = 0, held = 0;
  uint32_t alive = ALL;
  float4 s[3] = {};
  if (now >= 0)
    for (int k = 0; k < 3; k++) s[k] = splats[3 * int64_t(now) + k];
  int then = next();
  while (__any_sync(ALL, now >= 0)) {
    // Keep those that can be seen at some pixel that is not finished.
    const uint32_t pixels = footprint(load(s), p.c * TILE_W, p.r * TILE_H);
    const uint32_t keep = __ballot_sync(ALL, now >= 0 && (pixels & alive));
    const int at = (head + held + __popc(keep & ((1u << lane) - 1))) % RING;
    if (keep >> lane & 1) {
      for (int k = 0; k < 3; k++) hand.splat[at][k] = s[k];
      hand.index[at] = now;
    }
    held += __popc(keep);
    now = then;
    if (now >= 0)
      for (int k = 0; k < 3; k++) s[k] = splats[3 * int64_t(now) + k];
    then = next();
    __syncwarp();
    for (; held >= BATCH; held -= BATCH, head = (head + BATCH) % RING) {
      if (!(alive = visit(head, BATCH))) return;
      __syncwarp();
    }
  }
  if (held == 0) return;
  if (lane >= held && lane < BATCH) {            // the last batch is filled with alpha = 2^-inf
    float4* p = hand.splat[head + lane];
    p[0] = p[2] = {}, p[1] = {0, 0, 0, -INFINITY};
  }
  __syncwarp();
  visit(head, held);
}

__global__ void __launch_bounds__(BLOCK * 32)
blend_kernel(Dims n, const float4* splats /* (I,N,3) */, const uint32_t* order /* (I,N) */,
             const uint32_t* masks /* (I,rows+columns,words) */, const float* bg /* (B,3) */,
             Images<float> out) {
  __shared__ Hand hands[BLOCK];
  const Place p(n, true);
  if (p.r >= rows(n) || p.c >= columns(n)) return;
  Hand& hand = hands[threadIdx.x / 32];
  float trans = p.inside ? 1 : -1;               // < 0: finished
  float c[4] = {};                               // sums of w times red, green, blue, depth
  walk(n, p, splats, order, masks, hand, [&](int first, int count) {
    for (int k = 0; k < count; k += 4)
#pragma unroll                                   // four at once: their alphas do not wait
      for (int l = k; l < k + 4; l++) {
        const Sp s = load(hand.splat[first + l]);
        float a = alpha_of(s, s.x - p.px, s.y - p.py);
        const float w = blend<float>(a, trans);
        c[0] += w * s.r, c[1] += w * s.g, c[2] += w * s.b, c[3] += w * s.z;
      }
    return __ballot_sync(ALL, trans > 0);
  });
  if (!p.inside) return;
  trans = fabsf(trans);
  for (int k = 0; k < 3; k++) out.plane(p.i, k)[p.at] = c[k] + trans * bg[3 * (p.i / n.V) + k];
  out.plane(p.i, 3)[p.at] = 1 - trans;
  out.plane(p.i, 4)[p.at] = c[3];
}

// Per warp. The 33rd column keeps the lanes of a column in different banks.
struct Trace {
  Hand hand;
  float4 d_out[32];         // of each pixel: red, green, blue, depth
  float2 wv[BATCH][33];     // of each splat and pixel: w and v of blend_vjp
};

// d_out -> moments. Phase 1, lane = pixel: w and v of 16 splats go to shared memory. Phase 2, lane
// = splat and half a tile: the sums over the pixels, without a reduction across lanes but one.
__global__ void __launch_bounds__(BLOCK * 32, 24 / BLOCK)
blend_vjp_kernel(Dims n, const float4* splats /* (I,N,3) */, const uint32_t* order /* (I,N) */,
                 const uint32_t* masks /* (I,rows+columns,words) */, const float* bg /* (B,3) */,
                 Images<float> out, Images<float> d_out,
                 float4* moments /* (I,N,2) and float2 (I,N) */) {
  __shared__ Trace traces[BLOCK];
  const Place p(n, false);
  if (p.r >= rows(n) || p.c >= columns(n)) return;
  Trace& t = traces[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, slot = lane % BATCH, half = lane / BATCH;
  const float* back = bg + 3 * (p.i / n.V);
  float trans = p.inside ? 1 : -1, d[5] = {}, behind = 0;
  if (p.inside)   // behind = <out - background, d_out>, since rgb = background + sum w (c - back)
    for (int k = 0; k < 5; k++) {
      d[k] = d_out.value(p.i, k, p.at);
      behind += (out.plane(p.i, k)[p.at] - (k < 3 ? back[k] : 0)) * d[k];
    }
  t.d_out[lane] = {d[0], d[1], d[2], d[4]};
  const float back_d = d[3] - (back[0] * d[0] + back[1] * d[1] + back[2] * d[2]);
  walk(n, p, splats, order, masks, t.hand, [&](int first, int count) {
    for (int k = 0; k < count; k += 4) {
      float a[4], f[4];
#pragma unroll                                   // four at once: their alphas do not wait
      for (int l = 0; l < 4; l++) {
        const Sp s = load(t.hand.splat[first + k + l]);
        a[l] = alpha_of(s, s.x - p.px, s.y - p.py);
        f[l] = back_d + s.r * d[0] + s.g * d[1] + s.b * d[2] + s.z * d[4];
      }
#pragma unroll
      for (int l = 0; l < 4; l++) {
        float w;
        const float v = blend_vjp<float>(a[l], f[l], trans, behind, w);
        t.wv[k + l][lane] = {w, v};
      }
    }
    __syncwarp();
    // A slot without a splat sums what is left of an earlier one, and is then dropped.
    const float x = t.hand.splat[first + slot][0].x - (p.c * TILE_W + .5f);
    const float y = t.hand.splat[first + slot][0].y - (p.r * TILE_H + .5f);
    float m[10] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float dy = y - (2 * half + h);
      float v0 = 0, v1 = 0, v2 = 0;              // sums over a row of v (1, dx, dx^2)
#pragma unroll
      for (int l = 0; l < 8; l++) {
        const int pixel = 16 * half + 8 * h + l;
        const float2 wv = t.wv[slot][pixel];
        const float4 d = t.d_out[pixel];
        const float dx = x - l;
        m[0] += wv.x * d.x, m[1] += wv.x * d.y, m[2] += wv.x * d.z, m[3] += wv.x * d.w;
        v0 += wv.y, v1 += wv.y * dx, v2 += wv.y * (dx * dx);
      }
      m[4] += v0, m[5] += v1, m[6] += v0 * dy, m[7] += v2, m[8] += v1 * dy, m[9] += v0 * dy * dy;
    }
#pragma unroll
    for (int k = 0; k < 10; k++) m[k] += __shfl_xor_sync(ALL, m[k], BATCH);
    if (slot < count) {                          // both halves in one instruction
      const int64_t at = int64_t(p.i) * n.N + t.hand.index[first + slot];
      add(moments + 2 * at + half, half ? float4{m[4], m[5], m[6], m[7]}
                                        : float4{m[0], m[1], m[2], m[3]});
      if (half == 0) add(second_order(n, moments) + at, float2{m[8], m[9]});
    }
    return __ballot_sync(ALL, trans > 0);
  });
}

// ---- launch -------------------------------------------------------------------------------------

inline int64_t blocks(int64_t threads, int size) { return (threads + size - 1) / size; }

// Words of the masks of all images.
int64_t mask_words(Dims n) {
  return int64_t(n.B) * n.V * (rows(n) + columns(n)) * chunks(n) * 32;
}

inline int log2_up(int64_t x) {
  int bits = 0;
  while (x > int64_t(1) << bits) bits++;
  return bits;
}

template <int ITEMS>
static cudaError_t sort_images(Dims n, const uint32_t* keys, uint32_t* order, cudaStream_t stream) {
  const int bytes = sizeof(typename Sorter<ITEMS>::TempStorage);
  if (cudaError_t e = cudaFuncSetAttribute(sort_kernel<ITEMS>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return e;
  sort_kernel<ITEMS><<<n.B * n.V, 1024, bytes, stream>>>(n.N, keys, order);
  return cudaGetLastError();
}

// keys (I,N), index (I,N) -> order (I,N). What a block cannot hold is sorted by depth and then by
// image: stable, so two sorts of short keys do what one of long keys would, sooner. `sorted` and
// `other` are (I,N) too; without `temp`, this only says how large it must be.
static cudaError_t sort(Dims n, void* temp, size_t& bytes, const uint32_t* keys, uint32_t* sorted,
                        const uint32_t* index, uint32_t* other, uint32_t* order,
                        cudaStream_t stream) {
  const int images = n.B * n.V, all = images * n.N, end = n.bits + log2_up(images);
  if (temp && n.N <= 4 * 1024) return sort_images<4>(n, keys, order, stream);
  if (temp && n.N <= BLOCK_SORT) return sort_images<BLOCK_SORT / 1024>(n, keys, order, stream);
  size_t more = bytes;
  if (images == 1) other = order;
  cudaError_t e = cub::DeviceRadixSort::SortPairs(temp, bytes, keys, sorted, index, other, all, 0,
                                                  31, stream);
  if (images > 1 && !e)
    e = cub::DeviceRadixSort::SortKeys(temp, more, other, order, all, n.bits, end, stream);
  bytes = std::max(bytes, more);
  return e;
}

// Bytes that forward needs for its own use: keys twice, indices twice and cub's.
int64_t scratch_bytes(Dims n) {
  size_t bytes = 0;
  if (n.N <= BLOCK_SORT) return 4 * int64_t(n.B) * n.V * n.N;
  n.bits = log2_up(n.N);
  sort(n, nullptr, bytes, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
  return 16 * int64_t(n.B) * n.V * n.N + 256 + int64_t(bytes);
}

cudaError_t forward_cuda(Dims n, Scene<float> g, const float* bg /* (B,3) */,
                         const float* w2c /* (I,4,4) */, const float* K /* (I,4) */, float z_near,
                         Images<float> out, float* splats /* (I,N,12) */,
                         uint32_t* order /* (I,N) */, uint32_t* masks /* (mask_words) */,
                         void* scratch /* (scratch_bytes) */,
                         cudaStream_t stream) {
  const int64_t I = int64_t(n.B) * n.V, all = I * n.N;
  float4* s = reinterpret_cast<float4*>(splats);
  n.bits = log2_up(n.N);
  if (all > 0) {
    uint32_t *keys = static_cast<uint32_t*>(scratch), *index = keys + 2 * all;
    char* temp = reinterpret_cast<char*>((uintptr_t(keys + 4 * all) + 255) / 256 * 256);
    size_t bytes = scratch_bytes(n) - (temp - static_cast<char*>(scratch));
    project_kernel<<<blocks(int64_t(n.B) * n.N, 128), 128, 0, stream>>>(
        n, g, w2c, K, z_near, s, keys, n.N > BLOCK_SORT ? index : nullptr);
    if (cudaError_t e = sort(n, temp, bytes, keys, keys + all, index, index + all, order, stream))
      return e;
    bin_kernel<<<I * chunks(n), CHUNK, 0, stream>>>(n, s, order, masks);
  }
  if (I * n.H * n.W > 0)
    blend_kernel<<<I * tile_blocks(n), BLOCK * 32, 0, stream>>>(n, s, order, masks, bg, out);
  return cudaGetLastError();
}

cudaError_t backward_cuda(Dims n, Scene<float> g, const float* bg /* (B,3) */,
                          const float* w2c /* (I,4,4) */, const float* K /* (I,4) */,
                          Images<float> out, const float* splats /* (I,N,12) */,
                          const uint32_t* order /* (I,N) */,
                          const uint32_t* masks /* (mask_words) */, Images<float> d_out,
                          float* moments /* (I,N,10) */, Scene<float> d_g, cudaStream_t stream) {
  const int64_t I = int64_t(n.B) * n.V;
  float4* m = reinterpret_cast<float4*>(moments);
  if (I * n.N == 0) return cudaSuccess;
  n.bits = log2_up(n.N);
  if (cudaError_t e = cudaMemsetAsync(m, 0, 40 * I * n.N, stream)) return e;
  if (n.H * n.W > 0)
    blend_vjp_kernel<<<I * tile_blocks(n), BLOCK * 32, 0, stream>>>(
        n, reinterpret_cast<const float4*>(splats), order, masks, bg, out, d_out, m);
  project_vjp_kernel<<<blocks(int64_t(n.B) * n.N, 128), 128, 0, stream>>>(n, g, w2c, K, m, d_g);
  return cudaGetLastError();
}
