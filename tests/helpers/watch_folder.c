/* Tells a program of every call of this process that changed something below a folder, and waits for its answer.
 *
 * For LD_PRELOAD. WATCHED is the folder, WATCHER the path of a Unix socket: a connection is made for each call, a line
 * with the call's name and path is sent, and one byte is read before the call returns. So the other program sees the
 * folder as it stands after every call, one at a time whatever the number of threads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;

/* Returns whether a path is watched; if so, holds all other calls until `tell`. Keeps errno. */
static int hold(const char *path) {
  const char *folder = getenv("WATCHED");
  if (inside || !path || !folder || !getenv("WATCHER") || strncmp(path, folder, strlen(folder)) != 0) return 0;
  pthread_mutex_lock(&one_at_a_time);
  inside = 1;
  return 1;
}

/* Tells of a call that succeeded, waits for the answer, and lets other calls go on. Keeps errno. */
static void tell(int done, const char *call, const char *path) {
  int saved = errno;
  if (done) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, getenv("WATCHER"), sizeof name.sun_path - 1);
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(connection, (struct sockaddr *)&name, sizeof name) == 0) {
      char answer;
      dprintf(connection, "%s %s\n", call, path);
      if (recv(connection, &answer, 1, 0) != 1) abort();
    }
    close(connection);
  }
  inside = 0;
  pthread_mutex_unlock(&one_at_a_time);
  errno = saved;
}

/* Writes the whole path of a path, which may be relative to a folder, or of a file; returns it, or NULL. */
static const char *whole_path(char *whole, int directory, const char *path) {
  char link[64];
  if (path && path[0] == '/') return path;
  if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, whole, PATH_MAX - 1);
  if (length < 0) return NULL;
  whole[length] = 0;
  if (path) snprintf(whole + length, PATH_MAX, "/%s", path);
  return whole;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WATCHED_CALL(type, name, directory, path, happened, given)   \
  char buffer[2 * PATH_MAX + 1];                                     \
  const char *whole = whole_path(buffer, directory, path);           \
  int held = hold(whole);                                            \
  type result = REAL(name) given;                                    \
  if (held) tell(happened, #name, whole);                            \
  return result;

#define OPENING(name, directory, parameters, given)                                                       \
  int name parameters {                                                                                   \
    mode_t mode = 0;                                                                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                  \
      va_list rest;                                                                                       \
      va_start(rest, flags);                                                                              \
      mode = va_arg(rest, mode_t);                                                                        \
      va_end(rest);                                                                                       \
    }                                                                                                     \
    if (!(flags & (O_CREAT | O_TRUNC))) return REAL(name) given;                                          \
    WATCHED_CALL(int, name, directory, path, result >= 0, given)                                          \
  }
OPENING(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENING(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENING(openat, directory, (int directory, const char *path, int flags, ...), (directory, path, flags, mode))
OPENING(openat64, directory, (int directory, const char *path, int flags, ...), (directory, path, flags, mode))

#define OF_A_FILE(type, name, parameters, given) \
  type name parameters { WATCHED_CALL(type, name, file, NULL, result >= 0, given) }
OF_A_FILE(ssize_t, write, (int file, const void *bytes, size_t count), (file, bytes, count))
OF_A_FILE(ssize_t, pwrite, (int file, const void *bytes, size_t count, off_t at), (file, bytes, count, at))
OF_A_FILE(ssize_t, pwrite64, (int file, const void *bytes, size_t count, off64_t at), (file, bytes, count, at))
OF_A_FILE(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count))
OF_A_FILE(ssize_t, pwritev, (int file, const struct iovec *parts, int count, off_t at), (file, parts, count, at))
OF_A_FILE(int, ftruncate, (int file, off_t size), (file, size))
OF_A_FILE(int, ftruncate64, (int file, off64_t size), (file, size))

#define OF_A_PATH(name, directory, parameters, given) \
  int name parameters { WATCHED_CALL(int, name, directory, path, result == 0, given) }
OF_A_PATH(mkdir, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
OF_A_PATH(mkdirat, directory, (int directory, const char *path, mode_t mode), (directory, path, mode))
OF_A_PATH(rmdir, AT_FDCWD, (const char *path), (path))
OF_A_PATH(unlink, AT_FDCWD, (const char *path), (path))
OF_A_PATH(unlinkat, directory, (int directory, const char *path, int flags), (directory, path, flags))
OF_A_PATH(truncate, AT_FDCWD, (const char *path, off_t size), (path, size))
OF_A_PATH(rename, AT_FDCWD, (const char *from, const char *path), (from, path))
OF_A_PATH(renameat, directory, (int old, const char *from, int directory, const char *path), (old, from, directory, path))
OF_A_PATH(renameat2, directory,
          (int old, const char *from, int directory, const char *path, unsigned int flags),
          (old, from, directory, path, flags))
OF_A_PATH(link, AT_FDCWD, (const char *from, const char *path), (from, path))
OF_A_PATH(symlink, AT_FDCWD, (const char *from, const char *path), (from, path))
