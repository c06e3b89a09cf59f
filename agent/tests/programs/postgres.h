// The smallest client of PostgreSQL's protocol 3: there is no library between the functions of a test and the system
// call that sends. No passwords, no encryption.
// https://www.postgresql.org/docs/current/protocol.html
#ifndef POSTGRES_H
#define POSTGRES_H

#include "burn.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>

struct connection {
    int fd;
    int pid; // of the backend
    uint32_t key; // the secret key that cancels its statement
    char state; // of the last ReadyForQuery
    int errors;
    unsigned char out[1 << 16];
    size_t used;
};

static inline void receive(struct connection *c, void *to, size_t size) {
    for (size_t got = 0; got < size;) {
        ssize_t n = read(c->fd, (char *)to + got, size - got);
        if (n <= 0) fail("connection to the server");
        got += (size_t)n;
    }
}

static inline void put(struct connection *c, const void *bytes, size_t size) {
    if (c->used + size > sizeof c->out) {
        fprintf(stderr, "message too long\n");
        exit(2);
    }
    memcpy(c->out + c->used, bytes, size);
    c->used += size;
}

static inline void put16(struct connection *c, int value) {
    uint16_t n = htons((uint16_t)value);
    put(c, &n, 2);
}
static inline void put32(struct connection *c, int value) {
    uint32_t n = htonl((uint32_t)value);
    put(c, &n, 4);
}
static inline void put_string(struct connection *c, const char *text) { put(c, text, strlen(text) + 1); }

// Adds a message of this type with one string.
static inline void message(struct connection *c, char type, const char *text) {
    put(c, &type, 1);
    put32(c, (int)strlen(text) + 5);
    put_string(c, text);
}
static inline void parse(struct connection *c, const char *name, const char *text) {
    put(c, "P", 1);
    put32(c, (int)(strlen(name) + strlen(text)) + 8);
    put_string(c, name);
    put_string(c, text);
    put16(c, 0);
}
static inline void bind_execute(struct connection *c, const char *name) {
    put(c, "B", 1);
    put32(c, (int)strlen(name) + 12);
    put_string(c, "");
    put_string(c, name);
    put16(c, 0);
    put16(c, 0);
    put16(c, 0);
    put(c, "E", 1);
    put32(c, 9);
    put_string(c, "");
    put32(c, 0);
}
static inline void sync_(struct connection *c) {
    put(c, "S", 1);
    put32(c, 4);
}

// Sends what was added, with the system call that the agent observes.
static FRAME __attribute__((unused)) void flush(struct connection *c) {
    for (size_t sent = 0; sent < c->used;) {
        ssize_t n = send(c->fd, c->out + sent, c->used - sent, MSG_NOSIGNAL);
        if (n <= 0) fail("send");
        sent += (size_t)n;
    }
    c->used = 0;
}

// Reads answers up to and including ReadyForQuery, or CopyInResponse.
static inline void until_ready(struct connection *c) {
    static __thread char body[1 << 20];
    for (;;) {
        char type;
        uint32_t length;
        receive(c, &type, 1);
        receive(c, &length, 4);
        length = ntohl(length) - 4;
        if (length > sizeof body) fail("the message is too long");
        receive(c, body, length);
        if (type == 'K') {
            uint32_t pid;
            memcpy(&pid, body, 4);
            memcpy(&c->key, body + 4, 4);
            c->pid = (int)ntohl(pid);
        }
        if (type == 'E') {
            c->errors++;
            if (getenv("SHOW_ERRORS")) fprintf(stderr, "server: %s\n", body + 1);
        }
        if (type == 'G') return; // CopyInResponse
        if (type == 'Z') {
            c->state = body[0];
            return;
        }
    }
}

// Opens a connection to a Unix socket (a path), or to a port of ::1 or 127.0.0.1 ("6:5432", "4:5432"). A
// second number is the client's own port ("4:5432:40000").
static inline int open_socket(const char *where) {
    struct sockaddr_storage address = {0}, own = {0};
    socklen_t size;
    int port = 0, own_port = 0;
    if (where[0] != '/') sscanf(where + 2, "%d:%d", &port, &own_port);
    if (where[0] == '/') {
        struct sockaddr_un *to = (struct sockaddr_un *)&address;
        to->sun_family = AF_UNIX;
        strncpy(to->sun_path, where, sizeof to->sun_path - 1);
        size = sizeof *to;
    } else if (where[0] == '6') {
        struct sockaddr_in6 *to = (struct sockaddr_in6 *)&address;
        to->sin6_family = AF_INET6;
        to->sin6_port = htons((uint16_t)port);
        to->sin6_addr = in6addr_loopback;
        size = sizeof *to;
    } else {
        struct sockaddr_in *to = (struct sockaddr_in *)&address;
        to->sin_family = AF_INET;
        to->sin_port = htons((uint16_t)port);
        to->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        size = sizeof *to;
    }
    int fd = socket(address.ss_family, SOCK_STREAM, 0);
    int one = 1;
    if (address.ss_family != AF_UNIX) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (own_port) {
        own = address;
        ((struct sockaddr_in *)&own)->sin_port = htons((uint16_t)own_port); // IPv6 has the port at the same offset
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, (struct sockaddr *)&own, size)) fail("bind");
    }
    if (connect(fd, (struct sockaddr *)&address, size)) fail(where);
    return fd;
}

// Connects as the role `test`. `where` is as for open_socket.
static inline void connect_to(struct connection *c, const char *where, const char *application) {
    memset(c, 0, sizeof *c);
    c->fd = open_socket(where);
    static const char startup[] = "user\0test\0database\0postgres\0application_name";
    put32(c, (int)(sizeof startup + strlen(application)) + 10);
    put32(c, 3 << 16);
    put(c, startup, sizeof startup);
    put_string(c, application);
    put_string(c, "");
    flush(c);
    until_ready(c);
}

// Ends the connection and waits until the server has closed its side, so that everything that belongs to it
// is free.
static inline void disconnect(struct connection *c) {
    put(c, "X", 1);
    put32(c, 4);
    flush(c);
    char byte;
    while (read(c->fd, &byte, 1) > 0) {
    }
    // Makes the port reusable at once.
    struct linger at_once = {.l_onoff = 1};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(c->fd);
}

// Cancels the statement of a connection, by a second connection.
static FRAME __attribute__((unused)) void cancel(struct connection *c, const char *where) {
    struct connection other = {.fd = open_socket(where)};
    put32(&other, 16);
    put32(&other, 80877102);
    put32(&other, c->pid);
    put(&other, &c->key, 4);
    flush(&other);
    char byte;
    while (read(other.fd, &byte, 1) > 0) {
    }
    close(other.fd);
}

// Waits until a process sleeps, as a backend does soon after its answer. At most about a second.
static inline void until_asleep(int pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    for (int tries = 0; tries < 10000; tries++) {
        char state = 0;
        FILE *file = fopen(path, "r");
        if (!file || fscanf(file, "%*d (%*[^)]) %c", &state) != 1) fail(path);
        fclose(file);
        if (state == 'S') return;
        usleep(100);
    }
}

// CPU time of a process so far, nanoseconds: the first number of schedstat. For a running process the
// kernel adds the time since the last tick only when it is switched out, which would count it for the next
// statement.
static inline int64_t cpu_of(int pid) {
    char path[64];
    long long nanoseconds = 0;
    until_asleep(pid);
    snprintf(path, sizeof path, "/proc/%d/schedstat", pid);
    FILE *file = fopen(path, "r");
    if (!file || fscanf(file, "%lld", &nanoseconds) != 1) fail(path);
    fclose(file);
    return nanoseconds;
}

#endif
