// Optional CPU kernels for HorNet, channels last: depthwise convolution, LayerNorm, GELU and the residual join,
// forward and backward, for float32 and bfloat16 storage with float32 arithmetic.
//
// Every reduction has an order that does not depend on the number of threads. Hardly an intrinsic: GCC and Clang
// vector extensions become AVX-512, AVX2 or NEON by -march=native. `kernels.py` compiles and calls it.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Floats in a vector: as many as a register holds. Compilers take wider vectors apart, partly into single floats.
#ifdef __AVX512F__
constexpr int64_t L = 16;
#else
constexpr int64_t L = 8;
#endif
typedef float vec __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(2 * L), aligned(2), may_alias));
struct bf16 { uint16_t bits; };

static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const half_vec*)p, uvec) << 16); }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline void store(bf16* p, vec v) {  // round to nearest even; a NaN stays one
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    uvec u = (uvec)v, r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    ivec nan = v != v;
    *(half_vec*)p = __builtin_convertvector((r & ~(uvec)nan) | ((uvec)nan & 0x7fc0), half_vec);
#endif
}
template <class T> static inline vec load(const T* p, int64_t n) {
    if (n >= L) return load(p);
    T t[L] = {};
    memcpy(t, p, n * sizeof(T));
    return load(t);
}
template <class T> static inline void store(T* p, vec v, int64_t n) {
    if (n >= L) { store(p, v); return; }
    T t[L];
    store(t, v);
    memcpy(p, t, n * sizeof(T));
}
#ifdef __AVX512F__
static inline float sum(vec v) {  // by halves: a chain of 16 additions was half of a short LayerNorm
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}
static inline vec zip_low(vec a, vec b) {  // a0 b0 a1 b1 ... of the lower halves
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline vec zip_high(vec a, vec b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
static inline vec evens(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
static inline vec odds(vec a, vec b) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
static inline float sum(vec v) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    return v[0] + v[1];
}
static inline vec zip_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline vec zip_high(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
static inline vec evens(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
static inline vec odds(vec a, vec b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#endif
static inline vec* new_vectors(int64_t count) {
    return (vec*)__builtin_assume_aligned(aligned_alloc(64, (count * sizeof(vec) + 63) / 64 * 64), 64);
}

// ---- depthwise convolution, stride 1, same padding --------------------------------------------------------
// One (image, L channels) at a time goes through a zero-padded float32 plane that fits the L2 cache. A tile of
// TX neighbouring outputs stays in registers while each input vector loaded serves up to K of them.

struct Shape { int64_t images, height, width, channels; };

template <class T, int K>
static void fill_plane(float* plane, const T* x, int64_t stride, Shape s, int64_t pitch, int64_t n) {
    constexpr int P = K / 2;
    memset(plane, 0, P * pitch * L * sizeof(float));
    memset(plane + (s.height + P) * pitch * L, 0, P * pitch * L * sizeof(float));
    for (int64_t y = 0; y < s.height; y++) {
        float* row = plane + (y + P) * pitch * L;
        memset(row, 0, P * L * sizeof(float));
        for (int64_t i = 0; i < s.width; i++) {
            const T* from = x + (y * s.width + i) * stride;
            __builtin_prefetch(from + L, 0, 2);  // the next channels, whose turn comes after this plane
            store(row + (P + i) * L, load(from, n));
        }
        memset(row + (P + s.width) * L, 0, (pitch - P - s.width) * L * sizeof(float));
    }
}

template <class T, int K, int TX>
static void convolve_plane(const float* plane, int64_t pitch, const vec* weight, vec bias, T* y, int64_t stride,
                           Shape s, int64_t n) {
    for (int64_t row = 0; row < s.height; row++)
        for (int64_t col = 0; col < s.width; col += TX) {
            vec acc[TX];
#pragma GCC unroll 32
            for (int t = 0; t < TX; t++) acc[t] = bias;
            for (int ky = 0; ky < K; ky++) {
                const float* in = plane + ((row + ky) * pitch + col) * L;
                vec w[K];
#pragma GCC unroll 32
                for (int k = 0; k < K; k++) w[k] = weight[ky * K + k];
#pragma GCC unroll 32
                for (int i = 0; i < TX + K - 1; i++) {
                    vec v = load(in + i * L);
#pragma GCC unroll 32
                    for (int k = 0; k < K; k++)
                        if (i - k >= 0 && i - k < TX) acc[i - k] += v * w[k];
                }
            }
            T* out = y + (row * s.width + col) * stride;
#pragma GCC unroll 32
            for (int t = 0; t < TX; t++)
                if (col + t < s.width) {
                    store(out + t * stride, acc[t], n);
                    __builtin_prefetch(out + t * stride + L, 1, 2);  // a quarter faster with both prefetches
                }
        }
}

// weight gradient of one plane: grad[ky][kx] += sum over pixels of g * x shifted by (ky, kx)
template <int K, int TX>
static void correlate_plane(const float* xplane, const float* gplane, int64_t pitch, vec* grad, Shape s) {
    constexpr int P = K / 2;
    for (int64_t row = 0; row < s.height; row++)
        for (int ky = 0; ky < K; ky++) {
            vec acc[K];
#pragma GCC unroll 32
            for (int k = 0; k < K; k++) acc[k] = grad[ky * K + k];
            for (int64_t col = 0; col < s.width; col += TX) {
                const float* in = xplane + ((row + ky) * pitch + col) * L;
                const float* g = gplane + ((row + P) * pitch + col + P) * L;
                vec gv[TX];
#pragma GCC unroll 32
                for (int t = 0; t < TX; t++) gv[t] = load(g + t * L);
#pragma GCC unroll 32
                for (int i = 0; i < TX + K - 1; i++) {
                    vec v = load(in + i * L);
#pragma GCC unroll 32
                    for (int k = 0; k < K; k++)
                        if (i - k >= 0 && i - k < TX) acc[k] += v * gv[i - k];
                }
            }
#pragma GCC unroll 32
            for (int k = 0; k < K; k++) grad[ky * K + k] = acc[k];
        }
}

static inline int64_t padded_pitch(int64_t width, int K, int TX) { return (width + TX - 1) / TX * TX + K - 1; }
static inline float* new_plane(int64_t height, int64_t pitch, int K) {
    return (float*)new_vectors((height + K - 1) * pitch);
}

template <class T, int K, int TX>
static void depthwise(const T* x, int64_t xs, const float* w, const float* bias, T* y, int64_t ys, Shape s,
                      int threads) {
    int64_t blocks = (s.channels + L - 1) / L, pitch = padded_pitch(s.width, K, TX), pixels = s.height * s.width;
#pragma omp parallel num_threads(threads)
    {
        float* plane = new_plane(s.height, pitch, K);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < s.images * blocks; job++) {
            int64_t image = job / blocks, c = job % blocks * L, n = s.channels - c;
            vec weight[K * K], b = {};
            for (int k = 0; k < K * K; k++) weight[k] = load(w + k * s.channels + c, n);
            if (bias) b = load(bias + c, n);
            fill_plane<T, K>(plane, x + image * pixels * xs + c, xs, s, pitch, n);
            convolve_plane<T, K, TX>(plane, pitch, weight, b, y + image * pixels * ys + c, ys, s, n);
        }
        free(plane);
    }
}

// partial: (images, K*K + 1, channels), the weight gradient by tap and, last, the bias gradient
template <class T, int K, int TX>
static void depthwise_backward(const T* x, int64_t xs, const T* g, int64_t gs, const float* w, T* dx, int64_t dxs,
                               float* partial, Shape s, int threads) {
    int64_t blocks = (s.channels + L - 1) / L, pitch = padded_pitch(s.width, K, TX), pixels = s.height * s.width;
#pragma omp parallel num_threads(threads)
    {
        float *xplane = new_plane(s.height, pitch, K), *gplane = new_plane(s.height, pitch, K);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < s.images * blocks; job++) {
            int64_t image = job / blocks, c = job % blocks * L, n = s.channels - c;
            vec flipped[K * K], grad[K * K + 1] = {};
            for (int k = 0; k < K * K; k++) flipped[k] = load(w + (K * K - 1 - k) * s.channels + c, n);
            fill_plane<T, K>(xplane, x + image * pixels * xs + c, xs, s, pitch, n);
            fill_plane<T, K>(gplane, g + image * pixels * gs + c, gs, s, pitch, n);
            convolve_plane<T, K, TX>(gplane, pitch, flipped, vec{}, dx + image * pixels * dxs + c, dxs, s, n);
            correlate_plane<K, TX>(xplane, gplane, pitch, grad, s);
            for (int64_t row = 0; row < s.height; row++)
                for (int64_t i = 0; i < s.width; i++)
                    grad[K * K] += load(gplane + ((row + K / 2) * pitch + i + K / 2) * L);
            for (int k = 0; k <= K * K; k++)
                store(partial + (image * (K * K + 1) + k) * s.channels + c, grad[k], n);
        }
        free(xplane);
        free(gplane);
    }
}
// HorNet's maps are multiples of 7 wide. A tile's outputs and a row of weights stay in registers, of which AVX-512 has
// 32 and AVX2 16.
constexpr int SEVENS = L == 16 ? 14 : 7;
static inline bool in_sevens(int64_t width) { return (width + SEVENS - 1) / SEVENS * SEVENS <= (width + 7) / 8 * 8; }

// ---- LayerNorm over the last dimension: x and dx of type X, y and g of type Y ----------------------------------
template <class X, class Y>
static void layer_norm(const X* x, const float* w, const float* b, Y* y, float* mean, float* rstd, int64_t rows,
                       int64_t C, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const X* in = x + r * C;
        vec s = {}, q = {};
        for (int64_t c = 0; c < C; c += L) s += load(in + c, C - c);
        float m = sum(s) / C;
        for (int64_t c = 0; c < C; c += L) {
            vec d = load(in + c, C - c) - m;
            for (int64_t i = C - c; i < L; i++) d[i] = 0;
            q += d * d;
        }
        float k = 1 / std::sqrt(sum(q) / C + eps);
        for (int64_t c = 0; c < C; c += L)
            store(y + r * C + c, (load(in + c, C - c) - m) * k * load(w + c, C - c) + load(b + c, C - c), C - c);
        mean[r] = m;
        rstd[r] = k;
    }
}

// partial: (chunks, 2, C), gradients of weight and bias over fixed runs of rows
template <class X, class Y>
static void layer_norm_backward(const X* x, const Y* g, const float* w, const float* mean, const float* rstd, X* dx,
                                float* partial, int64_t rows, int64_t C, int64_t chunks, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *dw = partial + chunk * 2 * C, *db = dw + C;
        memset(dw, 0, 2 * C * sizeof(float));
        for (int64_t r = chunk * rows / chunks; r < (chunk + 1) * rows / chunks; r++) {
            float m = mean[r], k = rstd[r];
            vec s1 = {}, s2 = {};
            for (int64_t c = 0; c < C; c += L) {
                int64_t n = C - c;
                vec gv = load(g + r * C + c, n), xh = (load(x + r * C + c, n) - m) * k, gw = gv * load(w + c, n);
                s1 += gw;  // beyond the last channel gw is zero
                s2 += gw * xh;
                store(dw + c, load(dw + c, n) + gv * xh, n);
                store(db + c, load(db + c, n) + gv, n);
            }
            float a = sum(s1) / C, b = sum(s2) / C;
            for (int64_t c = 0; c < C; c += L) {
                int64_t n = C - c;
                vec xh = (load(x + r * C + c, n) - m) * k;
                store(dx + r * C + c, k * (load(g + r * C + c, n) * load(w + c, n) - a - xh * b), n);
            }
        }
    }
}

// ---- residual join: out = x + keep[image] * gamma * y ----------------------------------------------------------
// slot[image] is the place of an image's branch output in y, -1 when its branch was dropped and never computed. Null:
// every image has its own, and every keep is 1.
static inline int64_t slot_of(const int64_t* slot, int64_t image) { return slot ? slot[image] : image; }
static inline float keep_of(const float* keep, int64_t image) { return keep ? keep[image] : 1; }
template <class X, class Y>
static void join(const X* x, const Y* y, const float* gamma, const float* keep, const int64_t* slot, X* out,
                 int64_t images, int64_t pixels, int64_t C, int threads) {
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (int64_t image = 0; image < images; image++)
        for (int64_t p = 0; p < pixels; p++) {
            const X* in = x + (image * pixels + p) * C;
            X* to = out + (image * pixels + p) * C;
            if (slot_of(slot, image) < 0) {
                if (to != in) memcpy(to, in, C * sizeof(X));
                continue;
            }
            const Y* branch = y + (slot_of(slot, image) * pixels + p) * C;
            float k = keep_of(keep, image);
            for (int64_t c = 0; c < C; c += L)
                store(to + c, load(in + c, C - c) + load(branch + c, C - c) * (load(gamma + c, C - c) * k), C - c);
        }
}

// partial: (images, C), the gradient of gamma; dy has an entry for each image with a slot
template <class X, class Y>
static void join_backward(const X* g, const Y* y, const float* gamma, const float* keep, const int64_t* slot, Y* dy,
                          float* partial, int64_t images, int64_t pixels, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t image = 0; image < images; image++) {
        float* sums = partial + image * C;
        memset(sums, 0, C * sizeof(float));
        if (slot_of(slot, image) < 0) continue;
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t c = 0, n = C; c < C; c += L, n -= L) {
                int64_t at = (slot_of(slot, image) * pixels + p) * C + c;
                vec gk = load(g + (image * pixels + p) * C + c, n) * keep_of(keep, image);
                store(sums + c, load(sums + c, n) + gk * load(y + at, n), n);
                store(dy + at, gk * load(gamma + c, n), n);
            }
    }
}

// ---- exact GELU -------------------------------------------------------------------------------------------------
// Normal cdf through erfc(z) = P(t) exp(-z^2), t = 1 / (1 + p z), error 1.5e-7 (Abramowitz and Stegun 7.1.26); the
// exponential is the density that the derivative needs as well.
struct Normal { vec cdf, density; };
static inline Normal normal(vec x) {
    vec z = (vec)((ivec)x & 0x7fffffff) * 0.70710678f, e = z * z * -1.44269504f;
    e = e < -126.0f ? vec{} - 126.0f : e;
    vec shifted = e + 12582912.0f, r = (e - (shifted - 12582912.0f)) * 0.69314718f;  // 1.5 * 2^23 rounds
    vec p = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041666667f + r * (0.0083333333f + r * 0.0013888889f)))));
    vec ex = (vec)((ivec)p + ((ivec)shifted << 23)), t = 1 / (1 + 0.3275911f * z);
    vec half_erfc = 0.5f * ex * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f
                    + t * 1.061405429f))));
    return {x < 0 ? half_erfc : 1 - half_erfc, ex * 0.39894228f};
}
// slope (may be x): the derivative at x, which spares the backward pass the exponential; null where not needed
template <class T> static void gelu(const T* x, T* y, T* slope, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += L) {
        vec v = load(x + i, n - i);
        Normal d = normal(v);
        store(y + i, v * d.cdf, n - i);
        if (slope) store(slope + i, d.cdf + v * d.density, n - i);
    }
}

// ---- gating product: out = x * g, where x and g can be channel slices (xs, gs: distance between pixels) ------------
template <class T> static void gate(const T* x, int64_t xs, const T* g, int64_t gs, T* out, int64_t rows, int64_t C,
                                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < C; c += L)
            store(out + r * C + c, load(x + r * xs + c, C - c) * load(g + r * gs + c, C - c), C - c);
}
template <class T> static void gate_backward(const T* grad, const T* x, int64_t xs, const T* g, int64_t gs, T* dx, T* dg,
                                             int64_t dgs, int64_t rows, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < C; c += L) {
            vec v = load(grad + r * C + c, C - c);
            store(dx + r * C + c, v * load(g + r * gs + c, C - c), C - c);
            store(dg + r * dgs + c, v * load(x + r * xs + c, C - c), C - c);
        }
}

// ---- weight gradient of a Linear layer: dw (N, K) = g (M, N)^T x (M, K), db = column sums of g --------------------
// Both operands have the summed dimension outermost, so that a few broadcast values of g meet two vectors of x and no
// transposition is needed; oneDNN copies one first and falls to half its speed where M is large.
constexpr int64_t PANEL = 2 * L, RUN = 256, STRIP = L == 16 ? 8 : 6;  // floats of x, rows and columns of g in a register tile

static void pack_x(const float* x, float* packed, int64_t rows, int64_t K, int64_t k0, int64_t panels) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t v = 0, k = k0 + p * PANEL; v < 2; v++, k += L)
                store(packed + (p * RUN + m) * PANEL + v * L, k < K ? load(x + m * K + k, K - k) : vec{});
}

static void pack_g(const float* g, float* packed, int64_t rows, int64_t N, int64_t columns) {
    if (columns == STRIP)  // a fixed number of bytes is one or two moves, any other a call
        for (int64_t m = 0; m < rows; m++) memcpy(packed + m * STRIP, g + m * N, STRIP * sizeof(float));
    else
        for (int64_t m = 0; m < rows; m++)
            for (int64_t j = 0; j < STRIP; j++) packed[m * STRIP + j] = j < columns ? g[m * N + j] : 0;
}

static void add_rows(const float* packed, float* db, int64_t rows, int64_t columns) {
    vec sums[4] = {};  // as many chains as hide the latency of an addition; lanes behind the strip are not used
    for (int64_t m = 0; m < rows; m++) sums[m % 4] += load(packed + m * STRIP);
    vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int64_t j = 0; j < columns; j++) db[j] += total[j];
}

static void weight_grad_strip(const float* x_panel, const float* g_strip, float* dw, int64_t rows, int64_t K,
                              int64_t k, int64_t columns) {
    vec acc[STRIP][2] = {};
    for (int64_t m = 0; m < rows; m++) {
        vec a = load(x_panel + m * PANEL), b = load(x_panel + m * PANEL + L);
#pragma GCC unroll 8
        for (int j = 0; j < STRIP; j++) {
            float v = g_strip[m * STRIP + j];
            acc[j][0] += a * v;
            acc[j][1] += b * v;
        }
    }
    for (int j = 0; j < columns; j++)
        for (int v = 0; v < 2; v++) {
            int64_t n = K - k - v * L;
            if (n > 0) store(dw + j * K + k + v * L, load(dw + j * K + k + v * L, n) + acc[j][v], n);
        }
}

extern "C" void weight_grad(const float* x, const float* g, float* dw, float* db, int64_t M, int64_t N, int64_t K,
                            int threads) {
    constexpr int64_t BLOCK = 8;  // panels of x kept in the L2 cache
    int64_t strips = (N + STRIP - 1) / STRIP, panels = (K + PANEL - 1) / PANEL;
    memset(dw, 0, N * K * sizeof(float));
    memset(db, 0, N * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float* packed = (float*)new_vectors(BLOCK * RUN * 2);
        alignas(64) float g_strip[RUN * STRIP + L] = {};
        for (int64_t m0 = 0; m0 < M; m0 += RUN)
            for (int64_t p0 = 0; p0 < panels; p0 += BLOCK) {
                int64_t rows = M - m0 < RUN ? M - m0 : RUN, count = panels - p0 < BLOCK ? panels - p0 : BLOCK;
                pack_x(x + m0 * K, packed, rows, K, p0 * PANEL, count);
#pragma omp for schedule(static) nowait
                for (int64_t s = 0; s < strips; s++) {
                    int64_t n0 = s * STRIP, columns = N - n0 < STRIP ? N - n0 : STRIP;
                    pack_g(g + m0 * N + n0, g_strip, rows, N, columns);
                    if (p0 == 0) add_rows(g_strip, db + n0, rows, columns);
                    for (int64_t p = 0; p < count; p++)
                        weight_grad_strip(packed + p * RUN * PANEL, g_strip, dw + n0 * K, rows, K, (p0 + p) * PANEL,
                                          columns);
                }
            }
        free(packed);
    }
}

// ---- global-local filter: depthwise 3x3 on the first half of the channels, Fourier filter on the second -----------
// The 2-D real DFT of L channels is two small matrix products in the L1 cache. `tables` holds, orthonormal, row
// cosines and sines (k, w), the same with the inverse's doubled inner frequencies, and column cosines and sines
// (h, h). `filter` is (h, k, 2, C): real and imaginary parts. Output channels alternate: local 0, global 0, ...
struct Dft {
    int64_t h, w, k;
    const float *cos_row, *sin_row, *cos_back, *sin_back, *cos_col, *sin_col;
    Dft(int64_t height, int64_t width, const float* t)
        : h(height), w(width), k(width / 2 + 1), cos_row(t), sin_row(t + k * w), cos_back(t + 2 * k * w),
          sin_back(t + 3 * k * w), cos_col(t + 4 * k * w), sin_col(cos_col + h * h) {}
};

// out[o] = sum over i of in[i] * (c[o * n + i], s[o * n + i]), B outputs at a time
template <int B> static inline void rows_forward(const vec* in, const float* c, const float* s, int64_t n, vec* re,
                                                 vec* im) {
    vec a[B] = {}, b[B] = {};
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
        for (int j = 0; j < B; j++) a[j] += in[i] * c[j * n + i], b[j] -= in[i] * s[j * n + i];
    for (int j = 0; j < B; j++) re[j] = a[j], im[j] = b[j];
}
template <int B> static inline void rows_back(const vec* re, const vec* im, const float* c, const float* s, int64_t k,
                                              int64_t w, vec* out) {
    vec a[B] = {};
    for (int64_t i = 0; i < k; i++)
#pragma GCC unroll 8
        for (int j = 0; j < B; j++) a[j] += re[i] * c[i * w + j] - im[i] * s[i * w + j];
    for (int j = 0; j < B; j++) out[j] = a[j];
}
template <int B> static inline void columns(const vec* re, const vec* im, const float* c, const float* s, float sign,
                                            int64_t h, int64_t k, vec* out_re, vec* out_im) {
    vec a[B] = {}, b[B] = {};
    for (int64_t i = 0; i < h; i++) {
        vec x = re[i * k], y = im[i * k], sx = x * sign, sy = y * sign;
#pragma GCC unroll 8
        for (int j = 0; j < B; j++) {
            a[j] += x * c[j * h + i] + sy * s[j * h + i];
            b[j] += y * c[j * h + i] - sx * s[j * h + i];
        }
    }
    for (int j = 0; j < B; j++) out_re[j * k] = a[j], out_im[j * k] = b[j];
}
static void all_columns(const Dft& d, const vec* re, const vec* im, float sign, vec* out_re, vec* out_im) {
    for (int64_t q = 0; q < d.k; q++) {
        int64_t o = 0;
        for (; o + 7 <= d.h; o += 7)
            columns<7>(re + q, im + q, d.cos_col + o * d.h, d.sin_col + o * d.h, sign, d.h, d.k, out_re + o * d.k + q,
                       out_im + o * d.k + q);
        for (; o < d.h; o++)
            columns<1>(re + q, im + q, d.cos_col + o * d.h, d.sin_col + o * d.h, sign, d.h, d.k, out_re + o * d.k + q,
                       out_im + o * d.k + q);
    }
}
// plane (h, w) -> spectrum (h, k); `work` holds 2 * h * k vectors
static void dft(const Dft& d, const vec* plane, vec* re, vec* im, vec* work) {
    vec *tr = work, *ti = work + d.h * d.k;
    for (int64_t y = 0; y < d.h; y++) {
        int64_t q = 0;
        for (; q + 4 <= d.k; q += 4)
            rows_forward<4>(plane + y * d.w, d.cos_row + q * d.w, d.sin_row + q * d.w, d.w, tr + y * d.k + q,
                            ti + y * d.k + q);
        for (; q < d.k; q++)
            rows_forward<1>(plane + y * d.w, d.cos_row + q * d.w, d.sin_row + q * d.w, d.w, tr + y * d.k + q,
                            ti + y * d.k + q);
    }
    all_columns(d, tr, ti, 1, re, im);
}
static void inverse_dft(const Dft& d, const vec* re, const vec* im, vec* plane, vec* work) {
    vec *tr = work, *ti = work + d.h * d.k;
    all_columns(d, re, im, -1, tr, ti);
    for (int64_t y = 0; y < d.h; y++) {
        int64_t o = 0;
        for (; o + 7 <= d.w; o += 7)
            rows_back<7>(tr + y * d.k, ti + y * d.k, d.cos_back + o, d.sin_back + o, d.k, d.w, plane + y * d.w + o);
        for (; o < d.w; o++)
            rows_back<1>(tr + y * d.k, ti + y * d.k, d.cos_back + o, d.sin_back + o, d.k, d.w, plane + y * d.w + o);
    }
}
static void apply_filter(vec* re, vec* im, const float* filter, float sign, int64_t count, int64_t C, int64_t n) {
    for (int64_t i = 0; i < count; i++, filter += 2 * C) {
        vec wr = load(filter, n), wi = load(filter + C, n) * sign, r = re[i];
        re[i] = r * wr - im[i] * wi;
        im[i] = r * wi + im[i] * wr;
    }
}

struct Scratch {  // vectors for one job: a padded local plane, two planes, two spectra and their work space
    vec* memory;
    float* padded[2];
    vec *plane, *other, *re, *im, *gr, *gi, *work;
    Scratch(int64_t h, int64_t w, int64_t k, int64_t pitch) {
        int64_t pad = (h + 2) * pitch, area = h * w, spectrum = h * k;
        memory = new_vectors(2 * pad + 2 * area + 6 * spectrum);
        padded[0] = (float*)memory, padded[1] = (float*)(memory + pad);
        plane = memory + 2 * pad, other = plane + area, re = other + area, im = re + spectrum;
        gr = im + spectrum, gi = gr + spectrum, work = gi + spectrum;
    }
    ~Scratch() { free(memory); }
};
template <class T> static inline void store_pair(T* out, vec a, vec b, int64_t n) {
    vec lo = zip_low(a, b), hi = zip_high(a, b);
    store(out, lo, 2 * n);
    if (2 * n > L) store(out + L, hi, 2 * n - L);
}
template <class T> static inline void load_pair(const T* in, vec& a, vec& b, int64_t n) {
    vec lo = load(in, 2 * n), hi = 2 * n > L ? load(in + L, 2 * n - L) : vec{};
    a = evens(lo, hi);
    b = odds(lo, hi);
}

// x and out (images, h, w, 2 C) contiguous; taps (9, C)
template <class T> static void global_local(const T* x, const float* taps, const float* filter, const float* tables,
                                            T* out, Shape s, int threads) {
    int64_t C = s.channels, blocks = (C + L - 1) / L, area = s.height * s.width, pitch = padded_pitch(s.width, 3, 7);
    Dft d(s.height, s.width, tables);
#pragma omp parallel num_threads(threads)
    {
        Scratch t(s.height, s.width, d.k, pitch);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < s.images * blocks; job++) {
            int64_t image = job / blocks, c = job % blocks * L, n = C - c;
            const T* in = x + image * area * 2 * C + c;
            vec w[9];
            for (int k = 0; k < 9; k++) w[k] = load(taps + k * C + c, n);
            fill_plane<T, 3>(t.padded[0], in, 2 * C, s, pitch, n);
            convolve_plane<float, 3, 7>(t.padded[0], pitch, w, vec{}, (float*)t.other, L, s, L);
            for (int64_t i = 0; i < area; i++) t.plane[i] = load(in + i * 2 * C + C, n);
            dft(d, t.plane, t.re, t.im, t.work);
            apply_filter(t.re, t.im, filter + c, 1, s.height * d.k, C, n);
            inverse_dft(d, t.re, t.im, t.plane, t.work);
            T* to = out + image * area * 2 * C + 2 * c;
            for (int64_t i = 0; i < area; i++) store_pair(to + i * 2 * C, t.other[i], t.plane[i], n);
        }
    }
}

// partial: (groups, 9 + 2 h k, C), gradients of taps and filter over fixed runs of images
template <class T> static void global_local_backward(const T* x, const T* g, const float* taps, const float* filter,
                                                     const float* tables, T* dx, float* partial, Shape s,
                                                     int64_t groups, int threads) {
    int64_t C = s.channels, blocks = (C + L - 1) / L, area = s.height * s.width, pitch = padded_pitch(s.width, 3, 7);
    Dft d(s.height, s.width, tables);
    int64_t spectrum = s.height * d.k, entries = 9 + 2 * spectrum;
#pragma omp parallel num_threads(threads)
    {
        Scratch t(s.height, s.width, d.k, pitch);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < groups * blocks; job++) {
            int64_t group = job / blocks, c = job % blocks * L, n = C - c;
            float* sums = partial + group * entries * C + c;
            vec flipped[9], grad[9] = {};
            for (int k = 0; k < 9; k++) flipped[k] = load(taps + (8 - k) * C + c, n);
            for (int64_t i = 0; i < entries; i++) store(sums + i * C, vec{}, n);
            for (int64_t image = group * s.images / groups; image < (group + 1) * s.images / groups; image++) {
                const T *in = x + image * area * 2 * C + c, *from = g + image * area * 2 * C + 2 * c;
                T* to = dx + image * area * 2 * C + c;
                for (int64_t i = 0; i < area; i++) load_pair(from + i * 2 * C, t.other[i], t.plane[i], n);
                fill_plane<T, 3>(t.padded[0], in, 2 * C, s, pitch, n);
                fill_plane<float, 3>(t.padded[1], (float*)t.other, L, s, pitch, L);
                convolve_plane<T, 3, 7>(t.padded[1], pitch, flipped, vec{}, to, 2 * C, s, n);
                correlate_plane<3, 7>(t.padded[0], t.padded[1], pitch, grad, s);
                dft(d, t.plane, t.gr, t.gi, t.work);
                for (int64_t i = 0; i < area; i++) t.plane[i] = load(in + i * 2 * C + C, n);
                dft(d, t.plane, t.re, t.im, t.work);
                for (int64_t i = 0; i < spectrum; i++) {  // conj(X) G, inner frequencies counted twice
                    float twice = i % d.k == 0 || 2 * (i % d.k) == d.w ? 1 : 2;
                    float *real = sums + (9 + 2 * i) * C, *imag = real + C;
                    store(real, load(real, n) + twice * (t.re[i] * t.gr[i] + t.im[i] * t.gi[i]), n);
                    store(imag, load(imag, n) + twice * (t.re[i] * t.gi[i] - t.im[i] * t.gr[i]), n);
                }
                apply_filter(t.gr, t.gi, filter + c, -1, spectrum, C, n);
                inverse_dft(d, t.gr, t.gi, t.plane, t.work);
                for (int64_t i = 0; i < area; i++) store(to + i * 2 * C + C, t.plane[i], n);
            }
            for (int k = 0; k < 9; k++) store(sums + k * C, grad[k], n);
        }
    }
}

// ---- C entry points -----------------------------------------------------------------------------------------------
#define BY_SHAPE(F, T, ...)                                                                       \
    if (kernel == 7 && in_sevens(s.width)) F<T, 7, SEVENS>(__VA_ARGS__);                             \
    else if (kernel == 7) F<T, 7, 8>(__VA_ARGS__);                                                \
    else if (in_sevens(s.width)) F<T, 3, SEVENS>(__VA_ARGS__);                                       \
    else F<T, 3, 8>(__VA_ARGS__)

#define ONE_TYPE(NAME, T)                                                                                       \
    void depthwise_##NAME(const T* x, int64_t xs, const float* w, const float* bias, T* y, int64_t ys,           \
                          const int64_t* shape, int kernel, int threads) {                                       \
        Shape s{shape[0], shape[1], shape[2], shape[3]};                                                         \
        BY_SHAPE(depthwise, T, x, xs, w, bias, y, ys, s, threads);                                               \
    }                                                                                                            \
    void depthwise_backward_##NAME(const T* x, int64_t xs, const T* g, int64_t gs, const float* w, T* dx,        \
                                   int64_t dxs, float* partial, const int64_t* shape, int kernel, int threads) { \
        Shape s{shape[0], shape[1], shape[2], shape[3]};                                                         \
        BY_SHAPE(depthwise_backward, T, x, xs, g, gs, w, dx, dxs, partial, s, threads);                          \
    }                                                                                                            \
    void global_local_##NAME(const T* x, const float* taps, const float* filter, const float* tables, T* out,    \
                             const int64_t* shape, int threads) {                                                \
        global_local(x, taps, filter, tables, out, Shape{shape[0], shape[1], shape[2], shape[3]}, threads);      \
    }                                                                                                            \
    void global_local_backward_##NAME(const T* x, const T* g, const float* taps, const float* filter,            \
                                      const float* tables, T* dx, float* partial, const int64_t* shape,          \
                                      int64_t groups, int threads) {                                             \
        Shape s{shape[0], shape[1], shape[2], shape[3]};                                                         \
        global_local_backward(x, g, taps, filter, tables, dx, partial, s, groups, threads);                      \
    }                                                                                                            \
    void gelu_##NAME(const T* x, T* y, T* slope, int64_t n, int threads) { gelu(x, y, slope, n, threads); }      \
    void gate_##NAME(const T* x, int64_t xs, const T* g, int64_t gs, T* out, int64_t rows, int64_t c,            \
                     int threads) {                                                                              \
        gate(x, xs, g, gs, out, rows, c, threads);                                                               \
    }                                                                                                            \
    void gate_backward_##NAME(const T* grad, const T* x, int64_t xs, const T* g, int64_t gs, T* dx, T* dg,       \
                              int64_t dgs, int64_t rows, int64_t c, int threads) {                               \
        gate_backward(grad, x, xs, g, gs, dx, dg, dgs, rows, c, threads);                                        \
    }

#define TWO_TYPES(NAME, X, Y)                                                                                      \
    void layer_norm_##NAME(const X* x, const float* w, const float* b, Y* y, float* mean, float* rstd,             \
                           int64_t rows, int64_t c, float eps, int threads) {                                      \
        layer_norm(x, w, b, y, mean, rstd, rows, c, eps, threads);                                                 \
    }                                                                                                              \
    void layer_norm_backward_##NAME(const X* x, const Y* g, const float* w, const float* mean, const float* rstd,  \
                                    X* dx, float* partial, int64_t rows, int64_t c, int64_t chunks, int threads) { \
        layer_norm_backward(x, g, w, mean, rstd, dx, partial, rows, c, chunks, threads);                           \
    }                                                                                                              \
    void join_##NAME(const X* x, const Y* y, const float* gamma, const float* keep, const int64_t* slot, X* out,   \
                     int64_t images, int64_t pixels, int64_t c, int threads) {                                     \
        join(x, y, gamma, keep, slot, out, images, pixels, c, threads);                                            \
    }                                                                                                              \
    void join_backward_##NAME(const X* g, const Y* y, const float* gamma, const float* keep, const int64_t* slot,  \
                              Y* dy, float* partial, int64_t images, int64_t pixels, int64_t c, int threads) {     \
        join_backward(g, y, gamma, keep, slot, dy, partial, images, pixels, c, threads);                           \
    }

extern "C" {
ONE_TYPE(f32, float)
ONE_TYPE(bf16, bf16)
TWO_TYPES(f32_f32, float, float)
TWO_TYPES(f32_bf16, float, bf16)
TWO_TYPES(bf16_bf16, bf16, bf16)
}
