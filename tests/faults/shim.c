// Library for LD_PRELOAD that injects a fault into the n-th file call below a folder; tests/faults/shim.py describes it.
//
// Counted are the calls that change files: open for writing, write, fsync, rename, mkdir, unlink, rmdir, ftruncate, link.
// Each gets a line in the log, so that a first run without a fault lists the calls and later runs go through them.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { COUNT, KILL, AFTER, HALF, ONCE, ALWAYS, SHORT, FLIP, STOP, SIGNAL, SLOW };

static struct {
    char root[PATH_MAX], shadow[PATH_MAX];
    size_t root_length;
    enum kind kind;
    int number;        // errno, signal or milliseconds
    long at;           // the fault's call, from 1; COUNT ignores it
    int log;           // file descriptor, or -1
    pid_t pid;         // only this process is counted: its forks are not
    _Atomic long calls;
} state = {.log = -1};

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// The descriptor's path, or "" if it is no file.
static void path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
}

static void join(int folder, const char *path, char *out) {
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            path_of(folder, base);
        }
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) out[0] = 0;
    }
}

static int below(const char *path) {
    return state.root_length && state.pid == getpid() && !strncmp(path, state.root, state.root_length) &&
           (path[state.root_length] == '/' || path[state.root_length] == 0);
}

static void note(const char *format, ...) {
    char line[2 * PATH_MAX + 100];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (state.log >= 0 && length > 0) syscall(SYS_write, state.log, line, (size_t)length);
}

// Whether a file system refuses such a call with this error: a full disk still removes files.
static int refuses(const char *op) {
    int removes = !strcmp(op, "unlink") || !strcmp(op, "rmdir") || !strcmp(op, "ftruncate");
    if (state.number == ENOSPC || state.number == EDQUOT) return !removes && strcmp(op, "open") != 0;
    if (state.number == EROFS) return strcmp(op, "write") != 0 && strcmp(op, "fsync") != 0;
    return 1;
}

struct plan { long number; enum kind kind; };

// Counts a call. Returns the fault to inject into it: COUNT for none, ONCE with errno set for a refusal.
static struct plan enter(const char *op, const char *path, const char *other, size_t bytes) {
    struct plan plan = {0, COUNT};
    if (!below(path) && !(other && below(other))) return plan;
    plan.number = ++state.calls;
    note("%ld %s %zu %s%s%s\n", plan.number, op, bytes, path, other ? " -> " : "", other ? other : "");
    int here = plan.number == state.at, onward = state.at > 0 && plan.number >= state.at;
    int writes = !strcmp(op, "write");
    switch (state.kind) {
    case KILL: case STOP: case SIGNAL:
        if (!here) return plan;
        note("! %ld\n", plan.number);
        kill(getpid(), state.kind == KILL ? SIGKILL : state.kind == STOP ? SIGSTOP : state.number);
        return plan;
    case AFTER:
        if (here) plan.kind = AFTER;
        break;
    case HALF: case SHORT: case FLIP:
        if (here && writes && bytes > (state.kind != FLIP)) plan.kind = state.kind;
        break;
    case ONCE: case ALWAYS:
        if ((state.kind == ONCE ? here : onward) && refuses(op)) plan.kind = ONCE;
        break;
    case SLOW:
        if (onward && writes) {
            struct timespec pause = {state.number / 1000, state.number % 1000 * 1000000L};
            nanosleep(&pause, NULL);
            if (here) note("! %ld\n", plan.number);
        }
        return plan;
    default: return plan;
    }
    if (plan.kind != COUNT) note("! %ld\n", plan.number);
    if (plan.kind == ONCE) errno = state.number;
    return plan;
}

static void leave(struct plan plan) {
    if (plan.kind == AFTER || plan.kind == HALF) kill(getpid(), SIGKILL);
}

// What is on the disk after a power cut: each fsync copies the file, or a folder's list of entries, to the shadow.
static void keep_synced(int fd, const char *path) {
    struct stat facts;
    if (!state.shadow[0] || !below(path) || fstat(fd, &facts)) return;
    char name[PATH_MAX + 64];
    snprintf(name, sizeof name, "%s/%c.%lu.%ld", state.shadow, S_ISDIR(facts.st_mode) ? 'd' : 'f',
             (unsigned long)facts.st_ino, state.calls);
    int out = (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (S_ISDIR(facts.st_mode)) {
        DIR *folder = opendir(path);
        struct dirent *entry;
        while (folder && (entry = readdir(folder))) {
            char line[600];
            if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
            int length = snprintf(line, sizeof line, "%lu %s\n", (unsigned long)entry->d_ino, entry->d_name);
            syscall(SYS_write, out, line, (size_t)length);
        }
        if (folder) closedir(folder);
    } else {
        int in = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0);
        off_t offset = 0;
        while (in >= 0 && syscall(SYS_sendfile, out, in, &offset, (size_t)1 << 20) > 0) {}
        syscall(SYS_close, in);
    }
    syscall(SYS_close, out);
}

// Keeps a removed file or folder open until this process ends, so that no other gets its inode number.
static void bury(const char *path) {
    if (state.shadow[0] && below(path)) syscall(SYS_openat, AT_FDCWD, path, O_PATH | O_NOFOLLOW | O_CLOEXEC, 0);
}

int shim_arm(const char *root, const char *shadow, const char *log, int kind, int number, long at) {
    snprintf(state.root, PATH_MAX, "%s", root);
    snprintf(state.shadow, PATH_MAX, "%s", shadow);
    state.root_length = strlen(root);
    state.kind = kind;
    state.number = number;
    state.at = at;
    state.calls = 0;
    state.pid = getpid();
    state.log = log[0] ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    return log[0] && state.log < 0 ? errno : 0;
}

// Processes that are not forked from the test's server are armed by variables; FAULT_RANK limits it to one rank.
__attribute__((constructor)) static void from_environment(void) {
    const char *root = getenv("FAULT_ROOT"), *wanted = getenv("FAULT_RANK"), *rank = getenv("RANK");
    if (!root || (wanted && (!rank || strcmp(wanted, rank)))) return;
    const char *shadow = getenv("FAULT_SHADOW"), *log = getenv("FAULT_LOG"), *kind = getenv("FAULT_KIND");
    const char *number = getenv("FAULT_NUMBER"), *at = getenv("FAULT_AT");
    shim_arm(root, shadow ? shadow : "", log ? log : "", kind ? atoi(kind) : 0, number ? atoi(number) : 0, at ? atol(at) : 0);
}

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

// A full disk opens files that exist, and refuses new ones.
static struct plan enter_open(const char *path, int flags) {
    return enter((flags & O_CREAT) && faccessat(AT_FDCWD, path, F_OK, 0) ? "create" : "open", path, NULL, 0);
}

#define OPEN_BODY(call, folder, path, flags) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
    if (!state.root_length || !changes(flags)) return call; \
    char whole[PATH_MAX]; \
    join(folder, path, whole); \
    struct plan plan = enter_open(whole, flags); \
    if (plan.kind == ONCE) return -1; \
    int result = call; \
    leave(plan); \
    return result;

int open(const char *path, int flags, ...) { REAL(open); OPEN_BODY(real(path, flags, mode), AT_FDCWD, path, flags) }
int open64(const char *path, int flags, ...) { REAL(open64); OPEN_BODY(real(path, flags, mode), AT_FDCWD, path, flags) }
int openat(int folder, const char *path, int flags, ...) {
    REAL(openat);
    OPEN_BODY(real(folder, path, flags, mode), folder, path, flags)
}
int openat64(int folder, const char *path, int flags, ...) {
    REAL(openat64);
    OPEN_BODY(real(folder, path, flags, mode), folder, path, flags)
}
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPEN_BODY \
    if (!state.root_length || !strpbrk(mode, "wa+")) return real(path, mode); \
    char whole[PATH_MAX]; \
    join(AT_FDCWD, path, whole); \
    struct plan plan = enter_open(whole, mode[0] == 'r' ? O_RDWR : O_CREAT | O_RDWR); \
    if (plan.kind == ONCE) return NULL; \
    FILE *result = real(path, mode); \
    leave(plan); \
    return result;

FILE *fopen(const char *path, const char *mode) { REAL(fopen); FOPEN_BODY }
FILE *fopen64(const char *path, const char *mode) { REAL(fopen64); FOPEN_BODY }

// `call(buffer, size)` writes; a flipped bit goes to the file, the caller's memory stays.
#define WRITE_BODY(fd, buffer, size, call) \
    if (!state.root_length || state.pid != getpid()) return call(buffer, size); \
    char path[PATH_MAX]; \
    path_of(fd, path); \
    struct plan plan = enter("write", path, NULL, size); \
    if (plan.kind == ONCE) return -1; \
    if (plan.kind == HALF || plan.kind == SHORT) { \
        ssize_t half = call(buffer, (size) / 2); \
        leave(plan); \
        return half; \
    } \
    if (plan.kind == FLIP) { \
        char *copy = malloc(size); \
        memcpy(copy, buffer, size); \
        copy[(size) / 2] ^= 0x10; \
        ssize_t result = call(copy, size); \
        free(copy); \
        return result; \
    } \
    ssize_t result = call(buffer, size); \
    leave(plan); \
    return result;

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
#define CALL(b, n) real(fd, b, n)
    WRITE_BODY(fd, buffer, size, CALL)
#undef CALL
}
ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset) {
    REAL(pwrite);
#define CALL(b, n) real(fd, b, n, offset)
    WRITE_BODY(fd, buffer, size, CALL)
#undef CALL
}
ssize_t pwrite64(int fd, const void *buffer, size_t size, off_t offset) {
    REAL(pwrite64);
#define CALL(b, n) real(fd, b, n, offset)
    WRITE_BODY(fd, buffer, size, CALL)
#undef CALL
}
// A vector is joined to one buffer: half of it, or one bit of it, is then the same as for write.
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    char path[PATH_MAX];
    if (!state.root_length || (path_of(fd, path), !below(path))) return real(fd, parts, count);
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    char *whole = malloc(size ? size : 1), *end = whole;
    for (int i = 0; i < count; i++) end = (char *)mempcpy(end, parts[i].iov_base, parts[i].iov_len);
    ssize_t result = write(fd, whole, size);
    int error = errno;
    free(whole);
    errno = error;
    return result;
}
// numpy writes arrays with fwrite; the C library's own write does not pass through this file.
size_t fwrite(const void *buffer, size_t item, size_t count, FILE *stream) {
    REAL(fwrite);
    char path[PATH_MAX];
    if (!state.root_length || (path_of(fileno(stream), path), !below(path))) return real(buffer, item, count, stream);
    fflush(stream);
    ssize_t done = write(fileno(stream), buffer, item * count);
    if (done >= 0) lseek(fileno(stream), 0, SEEK_CUR);
    return done < 0 || !item ? 0 : (size_t)done / item;
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    REAL(sendfile);
    char path[PATH_MAX];
    if (!state.root_length || (path_of(out, path), !below(path))) return real(out, in, offset, size);
    struct plan plan = enter("write", path, NULL, size);
    if (plan.kind == ONCE) return -1;
    ssize_t result = real(out, in, offset, plan.kind == HALF || plan.kind == SHORT ? size / 2 : size);
    leave(plan);
    return result;
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t size) { return sendfile(out, in, offset, size); }

#define SYNC_BODY \
    char path[PATH_MAX]; \
    if (!state.root_length || (path_of(fd, path), !below(path))) return real(fd); \
    struct plan plan = enter("fsync", path, NULL, 0); \
    if (plan.kind == ONCE) return -1; \
    int result = real(fd); \
    if (!result) keep_synced(fd, path); \
    leave(plan); \
    return result;

int fsync(int fd) { REAL(fsync); SYNC_BODY }
int fdatasync(int fd) { REAL(fdatasync); SYNC_BODY }

// A call on one or two paths, relative to folders.
#define PATH_BODY(op, folder, path, other, buried, call) \
    if (!state.root_length) return call; \
    char whole[PATH_MAX], second[PATH_MAX]; \
    join(folder, path, whole); \
    const char *to = other; \
    struct plan plan = enter(op, whole, to, 0); \
    if (plan.kind == ONCE) return -1; \
    if (plan.number && buried) bury(to ? to : whole); \
    int result = call; \
    leave(plan); \
    return result;

int rename(const char *from, const char *to_path) {
    REAL(rename);
    PATH_BODY("rename", AT_FDCWD, from, (join(AT_FDCWD, to_path, second), second), 1, real(from, to_path))
}
int renameat(int a, const char *from, int b, const char *to_path) {
    REAL(renameat);
    PATH_BODY("rename", a, from, (join(b, to_path, second), second), 1, real(a, from, b, to_path))
}
int link(const char *from, const char *to_path) {
    REAL(link);
    PATH_BODY("link", AT_FDCWD, from, (join(AT_FDCWD, to_path, second), second), 0, real(from, to_path))
}
int linkat(int a, const char *from, int b, const char *to_path, int flags) {
    REAL(linkat);
    PATH_BODY("link", a, from, (join(b, to_path, second), second), 0, real(a, from, b, to_path, flags))
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); PATH_BODY("mkdir", AT_FDCWD, path, ((void)second, NULL), 0, real(path, mode)) }
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    PATH_BODY("mkdir", folder, path, ((void)second, NULL), 0, real(folder, path, mode))
}
int unlink(const char *path) { REAL(unlink); PATH_BODY("unlink", AT_FDCWD, path, ((void)second, NULL), 1, real(path)) }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    PATH_BODY(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, ((void)second, NULL), 1, real(folder, path, flags))
}
int rmdir(const char *path) { REAL(rmdir); PATH_BODY("rmdir", AT_FDCWD, path, ((void)second, NULL), 1, real(path)) }
#define TRUNCATE_BODY(call) \
    char path[PATH_MAX]; \
    if (!state.root_length || (path_of(fd, path), !below(path))) return call; \
    struct plan plan = enter("ftruncate", path, NULL, 0); \
    if (plan.kind == ONCE) return -1; \
    int result = call; \
    leave(plan); \
    return result;
int ftruncate(int fd, off_t size) { REAL(ftruncate); TRUNCATE_BODY(real(fd, size)) }
int ftruncate64(int fd, off_t size) { REAL(ftruncate64); TRUNCATE_BODY(real(fd, size)) }
