/*
 * A machine that the tests can break: loaded into a server with LD_PRELOAD, it knows what the server
 * has synced, makes its disk slow or full, and sets its clock.
 *
 * The state is a small file that the server and the test share (shim.rs has the same layout); it
 * outlives the process. For each file it has the size that was synced last. A file is known by its
 * inode, so renaming it changes nothing. That is the whole truth for files that grow at their end
 * only, as those of Redis do.
 *
 * PostgreSQL writes into the middle of its files. Where SHIM_UNDO names a directory, each
 * file of the same file system has a list there of what its writes since its last sync replaced:
 * records of struct undo, each followed by the old bytes, the first of a list with the old size. A
 * lock on the list keeps a write and its record together against a sync in another process.
 *
 * A directory entry counts as durable as soon as it is made: a rename is never lost.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
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

/* What a write replaced. */
struct undo {
    uint64_t offset;
    uint64_t size;   /* of the file, before the write */
    uint64_t length; /* of the old bytes, which follow */
};

static const char *undo_dir;
static dev_t undo_device;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SHIM_STATE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *map = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map != MAP_FAILED)
            state = map;
        close(fd);
    }
    struct stat about;
    const char *undo = getenv("SHIM_UNDO");
    if (undo && stat(undo, &about) == 0) {
        /* PostgreSQL writes its titles over its environment. */
        undo_dir = strdup(undo);
        undo_device = about.st_dev;
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

/* Opens the list of a file, locked; -1 for one without. A disk that we cannot follow proves nothing. */
static int open_list(const struct stat *about) {
    char path[512];
    if (!undo_dir || about->st_dev != undo_device || about->st_nlink == 0)
        return -1;
    snprintf(path, sizeof path, "%s/%llu", undo_dir, (unsigned long long)about->st_ino);
    int list = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (list < 0)
        abort();
    while (flock(list, LOCK_EX) != 0)
        if (errno != EINTR)
            abort();
    return list;
}

/* Everything of the file is safe now, or it is gone. */
static void close_list(int list, int forget) {
    if (list < 0)
        return;
    if (forget && syscall(SYS_ftruncate, list, 0) != 0)
        abort();
    close(list);
}

/* Notes what is about to be replaced. */
static void note(int list, int fd, const struct stat *about, uint64_t offset, uint64_t length) {
    if (list < 0)
        return;
    uint64_t size = (uint64_t)about->st_size;
    uint64_t old = offset >= size ? 0 : size - offset < length ? size - offset : length;
    char *record = malloc(sizeof(struct undo) + old);
    if (!record)
        abort();
    struct undo head = {offset, size, old};
    memcpy(record, &head, sizeof head);
    if (old > 0) {
        /* A file that is open for writing only is read through another descriptor. */
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        int reader = open(path, O_RDONLY | O_CLOEXEC);
        if (reader < 0
            || pread(reader, record + sizeof head, old, (off_t)offset) != (ssize_t)old)
            abort();
        close(reader);
    }
    size_t all = sizeof head + old;
    if (syscall(SYS_write, list, record, all) != (ssize_t)all)
        abort();
    free(record);
}

static int sync_file(long call, int fd) {
    struct stat before;
    int known = regular(fd, &before);
    if (known)
        wait_for_the_disk();
    int list = known ? open_list(&before) : -1;
    if (list >= 0)
        fstat(fd, &before);
    int failed = (int)syscall(call, fd);
    close_list(list, !failed);
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
    int list = known ? open_list(&about) : -1;
    if (list >= 0) {
        fstat(fd, &about);
        uint64_t size = (uint64_t)about.st_size, to = (uint64_t)length;
        note(list, fd, &about, to < size ? to : size, to < size ? size - to : 0);
    }
    int failed = (int)syscall(SYS_ftruncate, fd, length);
    close_list(list, 0);
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
    int list = known ? open_list(&about) : -1;
    int failed = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    close_list(list, !failed);
    if (!failed && known)
        atomic_store(synced(identity(&about)), 0);
    return failed;
}

int rename(const char *from, const char *to) {
    struct stat about;
    int known = doomed(to, &about);
    int list = known ? open_list(&about) : -1;
    int failed = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    close_list(list, !failed);
    if (!failed && known)
        atomic_store(synced(identity(&about)), 0);
    return failed;
}

/* How much of a write fits on the disk; -1 when nothing does. */
static ssize_t fits(const struct stat *about, uint64_t offset, size_t length) {
    int64_t most = state ? atomic_load(&state->file_size_max) : 0;
    uint64_t end = offset + length;
    /* What is there already can be written over. */
    if (most <= 0 || length == 0 || end <= (uint64_t)about->st_size || end <= (uint64_t)most)
        return (ssize_t)length;
    if (offset >= (uint64_t)most) {
        errno = ENOSPC;
        return -1;
    }
    return (ssize_t)((uint64_t)most - offset);
}

ssize_t write(int fd, const void *bytes, size_t length) {
    struct stat about;
    /* Logs are written there. */
    if (fd <= 2 || !regular(fd, &about))
        return syscall(SYS_write, fd, bytes, length);
    int list = open_list(&about);
    if (list >= 0)
        fstat(fd, &about);
    int appends = (fcntl(fd, F_GETFL) & O_APPEND) != 0;
    off_t at = appends ? about.st_size : lseek(fd, 0, SEEK_CUR);
    ssize_t fit = fits(&about, (uint64_t)at, length);
    ssize_t written = -1;
    if (fit >= 0) {
        note(list, fd, &about, (uint64_t)at, (uint64_t)fit);
        written = syscall(SYS_write, fd, bytes, (size_t)fit);
    }
    int why = errno;
    close_list(list, 0);
    errno = why;
    return written;
}

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t offset) {
    struct stat about;
    if (!regular(fd, &about))
        return syscall(SYS_pwritev, fd, pieces, (long)count, (long)offset, 0L);
    size_t length = 0;
    for (int i = 0; i < count; i++)
        length += pieces[i].iov_len;
    int list = open_list(&about);
    if (list >= 0)
        fstat(fd, &about);
    ssize_t written = -1;
    if (fits(&about, (uint64_t)offset, length) == (ssize_t)length) {
        note(list, fd, &about, (uint64_t)offset, length);
        written = syscall(SYS_pwritev, fd, pieces, (long)count, (long)offset, 0L);
    } else {
        errno = ENOSPC;
    }
    int why = errno;
    close_list(list, 0);
    errno = why;
    return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    struct iovec piece = {(void *)bytes, length};
    return pwritev(fd, &piece, 1, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off_t offset) {
    return pwrite(fd, bytes, length, offset);
}

ssize_t pwritev64(int fd, const struct iovec *pieces, int count, off_t offset) {
    return pwritev(fd, pieces, count, offset);
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
