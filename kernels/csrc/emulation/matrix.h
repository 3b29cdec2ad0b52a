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

// Four 8 x 8 matrices, a row's first element from each lane, as ldmatrix spreads them over a warp.
template <bool TRANSPOSED, typename T>
void load_matrices(uint32_t (&to)[4], Array<T> from, int64_t i, int line = __builtin_LINE()) {
  emulation::Thread& self = *emulation::machine().current;
  if (reinterpret_cast<uintptr_t>(from.checked(i, 8)) % 16)
    emulation::machine().fail("loads a matrix's row from an address that is not aligned");
  for (int n = 0; n < 8; ++n) {
    const T element = from[i + n];
    std::memcpy(self.given + 2 * n, &element, 2);
  }
  emulation::machine().collective(
      ~0u,
      [](emulation::Thread* const* members, unsigned) {
        for (unsigned lane = 0; lane < emulation::kWarp; ++lane) {
          for (unsigned part = 0; part < 8; ++part) {
            const unsigned matrix = part / 2, pair = lane % 4 * 2 + part % 2;
            const unsigned row = TRANSPOSED ? pair : lane / 4, column = TRANSPOSED ? lane / 4 : pair;
            std::memcpy(members[lane]->taken + 2 * part, members[matrix * 8 + row]->given + 2 * column, 2);
          }
        }
      },
      line);
  std::memcpy(to, self.taken, sizeof(to));
}

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
