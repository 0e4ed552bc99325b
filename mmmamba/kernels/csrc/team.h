/* A team of threads that lives on between jobs. A job goes through phases; in a phase threads take pieces of its rows
until none is left, and go on when all are finished. So nobody waits for a thread that the system has put aside, unless
it was in the middle of a piece: on a machine that does other work too, static shares would cost a token many such waits.

A thread that comes late finds the pieces of the phases before taken, and passes. What it computes for itself on the way
may come from numbers that others are writing by then; it is used for pieces alone, of which it gets none. */
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

typedef struct Job {
    void (*run)(struct Job *, int thread);
    int threads;
    atomic_int taken, finished; /* pieces, of all phases so far */
} Job;

static struct {
    pthread_mutex_t caller, lock; /* caller: one job at a time */
    pthread_cond_t wake;
    Job *job;
    atomic_uint turn; /* jobs so far times 2 MAX_THREADS, plus the threads of the last: both must be seen at once */
    atomic_uint open; /* the turn whose job may be entered, or 0 */
    atomic_int inside;
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

/* Where a thread is in a job. */
typedef struct {
    Job *job;
    int start, end; /* pieces before this phase, and with it */
    int rows, size; /* of the phase, and of a piece */
} Phase;

/* Go on to a phase over `rows`. Returns 0 if no piece is left, so nothing need be prepared. */
static int begin(Phase *p, int rows) {
    int threads = p->job->threads, size = threads == 1 ? rows : rows / (4 * threads);
    size = threads == 1 ? rows : size > 1024 ? 1024 : (size + 15) & ~15; /* whole cache lines: no two threads write to one */
    p->size = size < 16 ? 16 : size;
    p->rows = rows;
    p->start = p->end;
    p->end += (rows + p->size - 1) / p->size;
    return atomic_load_explicit(&p->job->taken, memory_order_acquire) < p->end;
}

static int take(Phase *p, int *first, int *last) {
    int piece = atomic_load_explicit(&p->job->taken, memory_order_acquire);
    while (piece < p->end)
        if (atomic_compare_exchange_weak_explicit(&p->job->taken, &piece, piece + 1, memory_order_acq_rel, memory_order_acquire)) {
            *first = (piece - p->start) * p->size;
            *last = *first + p->size < p->rows ? *first + p->size : p->rows;
            return 1;
        }
    return 0;
}

static void finish(Phase *p) { atomic_fetch_add_explicit(&p->job->finished, 1, memory_order_acq_rel); }

static void meet(Phase *p) {
    WAIT_WHILE(atomic_load_explicit(&p->job->finished, memory_order_acquire) < p->end)
}

static void *worker(void *argument) {
    int thread = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        /* The next token comes soon: sleeping and waking would cost more than a short wait. */
        for (int i = 0; i < 3000 && atomic_load_explicit(&team.turn, memory_order_acquire) == seen; i++) PAUSE();
        if (atomic_load_explicit(&team.turn, memory_order_acquire) == seen) {
            pthread_mutex_lock(&team.lock);
            while (atomic_load(&team.turn) == seen) pthread_cond_wait(&team.wake, &team.lock);
            pthread_mutex_unlock(&team.lock);
        }
        seen = atomic_load_explicit(&team.turn, memory_order_acquire);
        if (thread < (int)(seen % (2 * MAX_THREADS))) {
            atomic_fetch_add(&team.inside, 1); /* from here on the caller waits: what is open now, stays */
            if (atomic_load(&team.open) == seen) team.job->run(team.job, thread);
            atomic_fetch_sub(&team.inside, 1);
        }
    }
    return NULL;
}

static void run_job(Job *job) {
    if (team.process != getpid()) new_team();
    pthread_mutex_lock(&team.caller);
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
        unsigned jobs = atomic_load(&team.turn) / (2 * MAX_THREADS) + 1;
        pthread_mutex_lock(&team.lock);
        atomic_store(&team.open, jobs * (2 * MAX_THREADS) + (unsigned)job->threads);
        atomic_store(&team.turn, atomic_load(&team.open));
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    job->run(job, 0);
    atomic_store(&team.open, 0); /* everything is done: who has not come yet need not */
    WAIT_WHILE(atomic_load(&team.inside) > 0)
    pthread_mutex_unlock(&team.caller);
}

static inline int allowed_threads(int wanted) { return wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted; }
