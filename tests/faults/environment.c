/* What a process may have to live with, put between it and the system: a disk that is full or fails, a clock that jumps.
 *
 * Loaded into a daemon by LD_PRELOAD. The file that HOOKTRAIL_TEST_ENVIRONMENT names says what holds now; it is mapped, so a
 * test changes it while the daemon runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct control {
    volatile int32_t error;    /* errno of failing writes; 0: none fails */
    volatile int32_t one_in;   /* so many writes go well between two that fail */
    volatile int64_t jump_s;   /* what the clock is ahead, in seconds */
    volatile int32_t count;
    int32_t unused;
    /* The same for the files of history and store, and what each of their writes takes longer, in microseconds. */
    volatile int32_t store_error;
    volatile int32_t store_one_in;
    volatile int32_t store_count;
    volatile int32_t store_slow_us;
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("HOOKTRAIL_TEST_ENVIRONMENT");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) control = map;
}

static int is_this_one(int32_t error, int32_t one_in, volatile int32_t *count) {
    if (!error || __sync_add_and_fetch(count, 1) % (one_in + 1)) return 0;
    errno = error;
    return 1;
}

/* Only files of the embedded queue, of history and of the store fail. */
static int fails(int fd) {
    if (!control || !(control->error || control->store_error || control->store_slow_us)) return 0;
    char link[64], path[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    if (strstr(path, "/hooktrail.db")) return is_this_one(control->error, control->one_in, &control->count);
    if (!strstr(path, "/history.db") && !strstr(path, "/store.db")) return 0;
    if (control->store_slow_us) usleep(control->store_slow_us);
    return is_this_one(control->store_error, control->store_one_in, &control->store_count);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) { return fails(fd) ? -1 : NEXT(write)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return fails(fd) ? -1 : NEXT(pwrite)(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return fails(fd) ? -1 : NEXT(pwrite64)(fd, data, n, at); }
int fsync(int fd) { return fails(fd) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return fails(fd) ? -1 : NEXT(fdatasync)(fd); }
int ftruncate(int fd, off_t n) { return fails(fd) ? -1 : NEXT(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return fails(fd) ? -1 : NEXT(ftruncate64)(fd, n); }

int clock_gettime(clockid_t id, struct timespec *ts) {
    static __typeof__(&clock_gettime) next;
    if (!next) next = NEXT(clock_gettime);
    int done = next(id, ts);
    if (!done && control && id == CLOCK_REALTIME) ts->tv_sec += control->jump_s;
    return done;
}
