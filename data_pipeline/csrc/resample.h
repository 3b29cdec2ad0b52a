// A square of a picture, given as planes of light and colours, brought to size and turned to RGB: fixed-point
// filters along rows and then along columns, and the colours last, where there are fewest pixels.
//
// With vector instructions (AVX2) or without, the arithmetic in whole numbers is the same, so the pixels do not
// depend on the processor. Bits after the point: weights 14, values after the rows 6, after the columns 5.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define MMI_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#else
#define MMI_AVX2 0
#endif

namespace resample {

constexpr int ONE = 1 << 14;  // a weight of 1
constexpr int WINDOW = 16;    // bytes of pixels that four neighbouring outputs are made of
constexpr int LANES = 16;     // outputs made at a time; rows of values are padded to a multiple
constexpr int FEW = 8;        // rows that may be rounded one by one before they are added
constexpr int BEYOND = 64;    // bytes that may be read behind a row of pixels; what they are does not matter

inline bool has_vectors() {
#if MMI_AVX2
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

inline int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

enum class Kind { area, linear, cubic };

// The weights that make `size` values of a line of `length` pixels, from the place `start` over `side`; mirrored, the
// last one first. Value i is made of `count[i]` pixels from `first[i]` on, of at most `taps`, an even number; the
// weights behind are 0.
struct Filter {
    int size, taps, begin, end;  // pixels from begin up to end are looked at
    std::vector<int> first, count;
    std::vector<int16_t> weights;  // [size][taps]

    Filter(double start, double side, int size, int length, Kind kind, bool mirrored = false)
        : size(size), first(size), count(size) {
        const double scale = side / size, share = 1 / scale;
        const int reach = kind == Kind::cubic ? 4 : int(std::ceil(scale)) + (kind == Kind::area ? 1 : 2);
        std::vector<double> own(reach);
        taps = (reach + 1) & ~1;
        weights.assign(size_t(size) * taps, 0);
        for (int i = 0; i < size; i++) {
            const double low = start + i * scale, middle = low + scale / 2 - 0.5;
            const int from = whole(kind == Kind::area ? low : kind == Kind::linear ? low - 0.5 : middle - 1);
            for (int t = 0; t < reach; t++) {
                const double at = from + t;
                if (kind == Kind::area)
                    own[t] = std::max(0.0, std::min(low + scale, at + 1) - std::max(low, at)) * share;
                else if (kind == Kind::linear)
                    own[t] = (below(low + scale - 0.5 - at) - below(low - 0.5 - at)) * share;
                else
                    own[t] = cubic(std::fabs(middle - at));
            }
            place(i, from, own, length);
        }
        begin = first.front();
        end = 0;
        for (int i = 0; i < size; i++) end = std::max(end, first[i] + count[i]);
        if (mirrored) mirror();
    }

   private:
    static constexpr int UP = 1 << 20;  // makes positive what is truncated: the library's floor is a call

    static int whole(double x) { return int(x + UP) - UP; }

    void mirror() {
        std::reverse(first.begin(), first.end());
        std::reverse(count.begin(), count.end());
        for (int i = 0; i < size / 2; i++)
            std::swap_ranges(&weights[size_t(i) * taps], &weights[size_t(i) * taps] + taps,
                             &weights[size_t(size - 1 - i) * taps]);
    }

    // The area below max(0, 1 - |x|) up to x.
    static double below(double x) {
        x = std::min(std::max(x, -1.0), 1.0);
        return x < 0 ? (1 + x) * (1 + x) / 2 : 1 - (1 - x) * (1 - x) / 2;
    }

    static double cubic(double x) {
        if (x < 1) return (1.5 * x - 2.5) * x * x + 1;  // Catmull and Rom, as Pillow's
        return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
    }

    // A pixel beyond either end is the one at the end. Sums are rounded, so that all weights make ONE: a plain picture
    // stays what it is.
    void place(int i, int from, const std::vector<double>& own, int length) {
        first[i] = std::max(0, std::min(from, length - taps));
        int16_t* to = &weights[size_t(i) * taps];
        double sum = 0;
        int before = 0, last = 0;
        for (size_t t = 0; t < own.size(); t++) {
            const int at = std::min(std::max(from + int(t), 0), length - 1) - first[i];
            sum += own[t];
            const int upto = whole(sum * ONE + 0.5);
            to[at] = int16_t(to[at] + upto - before);
            if (upto != before) last = at;
            before = upto;
        }
        count[i] = last + 1;
    }
};

// Along rows: bytes to values with 6 bits after the point.
class Rows {
   public:
    Rows(const Filter& filter, bool vectors) : filter_(filter) {
#if MMI_AVX2
        if (vectors) arrange();
#endif
    }

    void operator()(const uint8_t* pixels, int16_t* values) const {
#if MMI_AVX2
        if (!base_.empty()) {
            if (shared_ && filter_.taps == 2) return avx2<1, true>(pixels, values);
            if (shared_ && filter_.taps == 4) return avx2<2, true>(pixels, values);
            return shared_ ? avx2<0, true>(pixels, values) : avx2<0, false>(pixels, values);
        }
#endif
        for (int i = 0; i < filter_.size; i++) {
            const int16_t* weights = &filter_.weights[size_t(i) * filter_.taps];
            const int first = filter_.first[i], count = filter_.count[i];
            int sum = 1 << 7;
            for (int t = 0; t < count; t++) sum += pixels[first + t] * weights[t];
            values[i] = int16_t(std::min(std::max(sum >> 8, -32768), 32767));
        }
    }

   private:
    const Filter& filter_;
#if MMI_AVX2
    // Four outputs are a group: the window they share, where in it the two pixels of a pair lie, and their weights.
    // The next pair lies in the same window, or where that is too short in one that begins two pixels later.
    bool shared_ = true;
    std::vector<int> base_;
    std::vector<uint8_t> shuffle_;  // [pair][group][16]
    std::vector<int16_t> weights_;  // [pair][group][8]

    void arrange() {
        const int groups = padded(filter_.size) / 4, pairs = filter_.taps / 2;
        std::vector<int> base(groups);
        for (int g = 0; 4 * g < filter_.size; g++) {
            const auto own = filter_.first.begin() + 4 * g;
            const auto [low, high] = std::minmax_element(own, own + std::min(4, filter_.size - 4 * g));
            if (*high - *low + 2 > WINDOW) return;  // too wide: the portable code does it
            shared_ &= *high - *low + filter_.taps <= WINDOW;
            base[g] = *low;
        }
        shuffle_.assign(size_t(pairs) * groups * 16, 0x80);  // 0x80 puts a zero
        weights_.assign(size_t(pairs) * groups * 8, 0);
        for (int i = 0; i < filter_.size; i++)
            for (int p = 0; p < pairs; p++) {
                const size_t place = size_t(p) * groups + i / 4, at = size_t(i) % 4;
                const int from = filter_.first[i] - base[i / 4] + (shared_ ? 2 * p : 0);
                shuffle_[16 * place + 4 * at] = uint8_t(from);
                shuffle_[16 * place + 4 * at + 2] = uint8_t(from + 1);
                std::memcpy(&weights_[8 * place + 2 * at], &filter_.weights[size_t(i) * filter_.taps + 2 * p], 4);
            }
        base_ = std::move(base);
    }

    AVX2 static __m256i window(const uint8_t* low, const uint8_t* high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)),
                                       _mm_loadu_si128((const __m128i*)high), 1);
    }

    template <int PAIRS, bool SHARED>
    AVX2 void avx2(const uint8_t* pixels, int16_t* values) const {
        const size_t groups = base_.size(), pairs = PAIRS ? PAIRS : size_t(filter_.taps) / 2;
        const int* base = base_.data();
        const uint8_t* shuffles = shuffle_.data();
        const int16_t* weight = weights_.data();
        for (size_t g = 0; g < groups; g += 4) {
            __m256i sum[2];
            for (size_t half = 0; half < 2; half++) {
                const size_t at = g + 2 * half;
                const uint8_t *low = pixels + base[at], *high = pixels + base[at + 1];
                __m256i total = _mm256_set1_epi32(1 << 7), own = window(low, high);
                for (size_t p = 0; p < pairs; p++) {
                    if (!SHARED && p > 0) own = window(low + 2 * p, high + 2 * p);
                    const size_t place = p * groups + at;
                    const __m256i shuffle =
                        _mm256_loadu_si256((const __m256i*)(shuffles + 16 * (SHARED ? place : at)));
                    const __m256i weights = _mm256_loadu_si256((const __m256i*)(weight + 8 * place));
                    total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_shuffle_epi8(own, shuffle), weights));
                }
                sum[half] = _mm256_srai_epi32(total, 8);
            }
            const __m256i packed = _mm256_packs_epi32(sum[0], sum[1]);  // groups 0, 2, 1, 3
            _mm256_storeu_si256((__m256i*)(values + 4 * g), _mm256_permute4x64_epi64(packed, 0xD8));
        }
    }
#endif
};

// (a * b + 2^14) >> 15, as the instruction does it.
inline int16_t scaled(int a, int b) { return int16_t((a * b + (1 << 14)) >> 15); }

// Along columns: one row of values with 5 bits after the point, of `count` rows.
#if MMI_AVX2
template <int COUNT>
AVX2 inline void column_avx2(const int16_t* rows, const int16_t* weights, int count, int width, int16_t* out) {
    for (int x = 0; x < width; x += LANES) {
        __m256i sum = _mm256_setzero_si256();
        for (int t = 0; t < (COUNT ? COUNT : count); t++)
            sum = _mm256_add_epi16(
                sum, _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i*)(rows + size_t(t) * width + x)),
                                         _mm256_set1_epi16(weights[t])));
        _mm256_storeu_si256((__m256i*)(out + x), sum);
    }
}
#endif

inline void column(const int16_t* rows, const int16_t* weights, int count, int width, int16_t* out, bool vectors) {
    if (count > FEW) {
        for (int x = 0; x < width; x++) {
            int sum = 1 << 14;
            for (int t = 0; t < count; t++) sum += rows[size_t(t) * width + x] * weights[t];
            out[x] = int16_t(sum >> 15);
        }
        return;
    }
#if MMI_AVX2
    if (vectors) {
        if (count == 2) return column_avx2<2>(rows, weights, count, width, out);
        if (count == 3) return column_avx2<3>(rows, weights, count, width, out);
        return column_avx2<0>(rows, weights, count, width, out);
    }
#endif
    for (int x = 0; x < width; x++) {
        int sum = 0;
        for (int t = 0; t < count; t++) sum += scaled(rows[size_t(t) * width + x], weights[t]);
        out[x] = int16_t(sum);
    }
}

// JFIF's colours (ITU-R BT.601, all of 0 to 255), less the whole part of each factor: R = y + cr + RED cr,
// G = y - GREEN_CB cb - GREEN_CR cr, B = y + 2 cb - BLUE cb. Of 2^15.
constexpr int RED = 13173, GREEN_CB = 11277, GREEN_CR = 23401, BLUE = 7471;
constexpr int MIDDLE = 128 << 5;  // no colour

#if MMI_AVX2
AVX2 inline void colours_avx2(const int16_t* y, const int16_t* cb, const int16_t* cr, int width, uint8_t* out) {
    // Where the bytes of 16 reds, greens and blues go in three times 16 bytes.
    alignas(16) static const int8_t places[3][3][16] = {
        {{0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5},
         {-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1},
         {-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1}},
        {{-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1},
         {5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10},
         {-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1}},
        {{-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1},
         {-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1},
         {10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15}}};
    const __m256i middle = _mm256_set1_epi16(MIDDLE), half = _mm256_set1_epi16(1 << 4);
    for (int x = 0; x < width; x += LANES) {
        const __m256i light = _mm256_add_epi16(_mm256_loadu_si256((const __m256i*)(y + x)), half);
        const __m256i u = _mm256_sub_epi16(_mm256_loadu_si256((const __m256i*)(cb + x)), middle);
        const __m256i v = _mm256_sub_epi16(_mm256_loadu_si256((const __m256i*)(cr + x)), middle);
        const __m256i values[3] = {
            _mm256_add_epi16(_mm256_add_epi16(light, v), _mm256_mulhrs_epi16(v, _mm256_set1_epi16(RED))),
            _mm256_sub_epi16(_mm256_sub_epi16(light, _mm256_mulhrs_epi16(u, _mm256_set1_epi16(GREEN_CB))),
                             _mm256_mulhrs_epi16(v, _mm256_set1_epi16(GREEN_CR))),
            _mm256_sub_epi16(_mm256_add_epi16(light, _mm256_add_epi16(u, u)),
                             _mm256_mulhrs_epi16(u, _mm256_set1_epi16(BLUE)))};
        __m128i bytes[3];
        for (int c = 0; c < 3; c++) {
            const __m256i points = _mm256_srai_epi16(values[c], 5);
            bytes[c] = _mm_packus_epi16(_mm256_castsi256_si128(points), _mm256_extracti128_si256(points, 1));
        }
        const bool whole = x + LANES <= width;
        alignas(16) uint8_t rest[3 * LANES];
        uint8_t* pixels = whole ? out + 3 * x : rest;
        for (int part = 0; part < 3; part++) {
            __m128i mixed = _mm_setzero_si128();
            for (int c = 0; c < 3; c++)
                mixed = _mm_or_si128(
                    mixed, _mm_shuffle_epi8(bytes[c], _mm_load_si128((const __m128i*)places[part][c])));
            _mm_storeu_si128((__m128i*)pixels + part, mixed);
        }
        if (!whole) std::memcpy(out + 3 * x, rest, 3 * (width - x));
    }
}
#endif

inline void colours(const int16_t* y, const int16_t* cb, const int16_t* cr, int width, uint8_t* out, bool vectors) {
#if MMI_AVX2
    if (vectors) return colours_avx2(y, cb, cr, width, out);
#endif
    for (int x = 0; x < width; x++) {
        const int light = y[x] + (1 << 4), u = cb[x] - MIDDLE, v = cr[x] - MIDDLE;
        const int values[3] = {light + v + scaled(v, RED), light - scaled(u, GREEN_CB) - scaled(v, GREEN_CR),
                               light + 2 * u - scaled(u, BLUE)};
        for (int c = 0; c < 3; c++) out[3 * x + c] = uint8_t(std::min(std::max(values[c] >> 5, 0), 255));
    }
}

}  // namespace resample
