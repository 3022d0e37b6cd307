/*
 * Loads the core as a host process does, by dlopen, and uses its thread:
 * `load_core LIBRARY` prints the ABI hash when everything worked. Built for
 * glibc and for musl by musl_test.ts.
 */
#include <dlfcn.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

enum { TOKEN = 7, TIMEOUT_MS = 20000, CAPACITY = 4 };

struct poll_event {
    uint32_t token;
    uint32_t events;
};

#define FAIL(...) return printf(__VA_ARGS__), 1

/* Defines `NAME` as the core's function of that name. */
#define FUNCTION(RESULT, NAME, ...)                              \
    RESULT (*NAME)(__VA_ARGS__) = dlsym(library, "vhost2_" #NAME); \
    if (NAME == NULL) FAIL("no symbol vhost2_%s\n", #NAME)

int main(int count, char **arguments) {
    if (count != 2) FAIL("usage: load_core LIBRARY\n");
    void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) FAIL("%s\n", dlerror());
    FUNCTION(uint32_t, core_hash, void);
    FUNCTION(int32_t, core_init, void);
    FUNCTION(int32_t, eventfd_create, void);
    FUNCTION(int32_t, eventfd_signal, int32_t);
    FUNCTION(int32_t, descriptor_close, int32_t);
    FUNCTION(int32_t, poll_create, int32_t *);
    FUNCTION(int32_t, poll_add, uint32_t, int32_t, uint32_t, uint32_t);
    FUNCTION(int32_t, poll_wait, uint32_t, uint32_t, struct poll_event *, uint32_t);
    FUNCTION(int32_t, poll_close, uint32_t);

    int32_t result = core_init();
    if (result < 0) FAIL("core_init: errno %d\n", -result);
    int32_t wake_fd = -1;
    int32_t set = poll_create(&wake_fd);
    if (set < 0) FAIL("poll_create: errno %d\n", -set);
    int32_t event_fd = eventfd_create();
    if (event_fd < 0) FAIL("eventfd_create: errno %d\n", -event_fd);
    result = poll_add((uint32_t)set, event_fd, TOKEN, 0);
    if (result < 0) FAIL("poll_add: errno %d\n", -result);
    result = eventfd_signal(event_fd);
    if (result < 0) FAIL("eventfd_signal: errno %d\n", -result);

    /* The core's thread has seen it when a byte arrives here. */
    struct pollfd wake = {.fd = wake_fd, .events = POLLIN};
    if (poll(&wake, 1, TIMEOUT_MS) != 1) FAIL("the thread woke nobody\n");
    struct poll_event events[CAPACITY];
    result = poll_wait((uint32_t)set, 0, events, CAPACITY);
    if (result != 1) FAIL("poll_wait: %d, not 1\n", result);
    if (events[0].token != TOKEN) FAIL("token %u\n", events[0].token);

    result = poll_close((uint32_t)set);
    if (result < 0) FAIL("poll_close: errno %d\n", -result);
    result = descriptor_close(event_fd);
    if (result < 0) FAIL("descriptor_close: errno %d\n", -result);
    close(wake_fd);
    printf("%u\n", core_hash());
    return 0;
}
