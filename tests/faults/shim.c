/* Makes system calls fail, for files whose name ends in a given text; see failing_calls.py.
 *
 * MOA_SHIM="write:metrics.jsonl:28" makes write() to such files fail with error number 28. Instead of a number, `zero`
 * lets write() return 0, `short` lets it write one byte less, and `interrupted` lets every second call fail with EINTR.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static char value[32];

/* Whether MOA_SHIM means this call on this path; `value` then holds what is to happen. */
static int meant(const char *call, const char *path) {
    const char *plan = getenv("MOA_SHIM");
    char name[32], end[256];
    if (!plan || !path || sscanf(plan, "%31[^:]:%255[^:]:%31s", name, end, value) != 3 || strcmp(name, call)) return 0;
    size_t length = strlen(path), tail = strlen(end);
    return length >= tail && !strcmp(path + length - tail, end);
}

static int meant_fd(const char *call, int fd) {
    char link[64], path[4096];
    if (!getenv("MOA_SHIM")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return meant(call, path);
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define FAIL(result) do { errno = atoi(value); return result; } while (0)

/* A call that takes a path, or a descriptor, first. */
#define ON_PATH(type, failed, call, name, parameters, arguments, ...)        \
    type name parameters {                                                    \
        if (meant(#call, path)) FAIL(failed);                                 \
        return REAL(type, name, __VA_ARGS__) arguments;                       \
    }
#define ON_FD(type, call, name, parameters, arguments, ...)                   \
    type name parameters {                                                    \
        if (meant_fd(#call, fd)) FAIL(-1);                                    \
        return REAL(type, name, __VA_ARGS__) arguments;                       \
    }

ON_PATH(int, -1, stat, stat, (const char *path, struct stat *s), (path, s), const char *, struct stat *)
ON_PATH(int, -1, stat, stat64, (const char *path, struct stat64 *s), (path, s), const char *, struct stat64 *)
ON_PATH(int, -1, stat, lstat, (const char *path, struct stat *s), (path, s), const char *, struct stat *)
ON_PATH(int, -1, stat, lstat64, (const char *path, struct stat64 *s), (path, s), const char *, struct stat64 *)
ON_PATH(int, -1, stat, __xstat, (int v, const char *path, struct stat *s), (v, path, s), int, const char *, void *)
ON_PATH(int, -1, stat, __xstat64, (int v, const char *path, void *s), (v, path, s), int, const char *, void *)
ON_PATH(int, -1, stat, __lxstat, (int v, const char *path, struct stat *s), (v, path, s), int, const char *, void *)
ON_PATH(int, -1, stat, __lxstat64, (int v, const char *path, void *s), (v, path, s), int, const char *, void *)
ON_PATH(DIR *, NULL, list, opendir, (const char *path), (path), const char *)
ON_PATH(int, -1, mkdir, mkdir, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
ON_PATH(int, -1, rename, rename, (const char *path, const char *to), (path, to), const char *, const char *)
ON_PATH(int, -1, unlink, unlink, (const char *path), (path), const char *)
ON_FD(int, fsync, fsync, (int fd), (fd), int)
ON_FD(int, flock, flock, (int fd, int how), (fd, how), int, int)
ON_FD(int, truncate, ftruncate, (int fd, off_t size), (fd, size), int, off_t)
ON_FD(int, truncate, ftruncate64, (int fd, off64_t size), (fd, size), int, off64_t)
ON_FD(ssize_t, read, read, (int fd, void *data, size_t size), (fd, data, size), int, void *, size_t)

int close(int fd) {
    int fails = meant_fd("close", fd);
    int result = REAL(int, close, int)(fd); /* as in Linux: closed in any case */
    if (fails) FAIL(-1);
    return result;
}

ssize_t write(int fd, const void *data, size_t size) {
    static int calls;
    ssize_t (*real)(int, const void *, size_t) = REAL(ssize_t, write, int, const void *, size_t);
    if (!meant_fd("write", fd)) return real(fd, data, size);
    if (!strcmp(value, "zero")) return 0;
    if (!strcmp(value, "short")) return real(fd, data, size > 1 ? size - 1 : size);
    if (strcmp(value, "interrupted")) FAIL(-1);
    if (calls++ % 2) return real(fd, data, size);
    errno = EINTR;
    return -1;
}

#define OPEN(name)                                                            \
    int name(const char *path, int flags, ...) {                              \
        va_list more;                                                         \
        va_start(more, flags);                                                \
        mode_t mode = va_arg(more, mode_t);                                   \
        va_end(more);                                                         \
        if (meant("open", path)) FAIL(-1);                                    \
        return REAL(int, name, const char *, int, mode_t)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
