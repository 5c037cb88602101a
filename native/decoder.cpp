// Images as Pillow computes them, only faster: the wanted window of a JPEG, resized, and affine warps.
//
// Every function gives the bits that Pillow < 13 gives; `decoder.py` compares them at start-up and keeps Pillow where
// they differ. Decoding is done by the very libjpeg-turbo that Pillow has loaded, its functions found by name. What is
// saved: columns and rows outside the window are not transformed back nor converted, resizing makes only the wanted
// rows and columns, and both passes and the warps run on vectors (four bytes a pixel: R, G, B and one that is unused).
//
// Compiled with -ffp-contract=off: a fused multiply-add would round differently from Pillow's build.
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// The structures of the library that Pillow carries (-DJPEG_LIB_VERSION=62 or 80), whatever the headers' own default.
#define JCONFIG_INCLUDED
#define LIBJPEG_TURBO_VERSION 3.0.0
#define LIBJPEG_TURBO_VERSION_NUMBER 3000000
#define C_ARITH_CODING_SUPPORTED 1
#define D_ARITH_CODING_SUPPORTED 1
#define MEM_SRCDST_SUPPORTED 1
#define BITS_IN_JSAMPLE 8
#include <jpeglib.h>

typedef int32_t Lanes __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef int32_t Eights __attribute__((vector_size(32)));
typedef double Eight __attribute__((vector_size(64)));
typedef double Four __attribute__((vector_size(32)));
typedef int32_t Quads __attribute__((vector_size(16)));

namespace {

struct Functions {
  decltype(&jpeg_std_error) std_error;
  decltype(&jpeg_CreateDecompress) create;
  decltype(&jpeg_destroy_decompress) destroy;
  decltype(&jpeg_mem_src) mem_src;
  decltype(&jpeg_read_header) read_header;
  decltype(&jpeg_start_decompress) start;
  decltype(&jpeg_read_scanlines) read;
  decltype(&jpeg_skip_scanlines) skip;
  decltype(&jpeg_crop_scanline) crop;
  decltype(&jpeg_input_complete) complete;
} jpeg;

struct Errors {
  jpeg_error_mgr base;
  jmp_buf back;
};

void leave(j_common_ptr info) { longjmp(reinterpret_cast<Errors *>(info->err)->back, 1); }
void ignore(j_common_ptr) {}

// Memory kept between images, so that the kernel need not map and clear it for each of them.
struct Buffer {
  uint8_t *data = nullptr;
  size_t size = 0;
  uint8_t *need(size_t bytes) {
    if (bytes > size || (size > (64u << 20) && bytes < size / 4)) {
      free(data);
      data = static_cast<uint8_t *>(aligned_alloc(64, (bytes + 127) / 64 * 64));
      size = data ? bytes : 0;
    }
    return data;
  }
};
thread_local Buffer line_memory, row_memory, tap_memory;

// ---------------------------------------------------------------------------------------------- resizing
// Pillow's two passes over 8-bit values with weights in units of 2^-22; each weight is stored once per use.
constexpr int BITS = 22;

struct Taps {
  int first, count;  // input positions with a weight
};

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

double triangle(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Weights of outputs first..first + count of a line of `in` values made `out` long, and the most that one of them has.
// `weights` has `wide` places for each, zeros behind the used ones; scratch holds `wide` doubles.
int make_taps(int in, int out, int first, int count, bool bicubic, int wide, Taps *taps, int32_t *weights,
               double *scratch) {
  const double scale = static_cast<double>(in) / out, filter_scale = scale < 1.0 ? 1.0 : scale;
  const double support = (bicubic ? 2.0 : 1.0) * filter_scale, step = 1.0 / filter_scale;
  int most = 0;
  for (int i = 0; i < count; i++) {
    const double centre = (first + i + 0.5) * scale;
    int low = static_cast<int>(centre - support + 0.5), high = static_cast<int>(centre + support + 0.5);
    low = low < 0 ? 0 : low;
    high = (high > in ? in : high) - low;
    double sum = 0;
    for (int x = 0; x < high; x++) {
      const double at = (x + low - centre + 0.5) * step;
      sum += scratch[x] = bicubic ? cubic(at) : triangle(at);
    }
    for (int x = 0; x < wide; x++) {
      double w = x < high ? scratch[x] : 0.0;
      if (x < high && sum != 0.0) w /= sum;
      weights[i * wide + x] = static_cast<int32_t>((w < 0 ? -0.5 : 0.5) + w * (1 << BITS));
    }
    taps[i] = {low, high};
    most = high > most ? high : most;
  }
  return most;
}

int wide_taps(int in, int out, bool bicubic) {
  const double scale = static_cast<double>(in) / out;
  const int most = static_cast<int>(std::ceil((bicubic ? 2.0 : 1.0) * (scale < 1.0 ? 1.0 : scale))) * 2 + 1;
  return (most + 3) / 4 * 4;
}

inline Lanes widen(const uint8_t *from) {
#ifdef __AVX512F__  // one instruction, which compilers do not find by themselves
  return reinterpret_cast<Lanes>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#elif defined(__AVX2__)
  __m256i halves[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))),
                       _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + 8)))};
  Lanes wide;
  memcpy(&wide, halves, sizeof wide);
  return wide;
#else
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Lanes);
#endif
}

inline Bytes narrow(Lanes sum) {
  const Lanes zero = {}, most = zero + 255;
  sum = sum < zero ? zero : sum;
  sum = sum > most ? most : sum;
  return __builtin_convertvector(__builtin_convertvector(sum, Shorts), Bytes);
}

// The sums of each four pixels of four vectors, one behind the other.
inline Lanes add_up(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Lanes ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const Lanes cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// Four rows, `line` bytes apart, to rows `stride` apart. `spread` has each weight four times, once for each byte of a
// pixel. STEPS: four taps each, the same number for all outputs, so that the processor guesses the loop's end; 0: any.
template <int STEPS>
void across(const uint8_t *row, size_t line, const Taps *taps, const int32_t *spread, int wide, int count, uint8_t *out,
            size_t stride) {
  const int steps = STEPS ? STEPS : wide / 4;
  for (int i = 0; i < count; i++) {
    const uint8_t *from = row + 4 * taps[i].first;
    const int32_t *weight = spread + 4 * static_cast<size_t>(i) * wide;
    Lanes a = {}, b = {}, c = {}, d = {};
    for (int k = 0; k < steps; k++) {
      Lanes w;
      memcpy(&w, weight + 16 * k, sizeof w);
      a += widen(from + 16 * k) * w;
      b += widen(from + 16 * k + line) * w;
      c += widen(from + 16 * k + 2 * line) * w;
      d += widen(from + 16 * k + 3 * line) * w;
    }
    const Bytes bytes = narrow((add_up(a, b, c, d) + (1 << (BITS - 1))) >> BITS);
    uint32_t pixels[4];
    memcpy(pixels, &bytes, sizeof pixels);
    for (int j = 0; j < 4; j++) memcpy(out + 4 * i + j * stride, pixels + j, 4);
  }
}

// One output row from the rows that `taps` names, `bytes` (a multiple of 16) long each.
void down(const uint8_t *rows, size_t bytes, Taps taps, const int32_t *weights, uint8_t *out) {
  const uint8_t *from = rows + taps.first * bytes;
  size_t x = 0;
  for (; x + 64 <= bytes; x += 64) {
    Lanes sum[4];
    for (auto &part : sum) part = Lanes{} + (1 << (BITS - 1));
    for (int k = 0; k < taps.count; k++)
      for (int j = 0; j < 4; j++) sum[j] += widen(from + k * bytes + x + 16 * j) * weights[k];
    for (int j = 0; j < 4; j++) {
      const Bytes done = narrow(sum[j] >> BITS);
      memcpy(out + x + 16 * j, &done, sizeof done);
    }
  }
  for (; x < bytes; x += 16) {
    Lanes sum = Lanes{} + (1 << (BITS - 1));
    for (int k = 0; k < taps.count; k++) sum += widen(from + k * bytes + x) * weights[k];
    const Bytes done = narrow(sum >> BITS);
    memcpy(out + x, &done, sizeof done);
  }
}

// What is wanted: the image's rectangle `crop` (left, top, width, height) made `resized` (width, height), and of
// that the rectangle `view` (left, top, width, height).
struct Wanted {
  int crop[4], resized[2], view[4], bicubic;
};

struct Plan {
  int steps, wide_x, wide_y, left, right, top, bottom;  // columns and rows of the image that are read
  Taps *taps_x, *taps_y;
  int32_t *spread, *weights_y;
};

bool make_plan(const Wanted &wanted, Plan &plan) {
  const int *view = wanted.view;
  plan.wide_x = wide_taps(wanted.crop[2], wanted.resized[0], wanted.bicubic);
  plan.wide_y = wide_taps(wanted.crop[3], wanted.resized[1], wanted.bicubic);
  const size_t in_x = static_cast<size_t>(view[2]) * plan.wide_x, in_y = static_cast<size_t>(view[3]) * plan.wide_y;
  const size_t most = plan.wide_x > plan.wide_y ? plan.wide_x : plan.wide_y;
  uint8_t *memory = tap_memory.need(20 * in_x + 4 * in_y + 8 * (view[2] + view[3]) + 8 * most + 64);
  if (!memory) return false;
  double *scratch = reinterpret_cast<double *>(memory);
  plan.spread = reinterpret_cast<int32_t *>(scratch + most);
  int32_t *weights_x = plan.spread + 4 * in_x;
  plan.weights_y = weights_x + in_x;
  plan.taps_x = reinterpret_cast<Taps *>(plan.weights_y + in_y);
  plan.taps_y = plan.taps_x + view[2];
  const int most_x = make_taps(wanted.crop[2], wanted.resized[0], view[0], view[2], wanted.bicubic, plan.wide_x,
                               plan.taps_x, weights_x, scratch);
  plan.steps = (most_x + 3) / 4;
  make_taps(wanted.crop[3], wanted.resized[1], view[1], view[3], wanted.bicubic, plan.wide_y, plan.taps_y,
            plan.weights_y, scratch);
  for (size_t i = 0; i < 4 * in_x; i++) plan.spread[i] = weights_x[i / 4];
  const Taps last_x = plan.taps_x[view[2] - 1], last_y = plan.taps_y[view[3] - 1];
  plan.left = wanted.crop[0] + plan.taps_x[0].first;
  plan.right = wanted.crop[0] + last_x.first + last_x.count;
  plan.top = wanted.crop[1] + plan.taps_y[0].first;
  plan.bottom = wanted.crop[1] + last_y.first + last_y.count;
  return true;
}

// ---------------------------------------------------------------------------------------------- decoding
constexpr int MARGIN = 8;  // columns beside the window: chroma upsampling looks at neighbours
constexpr int LINES = 8;   // rows asked for at once

// Whether nothing but the end of the image follows the rows read so far, so that Pillow would accept the rest too.
// Damage there changes no wanted row; a marker other than the end could make Pillow refuse, a missing end does.
bool ends_well(jpeg_decompress_struct *info) {
  if (jpeg.complete(info)) return true;  // several scans: all were read before the first row
  auto goes_on = [&](int marker) { return info->restart_interval && marker >= 0xD0 && marker <= 0xD7; };
  if (info->unread_marker && !goes_on(info->unread_marker)) return info->unread_marker == JPEG_EOI;
  const uint8_t *at = info->src->next_input_byte, *end = at + info->src->bytes_in_buffer;
  while ((at = static_cast<const uint8_t *>(memchr(at, 0xFF, end - at)))) {
    while (at < end && *at == 0xFF) at++;
    if (at == end) return false;
    if (*at != 0 && !goes_on(*at)) return *at == JPEG_EOI;
  }
  return false;
}

bool sampling_known(const jpeg_decompress_struct *info) {
  if (info->num_components == 1) return true;
  const jpeg_component_info *part = info->comp_info;
  const bool luma = part[0].h_samp_factor <= 2 && part[0].v_samp_factor <= part[0].h_samp_factor;
  return luma && part[1].h_samp_factor == 1 && part[1].v_samp_factor == 1 && part[2].h_samp_factor == 1 &&
         part[2].v_samp_factor == 1;
}

// The window's rows, resized across, to `rows`. Only plain data lives here: errors leave by longjmp.
int read_rows(jpeg_decompress_struct *info, const uint8_t *data, size_t size, const Plan &plan, const Wanted &wanted,
              uint8_t *rows, size_t stride) {
  jpeg.create(info, JPEG_LIB_VERSION, sizeof *info);
  jpeg.mem_src(info, const_cast<uint8_t *>(data), size);
  if (jpeg.read_header(info, TRUE) != JPEG_HEADER_OK || !sampling_known(info)) return 1;
  const int width = info->image_width, height = info->image_height;
  if (plan.left < 0 || plan.top < 0 || plan.right > width || plan.bottom > height) return 1;
  info->out_color_space = JCS_EXT_RGBX;
  jpeg.start(info);
  JDIMENSION left = plan.left > MARGIN ? plan.left - MARGIN : 0;
  JDIMENSION columns = (plan.right + MARGIN < width ? plan.right + MARGIN : width) - left;
  if (columns < info->output_width) jpeg.crop(info, &left, &columns);
  const size_t line = 4 * static_cast<size_t>(columns) + 16 * static_cast<size_t>(plan.steps) + 64;
  uint8_t *lines = line_memory.need(line * LINES);
  if (!lines) return 1;
  JSAMPROW pointers[LINES];
  for (int i = 0; i < LINES; i++) pointers[i] = lines + line * i;
  if (plan.top) jpeg.skip(info, plan.top);
  // Taps count from the crop's left edge; the line in memory starts at column `left`.
  const uint8_t *first = lines + 4 * (static_cast<long>(wanted.crop[0]) - static_cast<long>(left));
  const auto resize =
      plan.steps == 1 ? across<1> : plan.steps == 2 ? across<2> : plan.steps == 3 ? across<3> : across<0>;
  for (int at = plan.top; at < plan.bottom; at += LINES) {
    const int most = plan.bottom - at < LINES ? plan.bottom - at : LINES;
    for (int have = 0; have < most;) {
      const int count = jpeg.read(info, pointers + have, most - have);
      if (count <= 0) return 1;
      have += count;
    }
    for (int i = 0; i < most; i += 4)
      resize(first + line * i, line, plan.taps_x, plan.spread, plan.wide_x, wanted.view[2],
             rows + stride * (at + i - plan.top), stride);
  }
  return info->err->num_warnings || !ends_well(info);
}

// ---------------------------------------------------------------------------------------------- warping
// Four neighbours along a row or a column, a pixel each, and the point between the middle two.
struct Between {
  Lanes pixels;
  double at;
};

inline int clamp(int x, int size) {
  x = x < size ? x : size - 1;
  return x > 0 ? x : 0;
}

template <int K> inline Eights nth(Lanes p, Lanes q) {
  return __builtin_shufflevector(p, q, 4 * K, 4 * K + 1, 4 * K + 2, 4 * K + 3, 16 + 4 * K, 17 + 4 * K, 18 + 4 * K,
                                 19 + 4 * K);
}

// Cubic interpolation of two pixels at once. The polynomial's factors are whole numbers, so integers hold them exactly.
inline Eight cubic_of_two(Between p, Between q) {
  const Eights a = nth<0>(p.pixels, q.pixels), b = nth<1>(p.pixels, q.pixels), c = nth<2>(p.pixels, q.pixels),
               d = nth<3>(p.pixels, q.pixels), ab = a - b, cd = c - d;
  const Eight t = {p.at, p.at, p.at, p.at, q.at, q.at, q.at, q.at};
  return __builtin_convertvector(b, Eight) +
         t * (__builtin_convertvector(c - a, Eight) +
              t * (__builtin_convertvector(ab + ab + cd, Eight) + t * __builtin_convertvector(-ab - cd, Eight)));
}

inline Four cubic_between(Four a, Four b, Four c, Four d, double at) {
  const Four t = {at, at, at, at}, slope = c - a, bend = 2.0 * (a - b) + c - d, twist = b - a - c + d;
  return b + t * (slope + t * (bend + t * twist));
}

struct Source {
  const uint8_t *pixels;
  int width, height;
  const uint8_t *row(int y) const { return pixels + 4 * static_cast<size_t>(width) * clamp(y, height); }
};

// The neighbours x - 1 ... x + 2 in row y, or y - 1 ... y + 2 in column x; beyond the edge its own pixel.
inline Lanes neighbours(const Source &in, int x, int y, bool in_row) {
  if (in_row && x >= 1 && x + 2 < in.width) return widen(in.row(y) + 4 * (x - 1));
  uint32_t pixels[4];
  for (int i = 0; i < 4; i++)
    memcpy(pixels + i, in_row ? in.row(y) + 4 * clamp(x - 1 + i, in.width) : in.row(y - 1 + i) + 4 * x, 4);
  const Quads together = {static_cast<int>(pixels[0]), static_cast<int>(pixels[1]), static_cast<int>(pixels[2]),
                          static_cast<int>(pixels[3])};
  uint8_t bytes[16];
  memcpy(bytes, &together, sizeof bytes);
  return widen(bytes);
}

inline Four linear(const Source &in, int x, int y, double dx, double dy) {
  auto along = [&](int row) {
    const uint8_t *a = in.row(row) + 4 * clamp(x, in.width), *b = in.row(row) + 4 * clamp(x + 1, in.width);
    const Four first = {double(a[0]), double(a[1]), double(a[2]), 0};
    const Four second = {double(b[0]), double(b[1]), double(b[2]), 0};
    return first + (second - first) * dx;
  };
  const Four above = along(y), below = along(y + 1);
  return above + (below - above) * dy;
}

inline Four cubic_in_plane(const Source &in, int x, int y, double dx, double dy) {
  const Eight upper = cubic_of_two({neighbours(in, x, y - 1, true), dx}, {neighbours(in, x, y, true), dx}),
              lower = cubic_of_two({neighbours(in, x, y + 1, true), dx}, {neighbours(in, x, y + 2, true), dx});
  return cubic_between(__builtin_shufflevector(upper, upper, 0, 1, 2, 3),
                       __builtin_shufflevector(upper, upper, 4, 5, 6, 7),
                       __builtin_shufflevector(lower, lower, 0, 1, 2, 3),
                       __builtin_shufflevector(lower, lower, 4, 5, 6, 7), dy);
}

enum Way { LINEAR, PLANE, ROWS, COLUMNS };  // ROWS, COLUMNS: cubic, and pixels lie between neighbours of these alone

// One row of a warp to `line`, four whole numbers a pixel. Where pixels lie between neighbours in one direction only,
// the other direction's interpolation would give its middle value, and is left out.
template <Way WAY> void warp_row(const Source in, const double *matrix, int y, Quads blank, int32_t *line) {
  const double m0 = matrix[0], m1 = matrix[1] * (y + 0.5), m2 = matrix[2], width = in.width;
  const double m3 = matrix[3], m4 = matrix[4] * (y + 0.5), m5 = matrix[5], height = in.height;
  Between held = {};
  int held_x = -1;
  auto put = [&](int x, Four v) {
    const Quads whole = __builtin_convertvector(v, Quads);  // towards zero; narrow() limits it to 0..255
    memcpy(line + 4 * x, &whole, sizeof whole);
  };
  auto put_two = [&](Between next, int x) {
    const Eight two = cubic_of_two(held, next);
    put(held_x, __builtin_shufflevector(two, two, 0, 1, 2, 3));
    put(x, __builtin_shufflevector(two, two, 4, 5, 6, 7));
    held_x = -1;
  };
  for (int x = 0; x < in.width; x++) {
    double sx = m0 * (x + 0.5) + m1 + m2, sy = m3 * (x + 0.5) + m4 + m5;
    if (!(sx >= 0.0 && sx < width && sy >= 0.0 && sy < height)) {
      memcpy(line + 4 * x, &blank, sizeof blank);
      continue;
    }
    sx -= 0.5;
    sy -= 0.5;
    const int column = static_cast<int>(sx + 1.0) - 1, row = static_cast<int>(sy + 1.0) - 1;  // floor: both >= -0.5
    if (WAY == LINEAR || WAY == PLANE) {
      put(x, (WAY == LINEAR ? linear : cubic_in_plane)(in, column, row, sx - column, sy - row));
      continue;
    }
    const Between next = {neighbours(in, column, row, WAY == ROWS), WAY == ROWS ? sx - column : sy - row};
    if (held_x >= 0) {
      put_two(next, x);
    } else {
      held = next;
      held_x = x;
    }
  }
  if (held_x >= 0) put_two(held, held_x);
}

}  // namespace

extern "C" {

// Find the functions of the libjpeg at `path` (already loaded by Pillow); 0 when all are there.
int use_libjpeg(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return 1;
  bool found = true;
  auto find = [&](auto &function, const char *name) {
    void *address = dlsym(library, name);
    memcpy(&function, &address, sizeof address);
    found = found && address;
  };
  find(jpeg.std_error, "jpeg_std_error");
  find(jpeg.create, "jpeg_CreateDecompress");
  find(jpeg.destroy, "jpeg_destroy_decompress");
  find(jpeg.mem_src, "jpeg_mem_src");
  find(jpeg.read_header, "jpeg_read_header");
  find(jpeg.start, "jpeg_start_decompress");
  find(jpeg.read, "jpeg_read_scanlines");
  find(jpeg.skip, "jpeg_skip_scanlines");
  find(jpeg.crop, "jpeg_crop_scanline");
  find(jpeg.complete, "jpeg_input_complete");
  return !found;
}

// Width and height of a JPEG in gray or three colours whose header is of the usual form, to `size`. Returns 0; 1 for
// headers that Pillow should judge too before the size is used; 2 for everything else.
int probe(const uint8_t *data, int64_t length, int *size) {
  int verdict = 0;
  if (length < 4 || data[0] != 0xFF || data[1] != 0xD8) return 2;
  for (int64_t at = 2; at + 4 <= length;) {
    const uint8_t *segment = data + at + 4;
    const int marker = data[at + 1];
    const int64_t bytes = (data[at + 2] << 8 | data[at + 3]) - 2;
    if (data[at] != 0xFF || bytes < 0 || at + 4 + bytes > length) return 2;
    if (marker == 0xC0 || marker == 0xC1 || marker == 0xC2) {
      if (bytes < 6 || segment[0] != 8 || (segment[5] != 1 && segment[5] != 3) || size[0]) return 2;
      size[0] = segment[3] << 8 | segment[4];
      size[1] = segment[1] << 8 | segment[2];
      if (!size[0] || !size[1] || bytes != 6 + 3 * segment[5]) return 2;
    } else if (marker == 0xDA) {
      return size[0] ? verdict : 2;
    } else if (marker == 0xE0 || marker == 0xEE) {
      if (bytes < 14 && !(marker == 0xEE && bytes >= 12)) verdict = 1;
    } else if (marker > 0xE0 && marker < 0xF0) {
      verdict = 1;
    } else if (marker != 0xDB && marker != 0xC4 && marker != 0xDD && marker != 0xFE) {
      return 2;
    }
    at += 4 + bytes;
  }
  return 2;
}

// The wanted window of a JPEG to `out`, four bytes a pixel. Nonzero when Pillow must see the file: damage of any kind,
// or a form not handled here.
int window(const uint8_t *data, int64_t length, const int *numbers, uint8_t *out) {
  Wanted wanted;
  memcpy(&wanted, numbers, sizeof wanted);
  Plan plan;
  if (!make_plan(wanted, plan)) return 1;
  const size_t stride = (4 * static_cast<size_t>(wanted.view[2]) + 15) / 16 * 16;
  uint8_t *rows = row_memory.need(stride * (plan.bottom - plan.top + 4));
  if (!rows) return 1;
  jpeg_decompress_struct info;
  Errors errors;
  memset(&info, 0, sizeof info);
  info.err = jpeg.std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.output_message = ignore;
  if (setjmp(errors.back)) {
    jpeg.destroy(&info);
    return 1;
  }
  const int failed = read_rows(&info, data, length, plan, wanted, rows, stride);
  jpeg.destroy(&info);
  if (failed) return 1;
  uint8_t *last = rows + stride * (plan.bottom - plan.top + 3);
  for (int y = 0; y < wanted.view[3]; y++) {
    const Taps taps = {plan.taps_y[y].first + wanted.crop[1] - plan.top, plan.taps_y[y].count};
    down(rows, stride, taps, plan.weights_y + static_cast<size_t>(y) * plan.wide_y, last);
    memcpy(out + 4 * static_cast<size_t>(y) * wanted.view[2], last, 4 * static_cast<size_t>(wanted.view[2]));
  }
  return 0;
}

// Image.transform(size, AFFINE, matrix, fillcolor=fill) of `in` (height, width, 4).
void affine(const uint8_t *in, int width, int height, const double *matrix, int bicubic, uint32_t fill, uint8_t *out) {
  const Source source = {in, width, height};
  const bool side = !(matrix[0] == 1 && matrix[1] == 0 && matrix[2] == 0);
  const bool up = !(matrix[3] == 0 && matrix[4] == 1 && matrix[5] == 0);
  const auto way = !bicubic ? warp_row<LINEAR> : !up ? warp_row<ROWS> : !side ? warp_row<COLUMNS> : warp_row<PLANE>;
  const Quads blank = {int(fill & 255), int(fill >> 8 & 255), int(fill >> 16 & 255), 0};
  int32_t *line = reinterpret_cast<int32_t *>(line_memory.need(16 * static_cast<size_t>(width) + 64));
  for (int y = 0; y < height; y++) {
    way(source, matrix, y, blank, line);
    for (int x = 0; x < width; x += 4) {
      Lanes four;
      memcpy(&four, line + 4 * x, sizeof four);
      const Bytes bytes = narrow(four);
      memcpy(out + 4 * (static_cast<size_t>(y) * width + x), &bytes, 4 * (width - x < 4 ? width - x : 4));
    }
  }
}

// Four bytes a pixel to three.
void pack(const uint8_t *in, int64_t pixels, uint8_t *out) {
  int64_t i = 0;
  for (; i + 2 <= pixels; i++) memcpy(out + 3 * i, in + 4 * i, 4);  // the fourth byte is overwritten by the next
  for (; i < pixels; i++) memcpy(out + 3 * i, in + 4 * i, 3);
}

}  // extern "C"
