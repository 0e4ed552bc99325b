/* A team of threads that lives on between jobs, and meets at barriers within one. */
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { MAX_THREADS = 64 };

typedef struct {
    atomic_int waiting;
    atomic_int turn;
} Barrier;

typedef struct Job {
    void (*run)(struct Job *, int thread);
    int threads;
    Barrier barrier;
} Job;

static struct {
    pthread_mutex_t caller, lock; /* caller: one job at a time */
    pthread_cond_t wake;
    Job *job;
    atomic_uint turn; /* jobs so far times 2 MAX_THREADS, plus the threads of the last: both must be seen at once */
    atomic_int done;
    unsigned birth;
    int started;
    pid_t process; /* after a fork the threads are gone */
} team;

__attribute__((constructor)) static void new_team(void) {
    memset(&team, 0, sizeof team);
    pthread_mutex_init(&team.caller, NULL);
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.wake, NULL);
    team.process = getpid();
}

/* Spin: the others are a microsecond behind. But where threads are more than cores, make room for them. */
#define WAIT_WHILE(condition)                   \
    for (int spins = 0; condition; spins++) {   \
        if (spins < 4000) PAUSE();              \
        else sched_yield();                     \
    }

static void meet(Job *job) {
    if (job->threads == 1) return;
    int turn = atomic_load_explicit(&job->barrier.turn, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&job->barrier.waiting, 1, memory_order_acq_rel) == job->threads - 1) {
        atomic_store_explicit(&job->barrier.waiting, 0, memory_order_relaxed);
        atomic_store_explicit(&job->barrier.turn, turn + 1, memory_order_release);
    } else {
        WAIT_WHILE(atomic_load_explicit(&job->barrier.turn, memory_order_acquire) == turn)
    }
}

static void *worker(void *argument) {
    int thread = (int)(intptr_t)argument;
    unsigned seen = team.birth;
    for (;;) {
        /* The next token comes soon: sleeping and waking would cost more than a short wait. */
        for (int i = 0; i < 3000 && atomic_load_explicit(&team.turn, memory_order_acquire) == seen; i++) PAUSE();
        if (atomic_load_explicit(&team.turn, memory_order_acquire) == seen) {
            pthread_mutex_lock(&team.lock);
            while (atomic_load(&team.turn) == seen) pthread_cond_wait(&team.wake, &team.lock);
            pthread_mutex_unlock(&team.lock);
        }
        seen = atomic_load_explicit(&team.turn, memory_order_acquire);
        if (thread < (int)(seen % (2 * MAX_THREADS))) { /* the caller waits for these: `job` is still there */
            team.job->run(team.job, thread);
            atomic_fetch_add_explicit(&team.done, 1, memory_order_release);
        }
    }
    return NULL;
}

static void run_job(Job *job) {
    if (team.process != getpid()) new_team();
    pthread_mutex_lock(&team.caller);
    team.birth = atomic_load(&team.turn);
    while (team.started < job->threads - 1) {
        pthread_t id;
        if (pthread_create(&id, NULL, worker, (void *)(intptr_t)(team.started + 1))) {
            job->threads = team.started + 1;
            break;
        }
        pthread_detach(id);
        team.started++;
    }
    if (job->threads > 1) {
        team.job = job;
        atomic_store(&team.done, 0);
        unsigned jobs = atomic_load(&team.turn) / (2 * MAX_THREADS) + 1;
        pthread_mutex_lock(&team.lock);
        atomic_store(&team.turn, jobs * (2 * MAX_THREADS) + (unsigned)job->threads);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    job->run(job, 0);
    WAIT_WHILE(atomic_load_explicit(&team.done, memory_order_acquire) < job->threads - 1 && job->threads > 1)
    pthread_mutex_unlock(&team.caller);
}

static inline int allowed_threads(int wanted) { return wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted; }

/* Rows of thread `t`. Cuts lie at multiples of 16: no two threads write to one cache line. */
static inline int cut(int rows, int t, int threads) {
    if (t == threads) return rows;
    return (int)((int64_t)rows * t / threads) & ~15;
}
