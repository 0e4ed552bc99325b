// `decode_step` on a CPU, to be called from Python.
#include "device.h"

#include "../../mmmamba/kernels/csrc/cuda/step.cu"

static const Step* passed;

static void start() {
    decode_step(*passed);
    host::current->done = true;
    host::yield();
}

static u32 drawn;
static bool heads() { return (drawn = drawn * 1664525 + 1013904223) >> 31; }

// Half of the copies that are under way arrive, in any order.
static void let_copies_arrive(host::Block& b) {
    std::vector<host::Copy> left;
    for (const host::Copy& copy : b.copies) {
        if (heads()) {
            left.push_back(copy);
            continue;
        }
        memcpy(copy.to, copy.from, copy.bytes);
        host::Barrier& barrier = b.barriers.at(copy.barrier);
        barrier.bytes -= copy.bytes;
        barrier.settle();
    }
    b.copies.swap(left);
}

// Runs all blocks, `threads` each, in an order that `seed` chooses; block `absent` never begins. Returns the fault.
extern "C" u32 run_step(const Step* step, int num_blocks, int threads, long long shared_bytes, u32 seed, int absent) {
    using namespace host;
    passed = step, drawn = seed, rounds = 0;
    blocks = std::vector<Block>(num_blocks);
    fibers = std::vector<Fiber>(num_blocks * threads);
    for (Block& b : blocks) {
        b.memory = std::vector<u8>(shared_bytes + 128, 0xFF);  // NaN wherever nobody has written
        b.warps = std::vector<Warp>(threads / 32);
    }
    for (size_t i = 0; i < fibers.size(); i++) {
        Fiber& f = fibers[i];
        f.block = (int)i / threads, f.thread = (int)i % threads;
        f.done = f.block == absent;
        f.stack.resize(1 << 16);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
    for (bool going = true; going; rounds++) {
        going = false;
        for (Block& b : blocks) let_copies_arrive(b);
        // A warp is ahead of the others at times, and a block.
        for (size_t i = 0; i < fibers.size(); i += 32) {
            const bool waits = heads();
            for (size_t j = i; j < i + 32; j++) {
                Fiber& f = fibers[j];
                if (f.done) continue;
                going = true;
                if (waits) continue;
                current = &f;
                swapcontext(&scheduler, &f.context);
            }
        }
    }
    return *step->fault;
}

extern "C" int size_of_step() { return sizeof(Step); }
extern "C" int size_of_layer() { return sizeof(Layer); }
extern "C" int slot_bytes() { return SLOT_BYTES; }
