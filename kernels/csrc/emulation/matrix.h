// The tensor cores' product, for emulation.h, which includes this.
#pragma once

namespace emulation {

template <typename T>
float unpack(uint32_t pair, int half) {
  T element;
  element.bits = uint16_t(pair >> (16 * half));
  return widen(element);
}

}  // namespace emulation

// D[16, 8] += A[16, 16] B[16, 8], spread over a warp as mma.sync.m16n8k16 wants it.
template <typename T>
void matrix_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  emulation::Thread& self = *emulation::machine().current;
  std::memcpy(self.given, a, sizeof(a));
  std::memcpy(self.given + sizeof(a), b, sizeof(b));
  emulation::machine().collective(
      ~0u,
      [](emulation::Thread* const* members, unsigned) {
        float left[16][16], right[16][8];
        for (unsigned lane = 0; lane < emulation::kWarp; ++lane) {
          uint32_t words[6];
          std::memcpy(words, members[lane]->given, sizeof(words));
          const unsigned group = lane / 4, k = lane % 4 * 2;
          for (unsigned half = 0; half < 2; ++half) {
            for (unsigned part = 0; part < 4; ++part)
              left[group + part % 2 * 8][k + part / 2 * 8 + half] = emulation::unpack<T>(words[part], half);
            for (unsigned part = 0; part < 2; ++part)
              right[k + part * 8 + half][group] = emulation::unpack<T>(words[4 + part], half);
          }
        }
        for (unsigned lane = 0; lane < emulation::kWarp; ++lane) {
          float sums[4] = {0, 0, 0, 0};
          for (unsigned part = 0; part < 4; ++part)
            for (unsigned k = 0; k < 16; ++k)
              sums[part] += left[lane / 4 + part / 2 * 8][k] * right[k][lane % 4 * 2 + part % 2];
          std::memcpy(members[lane]->taken, sums, sizeof(sums));
        }
      },
      line);
  float sums[4];
  std::memcpy(sums, self.taken, sizeof(sums));
  for (int i = 0; i < 4; ++i) d[i] += sums[i];
}
