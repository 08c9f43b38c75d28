/* Both ends of a TCP connection, for bench/userspace.py, which builds it.
 *
 *   tcp serve            listens on a free port of 127.0.0.1 (printed). A connection that begins
 *                        with 'e' is answered octet by octet until it ends; one that begins
 *                        with 's' is read to its end and answered with one octet.
 *   tcp connect A P N C  N connections to A:P, C at a time: connect, one octet there and back,
 *                        close. Prints seconds, failures, and the latency of each in microseconds
 *                        (p50, p99).
 *   tcp ping A P N       N octets there and back on one connection; the same figures.
 *   tcp pump A P M       M MiB on one connection. Prints seconds, failures.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 65536
static double began[MOST];
static char mode[MOST], asked[MOST];
static char scratch[1 << 20];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(double seconds, long failed, double *took, long count)
{
    qsort(took, count, sizeof *took, by_size);
    printf("%.6f %ld %.1f %.1f\n", seconds, failed, count ? took[count / 2] * 1e6 : 0,
           count ? took[count * 99 / 100] * 1e6 : 0);
}

static void serve(void)
{
    struct sockaddr_in own = {.sin_family = AF_INET};
    struct epoll_event events[256], event = {.events = EPOLLIN};
    socklen_t size = sizeof own;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poll = epoll_create1(0);

    own.sin_addr.s_addr = htonl(INADDR_ANY);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&own, sizeof own) || listen(fd, 4096))
        die("listen");
    getsockname(fd, (struct sockaddr *)&own, &size);
    printf("%d\n", ntohs(own.sin_port));
    fflush(stdout);
    event.data.fd = fd;
    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    for (;;) {
        int n = epoll_wait(poll, events, 256, -1);
        for (int i = 0; i < n; i++) {
            int c = events[i].data.fd;
            if (c == fd) {
                while ((c = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    mode[c] = 0;
                    event.data.fd = c;
                    epoll_ctl(poll, EPOLL_CTL_ADD, c, &event);
                }
                continue;
            }
            /* MSG_TRUNC: the octets themselves are nobody's business. */
            ssize_t k = mode[c] == 's' ? recv(c, scratch, sizeof scratch, MSG_TRUNC)
                                       : recv(c, scratch, 4096, 0);
            if (k > 0 && !mode[c])
                mode[c] = scratch[0];
            if (k > 0 && mode[c] == 'e' && send(c, scratch, k, MSG_NOSIGNAL) < 0)
                k = 0;
            if (k == 0 && mode[c] == 's')
                send(c, "s", 1, MSG_NOSIGNAL);
            if (k == 0 || (k < 0 && errno != EAGAIN))
                close(c);
        }
    }
}

static struct sockaddr_in there(char **argv)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    inet_pton(AF_INET, argv[2], &to.sin_addr);
    to.sin_port = htons(atoi(argv[3]));
    return to;
}

static int begin(struct sockaddr_in *to, int poll)
{
    struct epoll_event event = {.events = EPOLLOUT};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    if (fd < 0)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    began[fd] = now();
    asked[fd] = 0;
    if (connect(fd, (struct sockaddr *)to, sizeof *to) && errno != EINPROGRESS)
        die("connect");
    event.data.fd = fd;
    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    return fd;
}

static int connects(char **argv)
{
    struct sockaddr_in to = there(argv);
    struct epoll_event events[256], event;
    long count = atol(argv[4]), left, done = 0, failed = 0;
    int at_once = atoi(argv[5]), poll = epoll_create1(0);
    double *took = calloc(count, sizeof *took), start = now();

    for (left = count; left > count - at_once && left > 0; left--)
        begin(&to, poll);
    while (done + failed < count) {
        int n = epoll_wait(poll, events, 256, 10000);
        if (n == 0)
            break;
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (!asked[fd]) {
                if (send(fd, "e", 1, MSG_NOSIGNAL) == 1) {
                    asked[fd] = 1;
                    event.events = EPOLLIN;
                    event.data.fd = fd;
                    epoll_ctl(poll, EPOLL_CTL_MOD, fd, &event);
                    continue;
                }
                failed++;
            } else if (recv(fd, scratch, 1, 0) == 1) {
                took[done++] = now() - began[fd];
            } else {
                failed++;
            }
            close(fd);
            if (left > 0) {
                left--;
                begin(&to, poll);
            }
        }
    }
    report(now() - start, count - done, took, done);
    return 0;
}

static int connected(char **argv)
{
    struct sockaddr_in to = there(argv);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&to, sizeof to))
        die("connect");
    return fd;
}

static int ping(char **argv)
{
    int fd = connected(argv);
    long count = atol(argv[4]), failed = 0;
    double *took = calloc(count, sizeof *took), start = now();

    for (long i = 0; i < count; i++) {
        double before = now();
        if (send(fd, "e", 1, MSG_NOSIGNAL) != 1 || recv(fd, scratch, 1, 0) != 1)
            failed++;
        took[i] = now() - before;
    }
    report(now() - start, failed, took, count);
    return 0;
}

static int pump(char **argv)
{
    int fd = connected(argv), memory = memfd_create("octets", 0);
    long left = atol(argv[4]);
    double start = now();

    memset(scratch, 's', sizeof scratch);
    for (int i = 0; i < 16; i++)
        if (write(memory, scratch, sizeof scratch) < 0)
            die("write");
    for (left <<= 20; left > 0;) {
        off_t at = 0;
        ssize_t k = sendfile(fd, memory, &at, left < 16 << 20 ? left : 16 << 20);
        if (k <= 0)
            die("sendfile");
        left -= k;
    }
    shutdown(fd, SHUT_WR);
    printf("%.6f %d 0 0\n", now() - start, recv(fd, scratch, 1, 0) != 1);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "serve"))
        serve();
    if (argc == 6 && !strcmp(argv[1], "connect"))
        return connects(argv);
    if (argc == 5 && !strcmp(argv[1], "ping"))
        return ping(argv);
    if (argc == 5 && !strcmp(argv[1], "pump"))
        return pump(argv);
    fprintf(stderr, "see the top of tcp.c\n");
    return 2;
}
