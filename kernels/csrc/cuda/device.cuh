// The words that the kernels use beyond CUDA's own, so that one source serves nvcc and the emulation
// (see ../emulation/emulation.h) and no kernel asks which of them compiles it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/bilinear.h"

#if !defined(__CUDACC__)
#include "../emulation/emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

template <typename T>
using Array = T*;

template <typename T>
__host__ __device__ __forceinline__ Array<T> array(T* from, int64_t) {
  return from;
}

// An array at an offset of the block's dynamic shared memory.
template <typename T>
__device__ __forceinline__ Array<T> shared_array(int64_t offset_bytes, int64_t) {
  extern __shared__ __align__(16) unsigned char mmi_shared[];
  return reinterpret_cast<T*>(mmi_shared + offset_bytes);
}

// `source` is a lane of the warp.
template <typename T>
__device__ __forceinline__ T shuffle(uint32_t mask, T value, int source) {
  return __shfl_sync(mask, value, source);
}

template <typename T>
__device__ __forceinline__ void atomic_add(Array<T> to, int64_t i, T value) {
  atomicAdd(to + i, value);
}

template <typename T, int N>
struct __align__(sizeof(T) * N) Vector {
  T at[N];
};

// N adjacent elements, aligned to their size (at most 16 bytes), through the read-only cache.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(Array<const T> from, int64_t i) {
  static_assert(sizeof(T) * N <= 16, "one load");
  Vector<T, N> out;
  if constexpr (sizeof(out) == 16) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from + i));
    memcpy(&out, &words, 16);
  } else if constexpr (sizeof(out) == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from + i));
    memcpy(&out, &words, 8);
  } else if constexpr (sizeof(out) == 4) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(from + i));
    memcpy(&out, &word, 4);
  } else {
    const uint16_t word = __ldg(reinterpret_cast<const uint16_t*>(from + i));
    memcpy(&out, &word, 2);
  }
  return out;
}

// Stores N adjacent elements, aligned to their size.
template <int N, typename T>
__device__ __forceinline__ void store_vector(Array<T> to, int64_t i, const Vector<T, N>& from) {
  static_assert(sizeof(T) * N <= 16, "one store");
  if constexpr (sizeof(from) == 16) {
    uint4 words;
    memcpy(&words, &from, 16);
    *reinterpret_cast<uint4*>(to + i) = words;
  } else if constexpr (sizeof(from) == 8) {
    uint2 words;
    memcpy(&words, &from, 8);
    *reinterpret_cast<uint2*>(to + i) = words;
  } else {
    static_assert(N == 1, "words of 8 or 16 bytes");
    to[i] = from.at[0];
  }
}

// Adds N adjacent numbers; from sm_90 on four or two floats by one instruction, which sm_80 lacks.
// They must lie aligned to as many.
template <int N, typename A>
__device__ __forceinline__ void atomic_add_vector(Array<A> to, int64_t i, const A* values) {
#if __CUDA_ARCH__ >= 900
  constexpr int kTogether = sizeof(A) != 4 ? 1 : N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#else
  constexpr int kTogether = 1;
#endif
#pragma unroll
  for (int n = 0; n < N; n += kTogether) {
    if constexpr (kTogether == 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(to + i + n)),
                   "f"(values[n]), "f"(values[n + 1]), "f"(values[n + 2]), "f"(values[n + 3])
                   : "memory");
    } else if constexpr (kTogether == 2) {
      asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to + i + n)),
                   "f"(values[n]), "f"(values[n + 1])
                   : "memory");
    } else {
      atomicAdd(to + i + n, values[n]);
    }
  }
}

// Two adjacent 16-bit numbers, the first of them at an even place.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(Array<T> from, int64_t i) {
  return *reinterpret_cast<const uint32_t*>(from + i);
}

// Four 8 x 8 matrices of 16-bit numbers in shared memory: lane l names the first element of row l % 8 of
// matrix l / 8, aligned to 16 bytes, and gets of each matrix M the pair M[l / 4][l % 4 * 2 + {0, 1}], or
// of its transpose M[l % 4 * 2 + {0, 1}][l / 4].
template <bool TRANSPOSED, typename T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], Array<T> from, int64_t i) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(from + i));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  }
}

// A barrier that tells whether any thread of the block says so.
__device__ __forceinline__ bool any_thread(bool says) { return __syncthreads_or(says); }

// D[16, 8] += A[16, 16] B[16, 8], spread over a warp as mma.sync.m16n8k16 wants it.
template <typename T>
__device__ __forceinline__ void matrix_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, mmi::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

namespace mmi {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename... P, typename... Q>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
            const Q&... arguments) {
  if (blocks == 0) return;  // CUDA refuses an empty grid
  if (blocks > INT32_MAX) throw std::runtime_error("a kernel's launch: more than 2^31 blocks; split the batch");
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "a kernel's shared memory");
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream>>>(arguments...);
  check(cudaGetLastError(), "a kernel's launch");
}

__device__ __forceinline__ float to_arithmetic(float x) { return x; }
__device__ __forceinline__ double to_arithmetic(double x) { return x; }
__device__ __forceinline__ float to_arithmetic(BFloat16 x) { return widen(x); }
__device__ __forceinline__ float to_arithmetic(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

}  // namespace mmi
#endif
