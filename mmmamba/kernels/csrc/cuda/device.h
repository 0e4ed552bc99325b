// What `step.cu` asks of the device: one small function for each instruction that C++ has no word for.
// No header of CUDA's is included: the source is compiled at run time, on machines that have none.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __attribute__((aligned(8))) Words2 { u32 x, y; };
struct __attribute__((aligned(16))) Words4 { u32 x, y, z, w; };

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int num_blocks() { return gridDim.x; }

DEVICE u8* shared_memory() {
    extern __shared__ __attribute__((aligned(128))) u8 memory[];
    return memory;
}

DEVICE u32 address_of(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

// --- between threads ---

DEVICE void sync_block() { __syncthreads(); }
template <int THREADS> DEVICE void sync_some() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// --- barriers in shared memory, which count arrivals and bytes that copies bring ---

DEVICE void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals) : "memory");
}
// So that copies, which go their own way to shared memory, see them.
DEVICE void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
                 : "memory");
}
DEVICE bool barrier_passed(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address_of(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Weights are read once a token: they leave the cache first, and what goes from block to block stays.
DEVICE u64 read_once_policy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void copy_async(u8* shared, const u8* global, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            address_of(shared)),
        "l"(global), "r"(bytes), "r"(address_of(barrier)), "l"(policy)
        : "memory");
}

// --- between blocks: each 8 bytes are read and written as a whole ---

DEVICE void load_pair(const u64* global, u64& a, u64& b) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(global) : "memory");
}
DEVICE u64 load_one(const u64* global) {
    u64 a;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(a) : "l"(global) : "memory");
    return a;
}
DEVICE void store_pair(u64* global, u64 a, u64 b) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(global), "l"(a), "l"(b) : "memory");
}
DEVICE void store_one(u64* global, u64 a) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(global), "l"(a) : "memory");
}

DEVICE u32 atomic_max(u32* global, u32 x) { return atomicMax(global, x); }
// One more than before; returns what was there.
DEVICE u32 add_one(u32* global) {
    u32 r;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(r) : "l"(global) : "memory");
    return r;
}
DEVICE long long now() {
    long long r;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(r));
    return r;
}

// --- what no kernel writes while this one runs ---

DEVICE Words4 load_words4(const void* global) {
    Words4 r;
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(global));
    return r;
}
DEVICE u32 load_word(const void* global) {
    u32 r;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(r) : "l"(global));
    return r;
}

// --- numbers ---

// c (16 x 8) += a (16 x 16, bf16) * b (16 x 8, bf16), spread over a warp as mma.m16n8k16 has it.
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 bf16_pair(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
DEVICE float half_to_float(u32 bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)bits));
    return r;
}
DEVICE float exp_of(float x) { return __expf(x); }
DEVICE float log_of(float x) { return __logf(x); }
DEVICE float rsqrt_of(float x) { return rsqrtf(x); }
