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

// Adds N adjacent numbers; one instruction for four floats from sm_90 on, which sm_80 lacks.
// Four floats must lie aligned to 16 bytes.
template <int N, typename A>
__device__ __forceinline__ void atomic_add_vector(Array<A> to, int64_t i, const A* values) {
#if __CUDA_ARCH__ >= 900
  constexpr int kFours = sizeof(A) == 4 ? N / 4 * 4 : 0;
#else
  constexpr int kFours = 0;
#endif
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if constexpr (kFours != 0) {
      if (n % 4 == 0)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                         __cvta_generic_to_global(to + i + n)),
                     "f"(values[n]), "f"(values[n + 1]), "f"(values[n + 2]), "f"(values[n + 3])
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
  if (blocks > INT32_MAX) throw std::runtime_error("a kernel's launch: more than 2^31 blocks; split the batch");
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "a kernel's shared memory");
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream>>>(arguments...);
  check(cudaGetLastError(), "a kernel's launch");
}

inline void zero(void* at, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(at, 0, size_t(bytes), stream), "zeroing memory");
}

__device__ __forceinline__ float to_arithmetic(float x) { return x; }
__device__ __forceinline__ double to_arithmetic(double x) { return x; }
__device__ __forceinline__ float to_arithmetic(BFloat16 x) { return widen(x); }
__device__ __forceinline__ float to_arithmetic(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

}  // namespace mmi
#endif
