/*
 * A machine that the tests can break: loaded into a server with LD_PRELOAD, it knows what the server
 * has synced, makes its disk slow or full, and sets its clock.
 *
 * The state is a small file that the server and the test share (shim.rs has the same layout); it
 * outlives the process. For each file it has the size that was synced last. A file is known by its
 * inode, so renaming it changes nothing. That is the whole truth for files that grow at their end
 * only, as those of Redis do; not for PostgreSQL, which writes its log into files that are there before.
 *
 * A directory entry counts as durable as soon as it is made: a rename is never lost.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define FILES 2048

struct state {
    _Atomic int64_t clock_offset_ms; /* what the wall clock is ahead of the truth */
    _Atomic int64_t sync_delay_ms;   /* what each sync takes longer */
    _Atomic int64_t file_size_max;   /* a file does not grow beyond it: the disk is full; 0: no bound */
    _Atomic uint64_t syncs;          /* how many syncs are done */
    struct {
        _Atomic uint64_t file;
        _Atomic uint64_t synced;
    } files[FILES];
};

static struct state *state;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("STOCKADE_SHIM_STATE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *map = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map != MAP_FAILED)
            state = map;
        close(fd);
    }
}

static uint64_t identity(const struct stat *about) {
    return ((uint64_t)about->st_dev << 40) ^ (uint64_t)about->st_ino;
}

/* The record of a file. A test with more files than the table has would prove nothing. */
static _Atomic uint64_t *synced(uint64_t file) {
    for (int i = 0; i < FILES; i++) {
        uint64_t nobody = 0;
        if (atomic_load(&state->files[i].file) == file
            || atomic_compare_exchange_strong(&state->files[i].file, &nobody, file)
            || nobody == file)
            return &state->files[i].synced;
    }
    abort();
}

static int regular(int fd, struct stat *about) {
    return state && fstat(fd, about) == 0 && S_ISREG(about->st_mode);
}

static void wait_for_the_disk(void) {
    int64_t ms = atomic_load(&state->sync_delay_ms);
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (ms > 0 && nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

static int sync_file(long call, int fd) {
    struct stat before;
    int known = regular(fd, &before);
    if (known)
        wait_for_the_disk();
    int failed = (int)syscall(call, fd);
    if (failed || !known)
        return failed;
    /* What was written while it was syncing may not be among it. One that is deleted is nobody's. */
    if (before.st_nlink > 0)
        atomic_store(synced(identity(&before)), (uint64_t)before.st_size);
    atomic_fetch_add(&state->syncs, 1);
    return 0;
}

int fsync(int fd) { return sync_file(SYS_fsync, fd); }

int fdatasync(int fd) { return sync_file(SYS_fdatasync, fd); }

/* sync_file_range promises nothing after a power loss, so it is left alone. */

static void cut(const struct stat *about, off_t length) {
    _Atomic uint64_t *size = synced(identity(about));
    if (atomic_load(size) > (uint64_t)length)
        atomic_store(size, (uint64_t)length);
}

int ftruncate(int fd, off_t length) {
    struct stat about;
    int known = regular(fd, &about);
    int failed = (int)syscall(SYS_ftruncate, fd, length);
    if (!failed && known)
        cut(&about, length);
    return failed;
}

int truncate(const char *path, off_t length) {
    struct stat about;
    int known = state && stat(path, &about) == 0;
    int failed = (int)syscall(SYS_truncate, path, length);
    if (!failed && known)
        cut(&about, length);
    return failed;
}

int ftruncate64(int fd, off_t length) { return ftruncate(fd, length); }

int truncate64(const char *path, off_t length) { return truncate(path, length); }

/* Another file may get the inode of one that is gone. */
static int doomed(const char *path, struct stat *about) {
    return state && lstat(path, about) == 0 && S_ISREG(about->st_mode) && about->st_nlink == 1;
}

int unlink(const char *path) {
    struct stat about;
    int known = doomed(path, &about);
    int failed = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (!failed && known)
        atomic_store(synced(identity(&about)), 0);
    return failed;
}

int rename(const char *from, const char *to) {
    struct stat about;
    int known = doomed(to, &about);
    int failed = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (!failed && known)
        atomic_store(synced(identity(&about)), 0);
    return failed;
}

ssize_t write(int fd, const void *bytes, size_t length) {
    struct stat about;
    int64_t most = state ? atomic_load(&state->file_size_max) : 0;
    if (most > 0 && length > 0 && regular(fd, &about)) {
        if (about.st_size >= most) {
            errno = ENOSPC;
            return -1;
        }
        if ((int64_t)length > most - about.st_size)
            length = (size_t)(most - about.st_size);
    }
    return syscall(SYS_write, fd, bytes, length);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && state && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ms = atomic_load(&state->clock_offset_ms);
        int64_t ns = now->tv_nsec + ms % 1000 * 1000000;
        now->tv_sec += ms / 1000;
        now->tv_sec += ns < 0 ? -1 : ns / 1000000000;
        now->tv_nsec = ns < 0 ? ns + 1000000000 : ns % 1000000000;
    }
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &precise) != 0)
        return -1;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec precise;
    if (clock_gettime(CLOCK_REALTIME, &precise) != 0)
        return -1;
    if (now)
        *now = precise.tv_sec;
    return precise.tv_sec;
}
