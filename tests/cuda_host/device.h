// What `step.cu` asks of a device, on a CPU: a fiber for each thread of all blocks, in one thread of the system, so that
// a run is the same every time. Slow, and as exact as the real one in everything but timing.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };

#define DEVICE inline
#define KERNEL extern "C"
#define __launch_bounds__(...)
#define __grid_constant__

namespace host {

struct Meeting {
    int arrived = 0, generation = 0;
};

struct Warp {
    Meeting meeting;
    u32 words[32][6];
};

struct Barrier {
    int count = 0, pending = 0;
    long long bytes = 0;
    u32 phase = 0;
    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};

struct Copy {
    u8* to;
    const u8* from;
    u32 bytes;
    u64* barrier;
};

struct Block {
    std::vector<Copy> copies;  // under way
    std::vector<u8> memory;
    Meeting all, some;
    std::vector<Warp> warps;
    std::unordered_map<u64*, Barrier> barriers;
};

struct Fiber {
    ucontext_t context;
    std::vector<u8> stack;
    int block, thread;
    bool done = false;
};

inline std::vector<Block> blocks;
inline long long rounds;  // of the scheduler: its clock
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* current;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline Block& block() { return blocks[current->block]; }
inline Warp& warp() { return block().warps[current->thread / 32]; }

inline void meet(Meeting& m, int count) {
    const int generation = m.generation;
    if (++m.arrived == count) {
        m.arrived = 0, m.generation++;
        return;
    }
    while (m.generation == generation) yield();
}

inline float bf16(u32 bits) {
    bits <<= 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

}  // namespace host

inline int thread_index() { return host::current->thread; }
inline int block_index() { return host::current->block; }
inline int num_blocks() { return (int)host::blocks.size(); }
inline u8* shared_memory() {
    u8* memory = host::block().memory.data();
    return memory + (128 - (uintptr_t)memory % 128) % 128;
}

inline void sync_block() { host::meet(host::block().all, 32 * (int)host::block().warps.size()); }
template <int THREADS> inline void sync_some() { host::meet(host::block().some, THREADS); }
inline void sync_warp() { host::meet(host::warp().meeting, 32); }

inline bool any_of_warp(bool x) {
    host::Warp& warp = host::warp();
    warp.words[thread_index() % 32][0] = x;
    sync_warp();
    bool any = false;
    for (const auto& words : warp.words) any |= words[0] != 0;
    sync_warp();
    return any;
}
inline float shuffle_xor(float x, int mask) {
    host::Warp& warp = host::warp();
    const int lane = thread_index() % 32;
    memcpy(&warp.words[lane][0], &x, 4);
    sync_warp();
    memcpy(&x, &warp.words[lane ^ mask][0], 4);
    sync_warp();
    return x;
}

inline void barrier_init(u64* at, int arrivals) {
    host::Barrier& b = host::block().barriers[at];
    b.count = b.pending = arrivals;
}
inline void barriers_are_made() {}
inline void barrier_arrive(u64* at) {
    host::Barrier& b = host::block().barriers.at(at);
    b.pending--;
    b.settle();
}
inline void barrier_expect(u64* at, u32 bytes) {
    host::block().barriers.at(at).bytes += bytes;
    barrier_arrive(at);
}
inline bool barrier_passed(u64* at, u32 parity) {
    if (host::block().barriers.at(at).phase != parity) return true;
    host::yield();
    return false;
}
inline u64 read_once_policy() { return 0; }
inline void copy_async(u8* shared, const u8* global, u32 bytes, u64* barrier, u64) {
    if (bytes % 16 || (uintptr_t)shared % 16 || (uintptr_t)global % 16) __builtin_trap();
    host::block().copies.push_back({shared, global, bytes, barrier});
}

inline void load_pair(const u64* global, u64& a, u64& b) {
    if ((uintptr_t)global % 16) __builtin_trap();
    host::yield();
    a = global[0], b = global[1];
}
inline u64 load_one(const u64* global) {
    host::yield();
    return *global;
}
inline void store_pair(u64* global, u64 a, u64 b) {
    if ((uintptr_t)global % 16) __builtin_trap();
    global[0] = a, global[1] = b;
}
inline void store_one(u64* global, u64 a) { *global = a; }

inline u32 atomic_max(u32* global, u32 x) {
    const u32 before = *global;
    if (x > before) *global = x;
    return before;
}
inline u32 add_one(u32* global) { return (*global)++; }
inline long long now() { return host::rounds; }

inline Words4 load_words4(const void* global) {
    if ((uintptr_t)global % 16) __builtin_trap();
    return *(const Words4*)global;
}
inline u32 load_word(const void* global) {
    if ((uintptr_t)global % 4) __builtin_trap();
    return *(const u32*)global;
}

inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    host::Warp& warp = host::warp();
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(warp.words[lane], mine, sizeof mine);
    sync_warp();
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const u32 a = warp.words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> (k % 2 * 16) & 0xFFFF;
            const u32 b = warp.words[column * 4 + k % 8 / 2][4 + k / 8] >> (k % 2 * 16) & 0xFFFF;
            c[i] += host::bf16(a) * host::bf16(b);
        }
    }
    sync_warp();
}

inline float as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline u32 as_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline u32 bf16_bits(float x) {
    const u32 bits = as_bits(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float half_to_float(u32 bits) {
    const u16 narrow = (u16)bits;
    _Float16 half;
    memcpy(&half, &narrow, 2);
    return (float)half;
}
inline float exp_of(float x) { return expf(x); }
inline float log_of(float x) { return logf(x); }
inline float rsqrt_of(float x) { return 1.f / sqrtf(x); }
