// Optional CPU kernels for HorNet, channels last: depthwise convolution, LayerNorm, GELU and the residual join,
// forward and backward, for float32 and bfloat16 storage with float32 arithmetic.
//
// Every reduction has an order that does not depend on the number of threads. No intrinsics: GCC and Clang
// vector extensions become AVX-512, AVX2 or NEON by -march=native. `native.py` compiles, tests and calls it.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(32), aligned(2), may_alias));
struct bf16 { uint16_t bits; };
constexpr int64_t L = 16;  // floats in a vector

static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const half_vec*)p, uvec) << 16); }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline void store(bf16* p, vec v) {  // round to nearest even; a NaN stays one
    uvec u = (uvec)v, r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    ivec nan = v != v;
    *(half_vec*)p = __builtin_convertvector((r & ~(uvec)nan) | ((uvec)nan & 0x7fc0), half_vec);
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
static inline float sum(vec v) {
    float s = 0;
    for (int i = 0; i < L; i++) s += v[i];
    return s;
}

// ---- depthwise convolution, stride 1, same padding --------------------------------------------------------
// One (image, 16 channels) at a time goes through a zero-padded float32 plane that fits the L2 cache. A tile of
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
        for (int64_t i = 0; i < s.width; i++) store(row + (P + i) * L, load(x + (y * s.width + i) * stride, n));
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
                if (col + t < s.width) store(out + t * stride, acc[t], n);
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
    return (float*)__builtin_assume_aligned(aligned_alloc(64, (height + K - 1) * pitch * L * sizeof(float)), 64);
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
static inline bool tile_of_14(int64_t width) { return (width + 13) / 14 * 14 <= (width + 7) / 8 * 8; }

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
// slot[image] is the place of an image's branch output in y, -1 when its branch was dropped and never computed.
template <class X, class Y>
static void join(const X* x, const Y* y, const float* gamma, const float* keep, const int64_t* slot, X* out,
                 int64_t images, int64_t pixels, int64_t C, int threads) {
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (int64_t image = 0; image < images; image++)
        for (int64_t p = 0; p < pixels; p++) {
            const X* in = x + (image * pixels + p) * C;
            X* to = out + (image * pixels + p) * C;
            if (slot[image] < 0) {
                if (to != in) memcpy(to, in, C * sizeof(X));
                continue;
            }
            const Y* branch = y + (slot[image] * pixels + p) * C;
            for (int64_t c = 0; c < C; c += L)
                store(to + c, load(in + c, C - c) + load(branch + c, C - c) * (load(gamma + c, C - c) * keep[image]),
                      C - c);
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
        if (slot[image] < 0) continue;
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t c = 0, n = C; c < C; c += L, n -= L) {
                int64_t at = (slot[image] * pixels + p) * C + c;
                vec gk = load(g + (image * pixels + p) * C + c, n) * keep[image];
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
template <class T> static void gelu(const T* x, T* y, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += L) {
        vec v = load(x + i, n - i);
        store(y + i, v * normal(v).cdf, n - i);
    }
}
template <class T> static void gelu_backward(const T* x, const T* g, T* dx, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i += L) {
        vec v = load(x + i, n - i);
        Normal d = normal(v);
        store(dx + i, load(g + i, n - i) * (d.cdf + v * d.density), n - i);
    }
}

// ---- C entry points -----------------------------------------------------------------------------------------------
#define BY_SHAPE(F, T, ...)                                                                       \
    if (kernel == 7 && tile_of_14(s.width)) F<T, 7, 14>(__VA_ARGS__);                             \
    else if (kernel == 7) F<T, 7, 8>(__VA_ARGS__);                                                \
    else if (tile_of_14(s.width)) F<T, 3, 14>(__VA_ARGS__);                                       \
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
    void gelu_##NAME(const T* x, T* y, int64_t n, int threads) { gelu(x, y, n, threads); }                       \
    void gelu_backward_##NAME(const T* x, const T* g, T* dx, int64_t n, int threads) {                           \
        gelu_backward(x, g, dx, n, threads);                                                                     \
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
